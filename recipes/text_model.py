"""A text classifier: any encoder of the hub under a linear head."""

from collections.abc import Mapping
from typing import Any

from classifier import Batch, Classifier
from torch import Tensor
from typing_extensions import override

__all__ = ["TextClassifier"]


class TextClassifier(Classifier):
    """The mean of the backbone's last hidden states over a text's tokens, under a linear head.

    Args:
        num_classes: outputs of the head.
        backbone: a hub id, a local folder, or "package:minilm" (see packages.py).
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
        backbone: str = "package:minilm",
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

    @override
    def pool(self, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = self.backbone(**inputs).last_hidden_state  # (batch, tokens, hidden)
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean: Tensor = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return mean
