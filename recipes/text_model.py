"""A text classifier: any encoder of the hub under a linear head."""

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import transformers
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from packages import model_path
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModel, PreTrainedModel
from typing_extensions import override

__all__ = ["TextClassifier"]

Batch = Mapping[str, Tensor]


class TextClassifier(L.LightningModule):
    """The mean of the backbone's last hidden states over a text's tokens, under a linear head.

    Trained with the cross-entropy's mean over the batch and AdamW; the learning rate rises
    linearly over the first tenth of the steps and falls linearly to zero over the rest. The metric
    `accuracy` is logged in validation and test.

    Args:
        num_classes: outputs of the head.
        backbone: a hub id, a local folder, or "package:minilm" (see packages.py).
        learning_rate: at its highest.
        weight_decay: of AdamW.
        head_seed: the head's start depends on it alone: tasks that are to share a head can begin
            with the same one.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "package:minilm",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        head_seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.backbone = load_backbone(backbone)
        self.head = nn.Linear(self.backbone.config.hidden_size, num_classes)
        start = torch.Generator().manual_seed(head_seed)
        nn.init.normal_(self.head.weight, std=0.02, generator=start)
        nn.init.zeros_(self.head.bias)
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The logits (batch, classes) of a batch of tokens; `labels` in it are not looked at."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = self.backbone(**inputs).last_hidden_state  # (batch, tokens, hidden)
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        logits: Tensor = self.head(pooled)
        return logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_accuracy(self.validation_accuracy, batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._log_accuracy(self.test_accuracy, batch)

    def _log_accuracy(self, metric: MulticlassAccuracy, batch: Batch) -> None:
        metric.update(self(batch), batch["labels"])
        self.log("accuracy", metric, prog_bar=True, batch_size=len(batch["labels"]))

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def load_backbone(name: str) -> PreTrainedModel:
    """The pretrained model `name` without a pooler, in float32 and in train mode.

    A pooler would be a layer that the loss does not reach: parameters without a gradient.
    `from_pretrained` returns the file's type and eval mode, in which a fit has no dropout.
    """
    path = model_path(name)
    config = AutoConfig.from_pretrained(path)
    if getattr(config, "is_encoder_decoder", False):
        raise MisconfigurationException(
            f"{name} is an encoder-decoder model; TextClassifier takes an encoder or a decoder"
        )
    with torch.device("meta"):  # the class that AutoModel chooses, without its weights
        architecture = type(AutoModel.from_config(config))
    options: dict[str, Any] = {}
    if "add_pooling_layer" in inspect.signature(architecture).parameters:
        options["add_pooling_layer"] = False
    with quiet_loading():
        backbone, info = AutoModel.from_pretrained(path, output_loading_info=True, **options)
    if info["missing_keys"]:
        rank_zero_warn(
            f"{name} has no weights for {', '.join(sorted(info['missing_keys']))}: they start at "
            "random"
        )
    model: PreTrainedModel = backbone.float().train()
    model.config.name_or_path = name  # not the folder in this machine's cache
    return model


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without the bar over the weights and the list of those that the model has no layer for."""
    before = transformers.logging.get_verbosity()
    bar = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        if bar:
            transformers.logging.enable_progress_bar()
