"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write(temporary)` beside `path`, flushed to disk, then renamed over it.

    A kill leaves the old file or the new one, as do two runs at a time.
    """
    name = os.fsdecode(os.fsencode(path.name)[:200])  # a file system takes 255 bytes
    temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files readable for their owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: Path, text: str, newline: str | None = None) -> None:
    """`text` in UTF-8, in a folder that is made if need be; `newline` is as in `open`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8", newline=newline)

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
