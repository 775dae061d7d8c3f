"""Files are written whole, or the old ones stay."""

from pathlib import Path

import pytest

from mats_lightning.files import write_atomically, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, write)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_text_goes_into_a_folder_that_is_made_with_the_line_ends_that_it_has(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new" / "table.csv"
    write_text(path, "ä,1\r\n", newline="")
    assert path.read_bytes() == "ä,1\r\n".encode()
