"""What the Trainer's way of training means for the statistics, and what is refused."""

import lightning.pytorch as pl
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    XLAStrategy,
)
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature


def refuse_unsupported(
    trainer: pl.Trainer, pl_module: pl.LightningModule, scale_is_known: bool
) -> None:
    """Raises MisconfigurationException where the statistics would be wrong."""
    strategy = trainer.strategy
    other = isinstance(strategy, DeepSpeedStrategy | XLAStrategy)  # although they are DDPStrategies
    if other or not isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        raise MisconfigurationException(
            "MaTSStatsCallback works on one device, and on several with DDPStrategy, not with"
            f" {type(strategy).__name__}; use strategy='ddp', or train without it and take the"
            " statistics with collect_statistics(...) in one process"
        )
    if not pl_module.automatic_optimization and not scale_is_known:
        raise MisconfigurationException(
            "MaTSStatsCallback cannot know what a loss is multiplied by before manual_backward in"
            " manual optimization: pass loss_scale=1.0 if by nothing, the number if by one (1 / n"
            " where it is divided by n), or a function of the batch that gives it"
        )
    if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "MaTSStatsCallback has to see each batch before the training step, and"
            f" {type(pl_module).__name__}.training_step(dataloader_iter) fetches it itself: let it"
            " take `batch`, or take the statistics with collect_statistics(...)"
        )


def first_epoch(trainer: pl.Trainer, last_n_epochs: int) -> int | None:
    """The first epoch to capture, or None when the last epoch is not known beforehand.

    To be asked at setup: StochasticWeightAveraging raises `max_epochs` in on_fit_start, for an
    epoch in which only batch normalisation's averages change.
    """
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
    return max(0, trainer.max_epochs - last_n_epochs)


def in_middle_of(epoch: int, trainer: pl.Trainer, ended: bool) -> bool:
    """Whether it is the latest epoch and not at its last batch, also where training `ended` so."""
    latest = trainer.current_epoch - ended  # it is the next one when training has ended
    return epoch == latest and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def ran_out(trainer: pl.Trainer) -> bool:
    """Whether the data loader ended the epoch that ends now, before as many batches as it has.

    Its length may be a guess, or it resumed from another place than Lightning. No batch was the
    last one to Lightning then.
    """
    return not trainer.fit_loop.epoch_loop.done


def averaging_callback(trainer: pl.Trainer) -> Callback | None:
    """The one that puts averaged weights into the checkpoints, if there is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaging = (StochasticWeightAveraging, WeightAveraging)
    return next((c for c in callbacks if isinstance(c, averaging)), None)


def resumes_exactly(trainer: pl.Trainer) -> bool:
    """Whether Lightning can put the training data loader back to the middle of an epoch.

    It must know its place; of one without a length Lightning reads a batch ahead, which is lost.
    """
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    return all(
        hasattr(x, "state_dict") and hasattr(x, "load_state_dict") and sized_len(x) is not None
        for x in loaders
    )
