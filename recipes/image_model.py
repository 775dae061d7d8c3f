"""An image classifier: any vision transformer of the hub under a linear head."""

import inspect

import torch
from classifier import Batch, Classifier
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

__all__ = ["ImageClassifier"]


class ImageClassifier(Classifier):
    """The backbone's CLS token beside the mean of its patch tokens, under a linear head.

    Images of another size than the backbone was trained on have its position embeddings
    interpolated, by transformers.

    Args:
        num_classes: outputs of the head.
        backbone: a hub id, a local folder, or "package:dinov2-small" (see packages.py).
        learning_rate: at its highest.
        weight_decay: of AdamW.
        head_seed: the head's start depends on it alone: tasks that are to share a head can begin
            with the same one.
    """

    vectors = 2

    def __init__(
        self,
        num_classes: int,
        backbone: str = "package:dinov2-small",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        head_seed: int = 0,
    ) -> None:
        super().__init__(num_classes, backbone, learning_rate, weight_decay, head_seed)
        if not any(name.endswith("cls_token") for name, _ in self.backbone.named_parameters()):
            raise MisconfigurationException(
                f"{backbone} is a {type(self.backbone).__name__}: expected a vision transformer "
                "with a CLS token, such as facebook/dinov2-small or google/vit-base-patch16-224"
            )
        # DINOv2 always interpolates; others must be told to
        told = "interpolate_pos_encoding"
        known = told in inspect.signature(self.backbone.forward).parameters
        self._options = {told: True} if known else {}

    @override
    def pool(self, batch: Batch) -> Tensor:
        hidden = self.backbone(batch["pixel_values"], **self._options).last_hidden_state
        registers = getattr(self.backbone.config, "num_register_tokens", 0)
        patches = hidden[:, 1 + registers :]  # (batch, patches, hidden)
        return torch.cat([hidden[:, 0], patches.mean(dim=1)], dim=1)
