"""FitCapture: what is captured of a fit, what it resumes from, what goes beside its checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed import ProcessGroup

from mats_lightning.accumulation import Accumulation
from mats_lightning.batch_capture import BatchCapture, BatchOptions
from mats_lightning.batches import MaskFn, default_masks
from mats_lightning.model_checks import check_loss_modules
from mats_lightning.names import plain_name
from mats_lightning.sampled import fisher_info
from mats_lightning.sidecar import describe, name_of
from mats_lightning.statistics import Statistics, find_coverage
from mats_lightning.statistics.digest import digest
from mats_lightning.training import averaging_callback, in_middle_of, ran_out


@dataclass(frozen=True)
class FitOptions:
    """What is captured of a fit; the arguments of MaTSStatsCallback."""

    last_n_epochs: int
    kinds: tuple[str, ...]
    mask_fn: MaskFn | None
    max_factor_size: int
    weight_sharing: str
    adapted_weights: bool
    device: torch.device | None
    batches: BatchOptions


class FitCapture:
    """What a fit captures of the parameters that train when this is made.

    Arguments:
        options: see there.
        trainer: that fits.
        pl_module: that is fitted.
        first: epoch to capture, None where the last ones are not known (`training.first_epoch`).
        restored: the `state` of the checkpoint that the fit resumes from, if it is not in use yet.
        group: the ranks, where there are several.
        before: this fit's, until other parameters trained.

    Raises MisconfigurationException where nothing is covered, or `restored` was taken otherwise.
    """

    def __init__(
        self,
        options: FitOptions,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        first: int | None,
        restored: Mapping[str, Any] | None,
        group: ProcessGroup | None,
        before: "FitCapture | None" = None,
    ) -> None:
        self._options, self._restored, self._group = options, restored, group
        self._training = _which_train(pl_module)
        self._masks = options.mask_fn or default_masks(pl_module)
        self._ended: dict[str, str] | None = None  # digest of the weights when the fit ended
        self._training_ended = self._interrupted = False
        self._ran_out: int | None = None  # the epoch that its data loader has ended
        coverage = find_coverage(
            pl_module,
            options.kinds,
            options.max_factor_size,
            options.weight_sharing,
            options.adapted_weights,
            options.device,
        )
        if restored is not None:
            self._check_same(restored["choices"])
        if not coverage.modules:
            raise MisconfigurationException(
                "MaTSStatsCallback finds no layer that it covers with a trainable parameter in"
                f" {type(pl_module).__name__}:\n{coverage.summary()}"
            )
        if options.batches.sampling is None:
            try:
                check_loss_modules(pl_module, options.batches.loss_reduction)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
        self._sums = Accumulation(coverage, options.last_n_epochs, first)
        if before is not None and before._sums.epochs:
            self._note(
                f"the parameters that train, or their layers, have changed in epoch"
                f" {trainer.current_epoch}: what was captured before is left out"
            )
        if averaging := averaging_callback(trainer):
            self._note(
                f"{type(averaging).__name__} saves averaged weights; the statistics are taken"
                " at the weights that train"
            )
        resumed: list[int] = []  # the epochs that had been captured in a checkpoint
        # else they are frozen still, and will train before the first batch that is captured
        if restored is not None and restored["rows"].keys() == coverage.rows.keys():
            rank, size = trainer.global_rank, trainer.world_size
            self._sums.restore(restored, options.device or pl_module.device, rank, size)
            sums = restored["sums"].values()
            resumed = [epoch for fields in sums for epoch in fields["info"]["epochs"]]
            self._restored = None
        self._batches = BatchCapture(
            options.batches, self._sums, self._masks, resumed, note=self._note
        )
        if first is not None:
            records, window = 1, f"from epoch {first} on"
        else:
            records = options.last_n_epochs + 1  # those kept, and in a batch that of a new epoch
            window = (
                f"in every epoch, the last {options.last_n_epochs} kept, since the end of this fit"
                " is not known beforehand or its checkpoint is chosen by a monitored value"
            )
        rank_zero_info(
            f"MaTSStatsCallback captures {window}; at most"
            f" {records * coverage.bytes() / 1e6:.0f} MB of sums:\n{coverage.summary()}"
        )

    @property
    def statistics(self) -> Statistics:
        """Of this process: the sum over the epochs that are kept."""
        return self._sums.statistics

    # -- batches -----------------------------------------------------------------------------

    def start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> "FitCapture":
        """A batch; gives what captures it, another one where other parameters train now."""
        if self._training != _which_train(pl_module):
            now = FitCapture(
                self._options,
                trainer,
                pl_module,
                self._sums.first,
                self._restored,
                self._group,
                before=self,
            )
            return now.start(trainer, pl_module, batch, batch_idx)
        self._batches.start(trainer, pl_module, batch, batch_idx)
        self._drop_restored()
        return self

    def _drop_restored(self) -> None:
        """Where a batch counts before the parameters train that a checkpoint's sums are of."""
        if self._restored is None or not self._sums.sums:
            return
        differing = sorted(self._restored["rows"].keys() ^ self._sums.coverage.rows.keys())
        self._restored = None
        self._note(
            "the statistics of the checkpoint that the fit resumes from are left out: they are of"
            f" other parameters, '{differing[0]}' trains in one of the two fits alone"
        )

    def start_backward(self, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self._batches.start_backward(pl_module, loss)

    def end_backward(self, epoch: int) -> None:
        self._batches.end_backward(epoch)

    def end_batch(self, pl_module: pl.LightningModule) -> None:
        self._batches.end(pl_module)

    def close(self) -> None:
        """Whatever ended the batch."""
        self._batches.close()

    def interrupt(self) -> None:
        """An exception ends the fit."""
        self._interrupted = True
        self.close()

    def end_epoch(self, trainer: pl.Trainer) -> None:
        """Its batches are all through."""
        self.close()  # the module's on_train_batch_start may have ended the epoch
        if ran_out(trainer):
            self._ran_out = trainer.current_epoch

    def end_training(self, trainer: pl.Trainer) -> None:
        """No epoch comes any more. Collective."""
        self._training_ended = True
        if self._sums.any_examples(self._group):
            return
        first = self._sums.first or 0
        if trainer.current_epoch > first:  # it is the next one by now
            why = (
                "no batch of the epochs to capture had a finite loss whose gradient came to a"
                " covered layer"
            )
        else:
            why = f"the fit ended before epoch {first}, from which on it captures"
        self._note(f"nothing was captured: {why}")

    def end(self, pl_module: pl.LightningModule) -> None:
        """The weights are as the fit leaves them."""
        self._ended = self._digest(pl_module)

    @property
    def cost(self) -> str:
        return str(self._batches.cost)

    def _note(self, *notes: str) -> None:
        for note in self._sums.note(notes):
            rank_zero_warn(f"MaTSStatsCallback: {note}; the sidecar says so too")

    # -- checkpoints and resume --------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors and primitives alone, since it is loaded with weights_only=True."""
        return self._state(self._sums)

    def _state(self, sums: Accumulation) -> dict[str, Any]:
        return {"choices": self._choices, **sums.state()}

    @property
    def _choices(self) -> dict[str, Any]:
        """What must not change where sums are to be added to."""
        options = self._options
        return {
            "statistics": sorted(options.kinds),
            "fisher": fisher_info(options.batches.sampling),
            "loss_reduction": name_of(options.batches.loss_reduction),
            "loss_scale": name_of(options.batches.loss_scale),
            "mask_fn": name_of(self._masks),
            "weight_sharing": options.weight_sharing,
            "max_factor_size": options.max_factor_size,
            "adapted_weights": options.adapted_weights,
        }

    def _check_same(self, restored: Mapping[str, Any]) -> None:
        for name, choice in self._choices.items():
            if restored[name] != choice:
                raise MisconfigurationException(
                    f"the checkpoint's statistics were taken with {name}={restored[name]!r}, and"
                    f" this callback has {choice!r}: resume with the same choice"
                )

    def _digest(self, pl_module: pl.LightningModule) -> dict[str, str]:
        """Of the weights that the statistics are of, as they are now."""
        found = {plain_name(name): p for name, p in pl_module.named_parameters()}
        return digest({name: found[name] for name in self._sums.coverage.rows if name in found})

    def of_checkpoint(
        self, trainer: pl.Trainer, checkpoint: dict[str, Any], state_key: str
    ) -> Statistics | None:
        """What belongs into its sidecar, on rank 0; its state becomes that of all ranks.

        Collective. None, with a warning, where the weights are not those of the statistics, or
        ranks cannot be asked.
        """
        if self._ended is not None and self._digest(trainer.lightning_module) != self._ended:
            rank_zero_warn(
                "MaTSStatsCallback: no sidecar is written: since the fit that the statistics are of"
                " the weights have changed (by a checkpoint that was loaded, or another fit with"
                " this callback); save the checkpoint before"
            )
            return None
        everything: Accumulation | None
        sums = self._sums
        if (part := self._batches.partial) is not None:
            self._note(
                f"the checkpoint of step {trainer.global_step} was saved in the middle of a"
                " backward pass: it is without the sums that a part of this batch had been added to"
            )
            sums = replace(sums, sums=dict(sums.sums))
            sums.forget(part)
        if incomplete := self._group is not None and self._interrupted:
            self._note(
                "a checkpoint was saved because of an exception, with several devices: it has no"
                " sidecar, and a fit that resumes from it goes on without the sums before it"
            )
            everything = replace(sums, sums={}, examples=0.0)
        else:
            everything = sums.of_all_ranks(self._group)
        if everything is None:
            return None
        self._note(*everything.notes)
        if state_key in checkpoint.get("callbacks", {}):
            checkpoint["callbacks"][state_key] = self._state(everything)
        return None if incomplete else self._described(everything, trainer, checkpoint)

    def _described(
        self, sums: Accumulation, trainer: pl.Trainer, checkpoint: Mapping[str, Any]
    ) -> Statistics:
        """The sums of all ranks, as they go into a sidecar."""
        statistics, options, notes = sums.statistics, self._options.batches, sums.notes
        in_middle = in_middle_of(sums.epoch, trainer, self._training_ended)
        if sums.examples and in_middle and sums.epoch != self._ran_out:
            part = f"epoch {sums.epoch} had not ended, {sums.examples:.0f} rows of it count"
            notes = [*notes, part]
        info = describe(
            sums.coverage,
            statistics,
            {plain_name(name): tensor for name, tensor in checkpoint["state_dict"].items()},
            loss_reduction="sum" if options.sampling else options.loss_reduction,
            mask=self._masks,
            mode="train",
            kinds=list(self._options.kinds),
            epochs=sums.epochs,
            global_step=trainer.global_step,
            every_n_batches=options.every_n_batches,
            max_examples=options.max_examples,
            skipped_batches=sums.skipped_batches,
            notes=notes,
            **fisher_info(options.sampling),
        )
        return replace(statistics, info=info)


def _which_train(pl_module: pl.LightningModule) -> list[tuple[int, int]]:
    """Layers and parameters by identity, since one may be replaced by another of its name.

    What does not train may come and go, as a teacher that is copied in each step does.
    """
    return [
        (id(module), id(parameter))
        for module in pl_module.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad
    ]
