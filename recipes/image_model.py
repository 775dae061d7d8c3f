"""An image classifier: any vision transformer of the hub under a linear head."""

import inspect
from collections.abc import Mapping
from typing import Any

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
        adapter: "ia3" or "lora" of peft; None trains the whole backbone.
        adapter_options: of peft's configuration of this adapter (see adapters.py).
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "package:dinov2-small",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        head_seed: int = 0,
        adapter: str | None = None,
        adapter_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            num_classes,
            backbone,
            learning_rate,
            weight_decay,
            head_seed,
            adapter,
            adapter_options,
        )
        if not any(name.endswith("cls_token") for name, _ in self.backbone.named_parameters()):
            raise MisconfigurationException(
                f"{backbone} is a {type(self.pretrained).__name__}: expected a vision transformer "
                "with a CLS token, such as facebook/dinov2-small or google/vit-base-patch16-224"
            )
        # DINOv2 always interpolates; others must be told to
        told = "interpolate_pos_encoding"
        known = told in inspect.signature(self.pretrained.forward).parameters
        self._options = {told: True} if known else {}

    @property
    @override
    def width(self) -> int:
        return 2 * super().width

    @override
    def pool(self, batch: Batch) -> Tensor:
        hidden = self.backbone(batch["pixel_values"], **self._options).last_hidden_state
        registers = getattr(self.pretrained.config, "num_register_tokens", 0)
        patches = hidden[:, 1 + registers :]  # (batch, patches, hidden)
        return torch.cat([hidden[:, 0], patches.mean(dim=1)], dim=1)
