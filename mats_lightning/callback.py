"""MaTSStatsCallback: when to capture, when to save, how to resume."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from mats_lightning.batches import (
    BatchSizeFn,
    LossReduction,
    MaskFn,
    attention_mask,
    batch_size,
    check_loss_reduction,
    loss_divisor,
)
from mats_lightning.capture import Capture
from mats_lightning.names import plain_name
from mats_lightning.sampled import (
    Fisher,
    LogitsFn,
    capture_sampled,
    choose_fisher,
    fisher_info,
    unchanged_buffers,
)
from mats_lightning.sidecar import describe, save_statistics, sidecar_path
from mats_lightning.statistics import KINDS, Coverage, Statistics, find_coverage


class MaTSStatsCallback(Callback):
    """Accumulates curvature statistics in the last epochs of a fit; saves them with checkpoints.

    Add it to `Trainer(callbacks=[...])`. Beside every checkpoint that is saved, whatever saves
    it, lies then `<checkpoint>.mats.safetensors` (see `mats_lightning.sidecar`), the sums of the
    last `last_n_epochs` epochs at that moment; it goes when the checkpoint goes.

    The window: with `max_epochs` alone, the epochs from `max_epochs - last_n_epochs` on. When
    the end is not known beforehand (early stopping, `max_steps`, `max_time`) or a checkpoint is
    chosen by a monitored value, every epoch is captured and the last ones are kept.

    The loss is a sum or mean of its examples' own losses, and the first axis of what a layer is
    given is the examples'. Where the callback sees that a layer's statistics would be wrong, it
    leaves them out and the sidecar's coverage says why.

    Arguments:
        last_n_epochs: epochs to keep.
        statistics: any of "diagonal_fisher", "gram", "kfac", "block_fisher".
        loss_reduction: how the training loss is reduced: "mean" over examples, "sum",
            "token_mean" (over labels that are not -100), "next_token_mean" (over labels[:, 1:]
            that are not -100), or a function of the batch that gives what the loss was divided by.
        mask_fn: batch -> (N, R) bool, true where a position counts, or None. The default takes a
            Hugging Face batch's "attention_mask". It applies to layers whose input has that
            leading shape.
        batch_size_fn: batch -> number of examples, for batches whose tensors do not agree.
        max_factor_size: larger matrices (a vocabulary's, say) are left out, and named.
        fisher: "empirical", with the labels of the data, or "sampled", with labels drawn from the
            model's own prediction (see `mats_lightning.sampled`): a forward and backward pass more
            for each captured batch, in training mode as the training step is.
        logits_fn, seed, draws: with fisher="sampled", as in collect_statistics; logits_fn is
            called with the LightningModule, and loss_reduction has no influence.

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
        fisher: Fisher = "empirical",
        logits_fn: LogitsFn | None = None,
        seed: int = 0,
        draws: int = 1,
    ) -> None:
        if last_n_epochs < 1:
            raise MisconfigurationException(f"last_n_epochs={last_n_epochs}; it must be 1 or more")
        kinds = (statistics,) if isinstance(statistics, str) else tuple(statistics)
        try:
            find_coverage(nn.Module(), kinds, max_factor_size)
            check_loss_reduction(loss_reduction)
            self.sampling = choose_fisher(fisher, logits_fn, seed, draws)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        self.last_n_epochs = last_n_epochs
        self.kinds = kinds
        self.loss_reduction = loss_reduction
        self.mask_fn = mask_fn
        self.batch_size_fn = batch_size_fn
        self.max_factor_size = max_factor_size
        self._coverage: Coverage | None = None
        self._epochs: dict[int, Statistics] = {}
        self._capture: Capture | None = None
        self._hooks = ExitStack()
        self._notes: list[str] = []
        self._restored: dict[str, Any] | None = None  # state of a checkpoint, not yet in use
        self._first_epoch: int | None = 0  # of the window; None: the last ones are kept

    @property
    def statistics(self) -> Statistics:
        """What has been accumulated so far: the sum over the epochs that are kept."""
        total = Statistics()
        for epoch in sorted(self._epochs):
            if self._coverage is not None:  # a later epoch may have shown a sum to be inexact
                self._coverage.remove_dropped(self._epochs[epoch])
            total = total + self._epochs[epoch]
        return total

    # -- the fit -----------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _refuse_unsupported(trainer, pl_module)
        self._coverage, self._capture = None, None
        self._epochs, self._notes, self._restored = {}, [], None
        self._first_epoch = self._window(trainer)
        if averaging := [c for c in trainer.callbacks if isinstance(c, _AVERAGING)]:  # type: ignore[attr-defined]
            self._note(
                f"{type(averaging[0]).__name__} saves averaged weights; the statistics are taken"
                " at the weights that train"
            )
        _follow_checkpoints(trainer, self)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        coverage = find_coverage(pl_module, self.kinds, self.max_factor_size)
        if not coverage.modules:
            raise MisconfigurationException(
                "MaTSStatsCallback finds no layer that it covers with a trainable parameter in"
                f" {type(pl_module).__name__}:\n{coverage.summary()}"
            )
        self._coverage = coverage
        if self._restored is not None:
            self._restore(self._restored, coverage, pl_module.device)
        sets = 1 if self._first_epoch is not None else self.last_n_epochs
        window = (
            f"from epoch {self._first_epoch} on"
            if self._first_epoch is not None
            else f"in every epoch, the last {self.last_n_epochs} kept, since the end of this fit"
            " is not known beforehand or its checkpoint is chosen by a monitored value"
        )
        rank_zero_info(
            f"MaTSStatsCallback captures {window}; at most"
            f" {sets * coverage.bytes() / 1e6:.0f} MB of sums:\n{coverage.summary()}"
        )

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._hooks.close()
        epoch = trainer.current_epoch
        if self._first_epoch is not None and epoch < self._first_epoch:
            return
        capture = self._capture_of(trainer, pl_module, epoch)
        examples = self.batch_size_fn(batch) if self.batch_size_fn else batch_size(batch)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        mask = (self.mask_fn or attention_mask)(batch)
        if self.sampling is not None:
            with (
                isolate_rng(),
                unchanged_buffers(pl_module),
                trainer.precision_plugin.train_step_context(),
            ):
                counted = capture_sampled(
                    capture,
                    pl_module,
                    batch,
                    self.sampling.logits_fn,
                    self.sampling.generators(trainer.global_rank, epoch, batch_idx),
                    examples=examples,
                    mask=mask,
                    loss_scale=None if scaler is None else scaler.get_scale(),
                )
            if not counted:
                self._note_uncounted(epoch)
            return
        scale = loss_divisor(self.loss_reduction, batch, examples)
        scale *= trainer.accumulate_grad_batches  # Lightning divides each loss of a window by it
        if scaler is not None:
            scale /= scaler.get_scale()
        self._hooks.enter_context(capture.batch(examples, scale, mask, defer=scaler is not None))

    @override
    def on_before_backward(self, *args: Any, **kwargs: Any) -> None:
        if self._capture is not None:
            self._capture.start_backward()

    @override
    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._capture is not None and self._capture.active and not self._capture.finish():
            self._note_uncounted(trainer.current_epoch)
        self._hooks.close()

    @override
    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._hooks.close()  # a training step without a loss has no backward pass

    @override
    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        self._hooks.close()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._hooks.close()

    # -- resume ------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives alone: it is loaded with weights_only=True."""
        rows = self._coverage.rows.values() if self._coverage else ()
        return {
            "kinds": list(self.kinds),
            "fisher": fisher_info(self.sampling),
            "epochs": {key: dict(vars(statistics)) for key, statistics in self._epochs.items()},
            "rows": {r.name: {"statistics": r.statistics, "reason": r.reason} for r in rows},
            "notes": list(self._notes),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if set(state_dict["kinds"]) != set(self.kinds):
            raise MisconfigurationException(
                f"the checkpoint's statistics are {state_dict['kinds']}, this callback takes"
                f" {list(self.kinds)}: resume with the same choice"
            )
        fisher = fisher_info(self.sampling)
        if state_dict["fisher"] != fisher:
            raise MisconfigurationException(
                f"the checkpoint's statistics are of {state_dict['fisher']}, this callback takes"
                f" {fisher}: resume with the same choice"
            )
        self._restored = state_dict

    def _restore(self, state: dict[str, Any], coverage: Coverage, device: torch.device) -> None:
        for key, fields in state["epochs"].items():
            if min(fields["info"]["epochs"]) < (self._first_epoch or 0):
                continue  # before the window of this fit
            self._epochs[key] = Statistics(**fields)
            self._epochs[key].tensors = {
                name: tensor.to(device) for name, tensor in fields["tensors"].items()
            }
        for name, row in state["rows"].items():
            if name in coverage.rows:
                coverage.rows[name].statistics = list(row["statistics"])
                coverage.rows[name].reason = row["reason"]
        self._notes = list(state["notes"])

    # -- decisions ---------------------------------------------------------------------------

    def _capture_of(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int
    ) -> Capture:
        """The capture into this epoch's sums; what is before the window goes."""
        assert self._coverage is not None
        if self._restored is not None:
            self._restored = None
            if epoch in self._captured_epochs() and not _resumes_exactly(trainer):
                self._note(
                    f"resumed in the middle of epoch {epoch} with a data loader that is not"
                    " stateful, or has no length: some rows may count twice, others not at all"
                )
        key, start = self._first_epoch, self._first_epoch
        if key is None or start is None:
            key, start = epoch, epoch - self.last_n_epochs + 1
        if key not in self._epochs:
            info = {"epochs": [epoch], "skipped_batches": 0, **fisher_info(self.sampling)}
            self._epochs[key] = Statistics({}, info=info)
            old = [k for k, s in self._epochs.items() if min(s.info["epochs"]) < start]
            for k in old:
                del self._epochs[k]
        statistics = self._epochs[key]
        if epoch not in statistics.info["epochs"]:
            statistics.info["epochs"].append(epoch)
        if self._capture is None or self._capture.statistics is not statistics:
            self._capture = Capture(self._coverage, statistics)
            if any(isinstance(m, _BatchNorm) and m.training for m in pl_module.modules()):
                self._note(
                    "batch normalisation in training mode couples the examples of a batch:"
                    " statistics of the layers before it are not exact"
                )
        return self._capture

    def _captured_epochs(self) -> list[int]:
        return sorted({e for sums in self._epochs.values() for e in sums.info["epochs"]})

    def _window(self, trainer: pl.Trainer) -> int | None:
        """The first epoch to capture, or None when the last epoch is not known beforehand."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        unknown_end = (
            trainer.max_epochs in (None, -1)
            or trainer.max_steps != -1
            or any(isinstance(c, EarlyStopping | Timer) for c in callbacks)
            or any(isinstance(c, ModelCheckpoint) and c.monitor is not None for c in callbacks)
        )
        if unknown_end:
            return None
        assert trainer.max_epochs is not None
        return max(0, trainer.max_epochs - self.last_n_epochs)

    def _note(self, note: str) -> None:
        if note not in self._notes:
            self._notes.append(note)
            rank_zero_warn(f"MaTSStatsCallback: {note}; the sidecar says so too")

    def _note_uncounted(self, epoch: int) -> None:
        self._note(
            f"no gradient came to a covered layer in a batch of epoch {epoch},"
            " so it is not counted (was the model compiled before this epoch?)"
        )

    # -- checkpoints -------------------------------------------------------------------------

    def save_beside(self, trainer: pl.Trainer, checkpoint: dict[str, Any], path: Path) -> None:
        """Write the sidecar of a checkpoint that has just been saved."""
        if self._coverage is None:
            return  # stopped before the fit began
        if trainer.ckpt_path is not None and trainer.state.fn != TrainerFn.FITTING:
            sidecar_path(path).unlink(missing_ok=True)
            rank_zero_warn(
                f"MaTSStatsCallback: no sidecar is written beside {path}: since the fit its weights"
                f" were loaded from {trainer.ckpt_path}; use that checkpoint and its sidecar"
            )
            return
        statistics = self.statistics
        weights = {plain_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
        info = describe(
            self._coverage,
            statistics,
            weights,
            loss_reduction="sum" if self.sampling else self.loss_reduction,
            mask=self.mask_fn or attention_mask,
            mode="train",
            kinds=list(self.kinds),
            epochs=self._captured_epochs(),
            global_step=trainer.global_step,
            skipped_batches=sum(s.info["skipped_batches"] for s in self._epochs.values()),
            notes=list(self._notes),
            **fisher_info(self.sampling),
        )
        try:
            save_statistics(replace(statistics, info=info), sidecar_path(path))
        except ValueError as error:  # sums that are not finite: no sidecar is better than these
            sidecar_path(path).unlink(missing_ok=True)
            rank_zero_warn(f"MaTSStatsCallback: no sidecar is written: {error}")


_AVERAGING = (StochasticWeightAveraging, WeightAveraging)


def _refuse_unsupported(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raises MisconfigurationException where the statistics would be wrong."""
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"MaTSStatsCallback works on a single device so far, not with"
            f" {type(trainer.strategy).__name__}; train without it and take the statistics"
            " with collect_statistics(...) in one process"
        )
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            "MaTSStatsCallback needs automatic optimization: with manual_backward it cannot know"
            " the scale of each loss; take the statistics with collect_statistics(...) instead"
        )


