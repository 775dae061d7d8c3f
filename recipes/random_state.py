"""A fit that is resumed draws what the uninterrupted one would have drawn."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override


class RandomState(L.Callback):
    """Keeps the state of torch's generators in checkpoints, which Lightning does not.

    It is for checkpoints at the end of an epoch, and for loaders and models that draw from torch
    alone, in the process of the fit.
    """

    def __init__(self) -> None:
        self._resumed: dict[str, Tensor] = {}

    @override
    def state_dict(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._resumed = state_dict

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing is drawn between this and the first epoch of a resumed fit."""
        if self._resumed:
            torch.set_rng_state(self._resumed["cpu"])
            if "cuda" in self._resumed:
                torch.cuda.set_rng_state(self._resumed["cuda"])
            loader: Any = trainer.train_dataloader
            iter(loader)  # draws a seed, as Lightning's own call does between two epochs
