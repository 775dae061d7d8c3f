"""A text classifier: any encoder of the hub under a linear head."""

from typing import Any

from classifier import Batch, Classifier
from torch import Tensor
from typing_extensions import override


class TextClassifier(Classifier):
    """The mean of the backbone's last hidden states over a text's tokens, under a linear head.

    Args:
        num_classes: outputs of the head.
        backbone: a hub id, a local folder, or "package:minilm" (see packages.py).
        options: those of Classifier.
    """

    def __init__(self, num_classes: int, backbone: str = "package:minilm", **options: Any) -> None:
        super().__init__(num_classes, backbone, **options)

    @override
    def pool(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = self.backbone(**inputs).last_hidden_state  # (batch, tokens, hidden)
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean
