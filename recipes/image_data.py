"""The rows of one image classification task, split, and served in batches of one size."""

import hashlib
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, Image
from image_tasks import TASKS
from labelled_data import HubDataset, LabelledData
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from packages import model_path
from PIL.Image import Image as PILImage
from PIL.Image import Resampling
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers.image_processing_base import ImageProcessingMixin
from typing_extensions import override


class ImageData(LabelledData):
    """One of the seven tasks of image_tasks.py (`task`), or any other data set (`hub`).

    Images with the same pixels count as the same; see LabelledData for how rows are chosen and
    split. Each image becomes RGB, is resized to a square, and is normalised with the mean and the
    standard deviation that the model was trained with. Nothing is augmented.

    Args:
        task: mnist, digits, animals, solar, crystal, script or book.
        hub: where another data set is, and what its columns are called.
        model: the model that the images are prepared for: a hub id, a local folder,
            "package:dinov2-small" or "package:efficientnet-lite0".
        image_size: width and height in pixels.
        options: those of LabelledData.
    """

    tasks = TASKS
    column = "image"
    feature = Image()
    hub_columns: ClassVar = {"image": "image_column"}

    def __init__(
        self,
        task: str | None = None,
        hub: HubDataset | None = None,
        model: str = "package:dinov2-small",
        image_size: int = 56,
        **options: Any,
    ) -> None:
        super().__init__(task, hub, model, **options)
        self.image_size = image_size

    @override
    def key(self, row: Mapping[str, Any]) -> Hashable:
        image = row["image"]
        if image is None:
            return None
        if image.mode == "P":  # whose pixels are numbers of colours in its own palette
            image = image.convert("RGBA")
        about = f"{image.mode} {image.size} "
        return hashlib.sha256(about.encode() + image.tobytes()).hexdigest()

    @property
    @override
    def settings(self) -> dict[str, Any]:
        rows = [(self.key(row), row["label"]) for row in self.rows["train"]]
        return {
            "hub": self.hub_settings,
            "image_size": self.image_size,
            "training_images": hashlib.sha256(repr(rows).encode()).hexdigest()[:16],
        }

    @cached_property
    def normalisation(self) -> tuple[Tensor, Tensor]:
        """The model's mean and standard deviation a colour, each (3, 1, 1), of values in 0 to 1."""
        found, _ = ImageProcessingMixin.get_image_processor_dict(model_path(self.model))
        mean, deviation = (torch.tensor(found[name]) for name in ("image_mean", "image_std"))
        return mean.view(3, 1, 1), deviation.view(3, 1, 1)

    @override
    def prepare_data(self) -> None:
        super().prepare_data()
        _ = self.normalisation  # reading it downloads what is missing

    @override
    def _plain(self, rows: Dataset) -> Dataset:
        return rows.cast_column("image", Image())

    @override
    def _encode(self, rows: Dataset) -> TensorDataset:
        """Bytes, a fourth of what floats would take: (rows, 3, size, size)."""
        pixels = torch.stack([self._resized(image) for image in rows["image"]])
        return TensorDataset(pixels, torch.tensor(list(rows["label"])))

    def _resized(self, image: PILImage) -> Tensor:
        if image.mode.startswith(("I", "F")):  # which PIL would cut at 255, not scale
            raise MisconfigurationException(
                f"{self.name}: an image has PIL's mode {image.mode}: expected 8 bits a colour; "
                "convert the images first"
            )
        size = (self.image_size, self.image_size)
        colours = np.asarray(image.convert("RGB").resize(size, Resampling.BICUBIC))
        return torch.tensor(colours).permute(2, 0, 1)

    @override
    def _loader(self, name: str) -> DataLoader[Any]:
        return DataLoader(
            self._encoded[name],
            batch_size=self.batch_size,
            shuffle=name == "train",
            collate_fn=self._batch,
        )

    def _batch(self, rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        pixels, labels = (torch.stack(column) for column in zip(*rows, strict=True))
        mean, deviation = self.normalisation
        return {"pixel_values": (pixels / 255 - mean) / deviation, "labels": labels}
