"""What a fit has accumulated: the sums of its last epochs, what was dropped from them, notes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed import ProcessGroup

from mats_lightning import ranks
from mats_lightning.statistics import Coverage, Statistics


@dataclass(eq=False)
class Accumulation:
    """Sums of epochs.

    With `first` there is one record, of all epochs from it on. Without, there is one for each of
    the last `epochs_kept` epochs, the last one being the latest that has examples. In each record's
    `info` are "epochs", those of which it has examples, and "skipped_batches".
    """

    coverage: Coverage
    epochs_kept: int
    first: int | None
    sums: dict[int, Statistics] = field(default_factory=dict)  # by the epoch that a record begins
    epoch: int = -1  # the latest one that has examples
    examples: float = 0.0  # of that epoch; after a resume with several ranks, a share of those
    notes: list[str] = field(default_factory=list)

    def record(self, epoch: int) -> Statistics:
        """The sums to which this epoch is added."""
        key = epoch if self.first is None else self.first
        if key not in self.sums:
            self.sums[key] = Statistics({}, info={"epochs": [], "skipped_batches": 0})
        return self.sums[key]

    def count(self, epoch: int, examples: int) -> None:
        """A batch has been added to this epoch's record: what is before the window goes.

        Not sooner, since an epoch may turn out to have no examples.
        """
        if epoch != self.epoch:
            self.epoch, self.examples = epoch, 0.0
        self.examples += examples
        epochs = self.record(epoch).info["epochs"]
        if epoch not in epochs:
            epochs.append(epoch)
        self.sums = self._window(epoch)

    def _window(self, epoch: int) -> dict[int, Statistics]:
        """The records that are kept when this is the latest epoch that has examples."""
        start = epoch - self.epochs_kept + 1 if self.first is None else self.first
        return {key: sums for key, sums in self.sums.items() if _begin(key, sums.info) >= start}

    def forget(self, record: Statistics) -> None:
        """Leave this record of sums out."""
        self.sums = {key: sums for key, sums in self.sums.items() if sums is not record}
        if self.epoch in record.info["epochs"]:
            self.examples = 0.0

    def examples_in(self, epoch: int) -> float:
        return self.examples if epoch == self.epoch else 0.0

    def note(self, notes: Iterable[str]) -> list[str]:
        """Those of them that are new."""
        new = [note for note in dict.fromkeys(notes) if note not in self.notes]
        self.notes += new
        return new

    # -- the total -----------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics:
        """The sum of the records, without what has turned out to be inexact."""
        total = Statistics()
        for key in sorted(self.sums):
            if not self.sums[key].info["epochs"]:
                continue  # no batch of it has counted yet
            self.coverage.remove_dropped(self.sums[key])  # a later epoch may have shown it to be
            total = total + self.sums[key]
        return total

    @property
    def epochs(self) -> list[int]:
        return sorted({epoch for sums in self.sums.values() for epoch in sums.info["epochs"]})

    @property
    def skipped_batches(self) -> int:
        return sum(sums.info["skipped_batches"] for sums in self.sums.values())

    def any_examples(self, group: ProcessGroup | None) -> bool:
        """Whether any rank has some. Collective."""
        mine = bool(self.epochs)
        return mine if group is None else any(ranks.all_of(mine, group))

    def of_all_ranks(self, group: ProcessGroup | None) -> "Accumulation | None":
        """What all ranks have accumulated together, on rank 0; None on the others.

        Collective. What one rank has dropped, all have then, so that their sums cover the same.
        """
        if group is None:
            return self
        everyone = ranks.all_of((self._rows(), self.notes, self.epoch, self.examples), group)
        for rows, _, _, _ in everyone:
            self._drop_as_in(rows)
        for sums in self.sums.values():
            self.coverage.remove_dropped(sums)
        epoch = max(epoch for _, _, epoch, _ in everyone)
        total = ranks.add_up(self._window(epoch), group)  # others may have dropped what is before
        if total is None:
            return None
        notes = list(dict.fromkeys(note for _, notes, _, _ in everyone for note in notes))
        examples = sum(count for _, _, of, count in everyone if of == epoch)
        return replace(self, sums=total, epoch=epoch, examples=examples, notes=notes)

    # -- resume --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Tensors and primitives alone."""
        return {
            "sums": {key: dict(vars(statistics)) for key, statistics in self.sums.items()},
            "epoch": self.epoch,
            "examples": self.examples,
            "rows": self._rows(),
            "notes": list(self.notes),
        }

    def restore(self, state: Mapping[str, Any], device: torch.device, rank: int, size: int) -> None:
        """Go on from the state of all ranks, as one of `size` of them.

        The sums go to rank 0 alone: on every rank they would count `size` times.
        """
        self.epoch, self.examples = state["epoch"], state["examples"] / size
        self._drop_as_in(state["rows"])
        self.notes = list(dict.fromkeys([*state["notes"], *self.notes]))
        for key, fields in state["sums"].items() if rank == 0 else ():
            if _begin(key, fields["info"]) < (self.first or 0):
                continue  # before the window of this fit
            tensors = {name: tensor.to(device) for name, tensor in fields["tensors"].items()}
            self.sums[key] = Statistics(**{**fields, "tensors": tensors})

    def _rows(self) -> dict[str, Any]:
        rows = self.coverage.rows.values()
        return {r.name: {"statistics": list(r.statistics), "reason": r.reason} for r in rows}

    def _drop_as_in(self, rows: Mapping[str, Any]) -> None:
        """What turned out to be inexact there is left out here, too."""
        for name, row in self.coverage.rows.items():
            if name in rows and (lost := set(row.statistics) - set(rows[name]["statistics"])):
                row.drop(lost, rows[name]["reason"])


def _begin(key: int, info: Mapping[str, Any]) -> int:
    """The first epoch of a record; its key where no batch has counted yet."""
    return min(info["epochs"], default=key)
