"""MaTSStatsCallback: its arguments, and which hook does what."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from mats_lightning import ranks
from mats_lightning.batch_capture import BatchOptions
from mats_lightning.batches import BatchSizeFn, LossReduction, MaskFn, check_loss_reduction
from mats_lightning.fit_capture import FitCapture, FitOptions
from mats_lightning.sampled import Fisher, LogitsFn, choose_fisher
from mats_lightning.saving import follow_checkpoints
from mats_lightning.statistics import KINDS, Statistics, check_kinds
from mats_lightning.statistics.record import GRADIENT
from mats_lightning.training import first_epoch, refuse_unsupported

FACTOR_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}


class MaTSStatsCallback(Callback):
    """Accumulates curvature statistics in the last epochs of a fit; saves them with checkpoints.

    Add it to `Trainer(callbacks=[...])`. Beside every checkpoint that is saved, whatever saves
    it, lies then `<checkpoint>.mats.safetensors` (see `mats_lightning.sidecar`), the sums of the
    last `last_n_epochs` epochs at that moment; it goes when the checkpoint goes.

    The window: with `max_epochs` alone, the epochs from `max_epochs - last_n_epochs` on. When
    the end is not known beforehand (early stopping, `max_steps`, `max_time`) or a checkpoint is
    chosen by a monitored value, every epoch is captured and the last ones that have examples are
    kept. The epoch that StochasticWeightAveraging adds for batch normalisation is not captured.

    Layers that are unfrozen within the fit (by Lightning's BackboneFinetuning, say) are captured
    from there on, and what was captured before is left out. So where parts of a model are frozen
    and unfrozen in turn, the sums are of the batches since the latest change alone. After the fit
    a sidecar is written for the weights that it ended with alone.

    The loss is a sum or mean of its examples' own losses, and the first axis of what a layer is
    given is the examples'. Where the callback sees that a layer's statistics would be wrong, it
    leaves them out and the sidecar's coverage says why.

    Several devices (`strategy="ddp"` in all its forms): each captures its own rows, and whenever
    a checkpoint is saved the sums of all are added up on rank 0, which writes the sidecar. Rows
    that Lightning's DistributedSampler repeats, so that all devices have equally many, count as
    often as they are trained on. A checkpoint that is saved because of an exception has neither
    sums nor sidecar there, since a device that failed cannot be asked. After a fit with
    "ddp_spawn" or "ddp_notebook" the processes that had the sums are gone: the checkpoints saved
    within the fit have sidecars, `trainer.save_checkpoint` after it writes none.

    Manual optimization: give `loss_scale`. The first `manual_backward` of a batch is captured;
    with several optimizers these are the statistics of the first one's loss.

    Compiled models run without the compiler in the batches that are captured: it does not see
    hooks that come and go.

    Arguments:
        last_n_epochs: epochs to keep.
        statistics: any of "diagonal_fisher", "gram", "kfac", "block_fisher".
        loss_reduction: how the training loss is reduced: "mean" over examples, "sum",
            "token_mean" (over labels that are not -100), "next_token_mean" (over labels[:, 1:]
            that are not -100), or a function of the batch that gives what the loss was divided by.
        mask_fn: batch -> (N, R) bool, true where a position counts, or None; or {regular
            expression: such a mask}, for the modules whose names have it. A mask applies to
            layers whose input has that leading shape. The default takes a Hugging Face batch's
            "attention_mask", and the decoder's too for an encoder-decoder model.
        batch_size_fn: batch -> number of examples, for batches whose tensors do not agree, and for
            steps that take other rows than the batch's. Of a CombinedLoader's batch, the rows that
            stand at one place of all its loaders count as one example.
        max_factor_size: a larger A or G (a vocabulary's, say) is cut into equal blocks along its
            diagonal, or left out where its size has no divisor for it (a prime). A longer vector
            has no block Fisher. What is left out is named.
        weight_sharing: K-FAC of layers that are used at several positions: "expand" counts each
            position as an example (exact for losses that are sums over positions), "reduce"
            takes an example's mean input and summed gradient (exact for a linear layer whose
            outputs are averaged).
        adapted_weights: also A and G of the frozen weights that peft's LoRA layers sit on.
        fisher: "empirical", with the labels of the data, or "sampled", with labels drawn from the
            model's own prediction (see `mats_lightning.sampled`): a forward and backward pass more
            for each captured batch, in training mode as the training step is.
        logits_fn, seed, draws: with fisher="sampled", as in collect_statistics; logits_fn is
            called with the LightningModule, and the loss and its scale have no influence.
        device: where the sums are kept; the default is where the parameters are. "cpu" leaves the
            memory of an accelerator to the training, for a copy of each sum in each batch.
        loss_scale: what the reduced loss (see loss_reduction) was multiplied by before it was
            given to Lightning, a positive number or a function of the batch that gives one: 1/4
            where a training step divides its loss by 4. What Lightning itself multiplies by,
            for accumulate_grad_batches and a gradient scaler, is known and does not belong here.
            None is 1 with automatic optimization; with manual optimization it must be given,
            1.0 where `manual_backward` gets the loss as it is.
        every_n_batches: capture the first batch of each captured epoch, and every n-th one from
            there. The others run as if there were no callback.
        max_examples: stop in each captured epoch after the batch in which this number is
            reached, on all devices together.
        sidecar: "all": beside every checkpoint. "last": only beside the latest one; when a
            sidecar has been written, the one that this fit wrote before goes, also that of a
            checkpoint that stays, be it the best one. For runs that save many checkpoints.
        factor_dtype: of A, G and block Fishers in the sidecar: "bfloat16" halves them, and their
            small eigenvalues are lost. The default is that of the sums, float32 at least.

    Raises MisconfigurationException for arguments that do not exist, and at setup for ways of
    training in which the statistics would be wrong.
    """

    def __init__(
        self,
        last_n_epochs: int = 1,
        statistics: Sequence[str] = KINDS,
        loss_reduction: LossReduction = "mean",
        mask_fn: MaskFn | None = None,
        batch_size_fn: BatchSizeFn | None = None,
        max_factor_size: int = 8192,
        weight_sharing: str = "expand",
        adapted_weights: bool = False,
        fisher: Fisher = "empirical",
        logits_fn: LogitsFn | None = None,
        seed: int = 0,
        draws: int = 1,
        device: torch.device | str | None = None,
        loss_scale: float | Callable[[Any], float] | None = None,
        every_n_batches: int = 1,
        max_examples: int | None = None,
        sidecar: Literal["all", "last"] = "all",
        factor_dtype: Literal["float32", "bfloat16"] | None = None,
    ) -> None:
        if last_n_epochs < 1:
            raise MisconfigurationException(f"last_n_epochs={last_n_epochs}; it must be 1 or more")
        if max_factor_size < 1:
            raise MisconfigurationException(
                f"max_factor_size={max_factor_size}; it must be 1 or more"
            )
        if sidecar not in ("all", "last"):
            raise MisconfigurationException(f"sidecar={sidecar!r}; choose from 'all', 'last'")
        if factor_dtype not in FACTOR_DTYPES:
            raise MisconfigurationException(
                f"factor_dtype={factor_dtype!r}; choose from 'float32', 'bfloat16', None"
            )
        if GRADIENT in (statistics, *statistics):
            raise MisconfigurationException(
                "the gradient is that of fixed weights, and here they train: take it afterwards,"
                ' with collect_statistics(..., statistics=("kfac", "gradient"))'
            )
        try:
            kinds = check_kinds(statistics, weight_sharing)
            check_loss_reduction(loss_reduction)
            sampling = choose_fisher(fisher, logits_fn, seed, draws)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.options = FitOptions(
            last_n_epochs=int(last_n_epochs),
            kinds=kinds,
            mask_fn=mask_fn,
            max_factor_size=int(max_factor_size),
            weight_sharing=weight_sharing,
            adapted_weights=adapted_weights,
            device=None if device is None else torch.device(device),
            batches=BatchOptions(
                loss_reduction=loss_reduction,
                loss_scale=loss_scale,
                batch_size_fn=batch_size_fn,
                sampling=sampling,
                every_n_batches=int(every_n_batches),
                max_examples=None if max_examples is None else int(max_examples),
            ),
        )
        self.sidecar = sidecar
        self.factor_dtype = FACTOR_DTYPES[factor_dtype]
        self._first: int | None = None  # epoch to capture, from setup on
        self._fit: FitCapture | None = None  # from on_fit_start on
        self._restored: dict[str, Any] | None = None  # state of a checkpoint, until then
        self._group: ProcessGroup | None = None  # the ranks, where there are several

    @property
    def statistics(self) -> Statistics:
        """What this process has accumulated so far: the sum over the epochs that are kept."""
        return Statistics() if self._fit is None else self._fit.statistics

    # -- the fit -----------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        scale_is_known = self.options.batches.scale_is_known
        refuse_unsupported(trainer, pl_module, scale_is_known=scale_is_known)
        self._first = first_epoch(trainer, self.options.last_n_epochs)
        self._fit, self._restored = None, None
        self._group = ranks.new_group()
        of_checkpoint = partial(self._of_checkpoint, trainer)
        follow_checkpoints(trainer, of_checkpoint, self.sidecar == "last", self.factor_dtype)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._fit = FitCapture(
            self.options, trainer, pl_module, self._first, self._restored, self._group
        )
        self._restored = None

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._fit is not None:
            self._fit = self._fit.start(trainer, pl_module, batch, batch_idx)

    @override
    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        if self._fit is not None:
            self._fit.start_backward(pl_module, loss)

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:
            self._fit.end_backward(trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        if self._fit is not None:
            self._fit.end_batch(pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:
            self._fit.end_epoch(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:
            self._fit.end_training(trainer)
            where = " on rank 0" if trainer.world_size > 1 else ""
            rank_zero_info(f"statistics{where}: {self._fit.cost}")

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._fit is not None:
            self._fit.end(pl_module)

    @override
    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        if self._fit is not None:
            self._fit.interrupt()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._fit is not None:
            self._fit.close()

    # -- checkpoints -------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Of this process; a checkpoint that is saved gets that of all devices."""
        return {} if self._fit is None else self._fit.state()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict

    def _of_checkpoint(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> Statistics | None:
        """What goes beside it; None where it was saved before the fit began."""
        if self._fit is None:
            return None
        return self._fit.of_checkpoint(trainer, checkpoint, self.state_key)
