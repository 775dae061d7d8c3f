"""Training a linear head on a pretrained model: what texts and images have in common."""

import inspect
import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
import transformers
from adapters import adapted
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from packages import model_path
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoConfig, AutoModel, PreTrainedModel
from typing_extensions import override

Batch = Mapping[str, Tensor]


class Classifier(L.LightningModule):
    """A pretrained model, a vector for each example of what it gives, and a linear head.

    Trained with the cross-entropy's mean over the batch and AdamW; the learning rate rises
    linearly over the first tenth of the steps and falls linearly to zero over the rest. The metric
    `accuracy` is logged in validation and test.

    With an adapter its parameters and the head alone are trained.

    A subclass says in `pool` what the vector is, and in `width` how long.

    Args:
        num_classes: outputs of the head.
        backbone: a hub id, a local folder, or a package (see packages.py).
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
        backbone: str,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.01,
        head_seed: int = 0,
        adapter: str | None = None,
        adapter_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.backbone: PreTrainedModel | PeftModel = load_backbone(backbone)
        if adapter is not None:  # before the head: its random start is that of all tasks
            self.backbone = adapted(self.backbone, backbone, adapter, adapter_options or {})
        if getattr(self.pretrained.config, "hidden_size", None) is None:
            raise MisconfigurationException(
                f"{backbone} is a {type(self.pretrained).__name__}, whose config has no "
                "hidden_size: expected a transformer"
            )
        self.head = nn.Linear(self.width, num_classes)
        start = torch.Generator().manual_seed(head_seed)
        nn.init.normal_(self.head.weight, std=0.02, generator=start)
        nn.init.zeros_(self.head.bias)
        self.validation_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @property
    def pretrained(self) -> PreTrainedModel:
        """The backbone as transformers knows it, without peft's model around it."""
        inside = self.backbone
        if isinstance(inside, PeftModel):
            model: Any = inside.get_base_model()
            inside = model
        return inside

    @property
    def width(self) -> int:
        """Numbers in the vector of an example."""
        return int(self.pretrained.config.hidden_size)

    @abstractmethod
    def pool(self, batch: Batch) -> Tensor:
        """What the head sees: (batch, width)."""

    @override
    def forward(self, batch: Batch) -> Tensor:
        """The logits (batch, classes); `labels` in the batch are not looked at."""
        logits: Tensor = self.head(self.pool(batch))
        return logits

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self(batch), batch["labels"])

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
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
        return optimizer_and_schedule(self, self.learning_rate, self.weight_decay)


def logits(module: Any, batch: Any) -> Any:
    """A classifier's, as `logits_fn` of collect_statistics and refresh."""
    return module(batch)


def optimizer_and_schedule(
    module: L.LightningModule, learning_rate: float, weight_decay: float
) -> OptimizerLRScheduler:
    """AdamW; the learning rate rises over the first tenth of the trainer's steps, then falls."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    steps = int(module.trainer.estimated_stepping_batches)
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
            f"{name} is an encoder-decoder model; an encoder or a decoder is needed"
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
