"""recipes/packages.py: wheels are fetched once, checked, and unpacked inside their folder only."""

import hashlib
import zipfile
from pathlib import Path

import packages
import pytest


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, instead of any index; and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("MATS_LIGHTNING_CACHE", str(tmp_path / "cache"))
    return folder


def make_wheel(index: Path, name: str, members: dict[str, str], tag: str = "py3-none-any") -> str:
    """Write name-1.0-<tag>.whl, which requires a package that does not exist; its hash."""
    information = f"{name}-1.0.dist-info"
    members = {
        **members,
        f"{information}/METADATA": (
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: not-there\n"
        ),
        f"{information}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{information}/RECORD": "",
    }
    path = index / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_wheel_is_fetched_without_its_requirements_and_then_reused(
    index: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sha256 = make_wheel(index, "toy", {"toy/data.txt": "rows"})
    folder = packages.fetch("toy==1.0", sha256)
    assert (folder / "toy/data.txt").read_text() == "rows"
    assert "downloading toy==1.0" in capfd.readouterr().err
    assert [path.name for path in packages.cache_folder().iterdir()] == [folder.name]

    (index / "toy-1.0-py3-none-any.whl").unlink()
    assert packages.fetch("toy==1.0", sha256) == folder
    assert capfd.readouterr().err == ""


def test_one_wheel_of_a_compiled_package_serves_every_machine(index: Path) -> None:
    tag = "cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64"
    sha256 = make_wheel(index, "toy", {"toy/data.txt": "rows"}, tag)
    folder = packages.fetch("toy==1.0", sha256, packages.LINUX_WHEEL)
    assert (folder / "toy/data.txt").read_text() == "rows"


def test_another_wheel_than_the_pinned_one_is_refused(index: Path) -> None:
    sha256 = make_wheel(index, "toy", {"toy/data.txt": "rows"})
    with pytest.raises(ValueError, match=f"expected SHA-256 {'0' * 64}, found {sha256}"):
        packages.fetch("toy==1.0", "0" * 64)
    assert list(packages.cache_folder().iterdir()) == []


@pytest.mark.parametrize("member", ["../outside.txt", "toy/../../outside.txt", "/outside.txt"])
def test_a_member_outside_the_folder_is_refused(index: Path, member: str) -> None:
    sha256 = make_wheel(index, "toy", {"toy/data.txt": "rows", member: "gotcha"})
    with pytest.raises(ValueError, match=r"toy-1.0-py3-none-any.whl has the member .*outside\.txt"):
        packages.fetch("toy==1.0", sha256)
    assert list(packages.cache_folder().iterdir()) == []


def test_a_failed_download_says_what_pip_said(index: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)toy==1.0 could not be downloaded.*No matching"):
        packages.fetch("toy==1.0", "0" * 64)


def test_a_python_without_pip_is_told_how_to_get_it(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="-m ensurepip"):
        packages.fetch("toy==1.0", "0" * 64)


def test_another_process_that_was_faster_wins(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = make_wheel(index, "toy", {"toy/data.txt": "rows"})
    unpack = packages.unpack

    def unpack_twice(wheel: Path, folder: Path) -> None:
        unpack(wheel, folder)
        unpack(wheel, packages.cache_folder() / f"toy-1.0-{sha256[:12]}")

    monkeypatch.setattr(packages, "unpack", unpack_twice)
    assert (packages.fetch("toy==1.0", sha256) / "toy/data.txt").read_text() == "rows"


def test_model_names() -> None:
    assert packages.model_path("owner/model") == "owner/model"
    with pytest.raises(ValueError, match=r"unknown model 'package:nothing'.*package:minilm"):
        packages.model_path("package:nothing")
