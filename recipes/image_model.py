"""An image classifier: any vision transformer of the hub, or a CNN, under a linear head."""

import inspect
from typing import Any

import torch
from classifier import Batch, Classifier
from efficientnet import EfficientNetLite
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override


class ImageClassifier(Classifier):
    """The backbone's CLS token beside the mean of its patch tokens, under a linear head.

    Images of another size than the backbone was trained on have its position embeddings
    interpolated, by transformers. Of EfficientNet-Lite the head gets the mean of the last features
    over the image.

    Args:
        num_classes: outputs of the head.
        backbone: a hub id, a local folder, or "package:dinov2-small" or
            "package:efficientnet-lite0" (see packages.py).
        options: those of Classifier.
    """

    def __init__(
        self, num_classes: int, backbone: str = "package:dinov2-small", **options: Any
    ) -> None:
        super().__init__(num_classes, backbone, **options)
        named = [name for name, _ in self.backbone.named_parameters()]
        if not self.convolutional and not any(name.endswith("cls_token") for name in named):
            raise MisconfigurationException(
                f"{backbone} is a {type(self.pretrained).__name__}: expected a vision transformer "
                "with a CLS token, such as facebook/dinov2-small or google/vit-base-patch16-224, "
                "or package:efficientnet-lite0"
            )
        # DINOv2 always interpolates; others must be told to
        told = "interpolate_pos_encoding"
        known = told in inspect.signature(self.pretrained.forward).parameters
        self._options = {told: True} if known else {}

    @property
    def convolutional(self) -> bool:
        return isinstance(self.pretrained, EfficientNetLite)

    @property
    @override
    def width(self) -> int:
        return super().width * (1 if self.convolutional else 2)

    @override
    def pool(self, batch: Batch) -> Tensor:
        hidden = self.backbone(batch["pixel_values"], **self._options).last_hidden_state
        if self.convolutional:
            mean: Tensor = hidden.mean(dim=(2, 3))
            return mean
        registers = getattr(self.pretrained.config, "num_register_tokens", 0)
        patches = hidden[:, 1 + registers :]  # (batch, patches, hidden)
        return torch.cat([hidden[:, 0], patches.mean(dim=1)], dim=1)
