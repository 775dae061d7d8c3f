"""BatchCapture: which batches of a fit are captured, and each from its start to its end."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from mats_lightning.accumulation import Accumulation
from mats_lightning.batches import (
    BatchSizeFn,
    LossReduction,
    MaskFn,
    Masks,
    count_examples,
    loss_divisor,
)
from mats_lightning.capture import Capture
from mats_lightning.cost import Cost
from mats_lightning.model_checks import coupling
from mats_lightning.sampled import Sampling, capture_sampled, logits_and_mask, unchanged_buffers
from mats_lightning.statistics import Statistics
from mats_lightning.training import resumes_exactly


@dataclass(frozen=True)
class BatchOptions:
    """What is said of the batches and their loss; the arguments of MaTSStatsCallback."""

    loss_reduction: LossReduction
    loss_scale: float | Callable[[Any], float] | None
    batch_size_fn: BatchSizeFn | None
    sampling: Sampling | None
    every_n_batches: int
    max_examples: int | None

    def __post_init__(self) -> None:
        if self.loss_scale is not None and not callable(self.loss_scale):
            checked_scale(self.loss_scale)
        for name in ("every_n_batches", "max_examples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise MisconfigurationException(f"{name}={number}; it must be 1 or more")

    @property
    def scale_is_known(self) -> bool:
        """In manual optimization, too: drawn labels have a loss of their own."""
        return self.loss_scale is not None or self.sampling is not None


class BatchCapture:
    """Captures batches of a fit into its sums.

    Arguments:
        options: see there.
        fit: the sums.
        masks: of a batch.
        resumed: the epochs that had been captured in the checkpoint that the fit resumes from.
        note: is told what the sidecar is to say, if anything.
    """

    def __init__(
        self,
        options: BatchOptions,
        fit: Accumulation,
        masks: MaskFn,
        resumed: Sequence[int],
        note: Callable[..., None],
    ) -> None:
        self.cost = Cost()
        self._options, self._fit, self._masks, self._note = options, fit, masks, note
        self._resumed = resumed
        self._capture: Capture | None = None
        self._epoch = -1  # that the capture is in
        self._captured = False  # a backward pass of this batch
        self._first_of_several: Capture | None = None  # that knows of it
        self._tried = False  # the options, on a batch
        self._hooks = ExitStack()

    def start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the training step: labels are drawn here, or hooks wait for the step's own."""
        self.close()
        self._captured = False
        wanted = self._wants(trainer, batch_idx)
        if not (wanted or self._tried):
            self._try(trainer, pl_module, batch)
        self._tried = True
        self.cost.start(wanted)
        if not wanted:
            return
        options, capture = self._options, self._capture_of(trainer, pl_module)
        before = capture.statistics.examples
        examples = count_examples(batch, options.batch_size_fn)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        masks = Masks.of(self._masks(batch))
        if (sampling := options.sampling) is not None:
            with _beside_training(trainer, pl_module):
                counted = capture_sampled(
                    capture,
                    pl_module,
                    batch,
                    sampling.logits_fn,
                    sampling.generators(trainer.global_rank, trainer.current_epoch, batch_idx),
                    examples=examples,
                    masks=masks,
                    scaler_scale=None if scaler is None else scaler.get_scale(),
                )
            self._count(capture, before, counted, trainer.current_epoch)
            return
        scale = self._scale(batch, examples)
        scale *= trainer.accumulate_grad_batches  # Lightning divides each loss of a window by it
        if scaler is not None:
            scale /= scaler.get_scale()
        self._hooks.enter_context(capture.batch(examples, scale, masks, defer=scaler is not None))

    def _try(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """What is wrong with the options is to be said in the first batch of a fit, not the last.

        Raises what a batch that is captured would, and leaves the training as it is.
        """
        examples = count_examples(batch, self._options.batch_size_fn)
        masks = Masks.of(self._masks(batch))
        if (sampling := self._options.sampling) is None:
            self._scale(batch, examples)
            return
        with _beside_training(trainer, pl_module), torch.enable_grad():
            logits_and_mask(sampling.logits_fn(pl_module, batch), examples, masks)

    def _scale(self, batch: Any, examples: int) -> float:
        """The gradient of an example's own loss is so many times that of the step's loss."""
        divisor, given = loss_divisor(self._options.loss_reduction, batch, examples), 1.0
        if (scale := self._options.loss_scale) is not None:
            given = checked_scale(scale(batch)) if callable(scale) else scale
        return divisor / given

    def start_backward(self, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Raises MisconfigurationException for losses that their `gradient` weights."""
        if loss.numel() != 1:
            raise MisconfigurationException(
                f"manual_backward is given {loss.numel()} losses at once, and what each of them"
                " counts cannot be told: give it their sum or mean"
            )
        if self._capture is not None:
            self._capture.start_backward(loss)
        if self._captured and not pl_module.automatic_optimization:
            self._is_first_of_several()

    def _is_first_of_several(self) -> None:
        """The backward pass that was captured; others come after it in this batch."""
        self._note("only the first manual_backward of a batch is captured, not those after it")
        if self._capture is not None and self._capture is not self._first_of_several:
            self._first_of_several = self._capture
            self._capture.drop_unreached(
                "it is not in the first manual_backward of a batch, which is the one captured:"
                " take its statistics with collect_statistics"
            )
            self._warn(self._capture)

    def end_backward(self, epoch: int) -> None:
        capture = self._capture
        if capture is not None and capture.active:
            self._captured = True
            before = capture.statistics.examples
            self._count(capture, before, capture.finish(), epoch)
        self._hooks.close()

    def end(self, pl_module: pl.LightningModule) -> None:
        waits = self._capture is not None and self._capture.active
        if waits and not pl_module.automatic_optimization:  # else the step gave no loss
            self._note("a batch without a manual_backward is not counted")
        self.close()
        self.cost.end()

    @property
    def partial(self) -> Statistics | None:
        """Sums that a part of a batch is in, whose backward pass has not ended."""
        capture = self._capture
        return capture.statistics if capture is not None and capture.interrupted else None

    def close(self) -> None:
        """Whatever ended the batch: hooks go, and sums that a part of it is in."""
        self._hooks.close()
        if (part := self.partial) is not None:
            self._fit.forget(part)
            self._capture = None
            self._note(
                "a backward pass was interrupted in the middle of a batch: the sums that a part of"
                " it had been added to are left out"
            )

    def _wants(self, trainer: pl.Trainer, batch_idx: int) -> bool:
        """Whether this batch is captured."""
        if trainer.fit_loop._skip_backward:
            # The epoch that StochasticWeightAveraging adds for batch normalisation: forward alone.
            return False
        options, epoch = self._options, trainer.current_epoch
        if epoch < (self._fit.first or 0) or batch_idx % options.every_n_batches:
            return False
        limit = math.inf if options.max_examples is None else options.max_examples
        return self._fit.examples_in(epoch) < limit / trainer.world_size

    def _capture_of(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Capture:
        """The capture into this epoch's sums."""
        epoch = trainer.current_epoch
        if epoch in self._resumed and not resumes_exactly(trainer):
            self._note(
                f"resumed in the middle of epoch {epoch} with a data loader that is not"
                " stateful, or has no length: some rows may count twice, others not at all"
            )
        self._resumed = []
        begins, statistics = epoch != self._epoch, self._fit.record(epoch)
        self._epoch = epoch
        if self._capture is None or self._capture.statistics is not statistics:
            self._capture = Capture(self._fit.coverage, statistics)
            self._note(*coupling(pl_module))
        elif begins:
            self._capture.begin_epoch()
        return self._capture

    def _count(self, capture: Capture, before: int, counted: bool, epoch: int) -> None:
        """Count the batch's rows, where it has come to the sums; note if nothing was captured."""
        if not counted:
            self._note(
                f"no gradient came to a covered layer in a batch of epoch {epoch}, so it is not"
                " counted"
            )
        self._warn(capture)
        examples, sampling = capture.statistics.examples - before, self._options.sampling
        rows = examples if sampling is None else examples // sampling.draws
        if examples:
            self._fit.count(epoch, rows)
        self.cost.examples += rows

    def _warn(self, capture: Capture) -> None:
        for told in capture.told():
            rank_zero_warn(f"MaTSStatsCallback leaves statistics out. {told}")


@contextmanager
def _beside_training(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """A forward pass as the training step's, of which the training knows nothing."""
    with (
        isolate_rng(),
        unchanged_buffers(pl_module),
        trainer.precision_plugin.train_step_context(),
    ):
        yield


def checked_scale(loss_scale: float) -> float:
    """Raises MisconfigurationException for what no loss can have been multiplied by."""
    if not 0 < loss_scale < math.inf:
        raise MisconfigurationException(
            f"loss_scale={loss_scale}; it must be a positive number, what the loss is multiplied by"
        )
    return float(loss_scale)