def _resumes_exactly(trainer: pl.Trainer) -> bool:
    """Whether Lightning can put the training data loader back to the middle of an epoch.

    It must know its place; of one without a length Lightning reads a batch ahead, which is lost.
    """
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    return all(
        hasattr(x, "state_dict") and hasattr(x, "load_state_dict") and sized_len(x) is not None
        for x in loaders
    )


def _follow_checkpoints(trainer: pl.Trainer, callback: MaTSStatsCallback) -> None:
    """Let a sidecar follow every checkpoint that the trainer's strategy saves or removes.

    No callback hook knows the path, and none runs with save_weights_only, so the two methods of
    the strategy are wrapped. They stay wrapped after the fit: `trainer.save_checkpoint` is
    usually called then.
    """
    strategy = trainer.strategy
    save: Callable[..., None] = strategy.save_checkpoint
    remove: Callable[..., None] = strategy.remove_checkpoint
    save = getattr(save, "unwrapped", save)  # of an earlier fit
    remove = getattr(remove, "unwrapped", remove)

    def save_checkpoint(
        checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        save(checkpoint, filepath, storage_options=storage_options)
        if "://" in str(filepath):
            rank_zero_warn(
                f"MaTSStatsCallback: no sidecar is written beside {filepath}: it is not a local"
                " path; save the checkpoint into a local folder and copy both files"
            )
            return
        callback.save_beside(trainer, checkpoint, Path(filepath))

    def remove_checkpoint(filepath: str | Path) -> None:
        remove(filepath)
        if "://" not in str(filepath):
            sidecar_path(filepath).unlink(missing_ok=True)

    save_checkpoint.unwrapped = save  # type: ignore[attr-defined]
    remove_checkpoint.unwrapped = remove  # type: ignore[attr-defined]
    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    strategy.remove_checkpoint = remove_checkpoint  # type: ignore[method-assign]
