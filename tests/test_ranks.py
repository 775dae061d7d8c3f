"""Several processes: the sidecar that rank 0 writes is that of one process over all rows.

One pair of processes runs all fits of this file, each in a folder of its own; the tests look at
what they left there.
"""

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from models import MLP, Batch, Flattened, Sharing, Transformer, texts, vectors, ways
from oracle import Expected, assert_close
from test_callback import (
    Crash,
    Module,
    Normalised,
    StatefulLoader,
    assert_same,
    fit,
    half_precision,
    in_single,
    largest_distance,
    oracle,
    state_dict,
)
from test_capture import assert_equals
from test_training import Manual
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from mats_lightning import MaTSStatsCallback, Statistics, load_statistics, sidecar_path
from mats_lightning.sidecar import check_belongs

pytestmark = pytest.mark.slow

RANKS = 2
SIZES = (4, 4, 3, 4, 2, 4)  # three batches a rank; over windows of 2 the last one is short
DOUBLE: dict[str, Any] = {"precision": "64-true"}


def strategy(**options: Any) -> DDPStrategy:
    """Gives up early when the other rank has died."""
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60), **options)


class Late(DDPStrategy):
    """Rank 1 comes back from saving when rank 0 has long written everything."""

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint(*args, **kwargs)
        time.sleep(0.5 * self.global_rank)


def together(
    module: L.LightningModule, batches: Any, folder: Path, *callbacks: L.Callback, **options: Any
) -> L.Trainer:
    """A fit on all ranks; Lightning deals the batches of a list out, in an order of its own."""
    options = {"strategy": strategy(), "devices": RANKS, **DOUBLE, **options}
    return fit(module, batches, folder, *callbacks, **options)


class PartlyFlattened(Flattened):
    """In the batches of way "flat" the middle layer sees all positions as rows of one matrix."""

    def forward(self, batch: Batch) -> Tensor:
        if batch["way"] == "flat":
            return super().forward(batch)
        x = torch.tanh(self.middle(torch.tanh(self.first(batch["x"].unflatten(1, (3, 2))))))
        return F.cross_entropy(self.last(x).mean(1), batch["labels"], reduction="none")


class TrainsItsNorm(Module):
    """On rank 1 alone."""

    def on_train_start(self) -> None:
        self.model.batch_norm.train(self.global_rank == 1)  # type: ignore[union-attr]


class Loud(Module):
    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) * (1e6 if batch["way"] == "loud" else 1)


class LoudAtLast(Loud):
    """On rank 0, in epoch 1."""

    def loss(self, batch: Batch) -> Tensor:
        loud = self.current_epoch == 1 and self.global_rank == 0
        return super().loss({**batch, "way": "loud" if loud else ""})


SHARING = ways("together", "k alone", "together", "v alone", "k drops out", "without v")
FLAT = ways(*["plain", "flat"] * 3)
LOUD = in_single(ways("", "loud", "", "loud", "", "loud"))  # all of rank 1
EVERY_STEP: dict[str, Any] = {"every_n_train_steps": 1, "save_top_k": -1}


def dealt(batches: list[Batch], rank: int) -> DataLoader[Batch]:
    """Rank r has the batches r, r + 2, ...; the first one again where there are too few."""
    sampler: Any = DistributedSampler(range(len(batches)), RANKS, rank, shuffle=False)  # type: ignore[arg-type]
    return DataLoader(batches, batch_size=None, sampler=sampler)  # type: ignore[arg-type]


def halves(batches: Sequence[Batch], rank: int) -> StatefulLoader:
    return StatefulLoader(batches[rank::RANKS])


class Rows(L.Callback):
    """How many this rank has trained on."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.count += len(batch["labels"])


def learning(
    folder: Path, rank: int, *others: L.Callback, ckpt_path: Path | None = None, **arguments: Any
) -> None:
    """Two epochs with weights that move; a checkpoint in each step."""
    torch.manual_seed(0)
    callback = MaTSStatsCallback(last_n_epochs=2, **arguments)
    every = ModelCheckpoint(folder, "{step}", **EVERY_STEP)
    data = halves(vectors(SIZES), rank)
    options: dict[str, Any] = {"max_epochs": 2, "ckpt_path": ckpt_path}
    module = Module(MLP(), lr=0.1).double()  # Lightning loads the weights before it converts them
    together(module, data, folder, callback, every, *others, **options)


def crashing(*arguments: Any, **options: Any) -> None:
    with pytest.raises(RuntimeError, match="crash"):
        learning(*arguments, **options)


def accumulated(folder: Path, rank: int) -> None:
    module = Module(Transformer())
    trainer = together(
        module, texts(SIZES), folder, MaTSStatsCallback(), accumulate_grad_batches=2, max_epochs=2
    )
    trainer.save_checkpoint(folder / "after.ckpt", weights_only=True)


def padded(folder: Path, rank: int) -> None:
    options = {"strategy": Late(process_group_backend="gloo")}
    batches = dealt(vectors(SIZES[:5]), rank)
    together(Module(MLP()), batches, folder, MaTSStatsCallback(), **options)


def shared(folder: Path, rank: int) -> None:
    options = {"strategy": strategy(find_unused_parameters=True)}
    together(Module(Sharing()), SHARING, folder, MaTSStatsCallback(), **options)


def flattened(folder: Path, rank: int) -> None:
    callback = MaTSStatsCallback()
    together(Module(PartlyFlattened()), dealt(FLAT, rank), folder, callback)
    assert "diagonal_fisher/model.middle.weight" not in callback.statistics.tensors


def noted(folder: Path, rank: int) -> None:
    callbacks = [MaTSStatsCallback()]
    module = TrainsItsNorm(Normalised().eval())
    if rank == 0:
        with pytest.warns(UserWarning, match="batch normalisation over a batch's own rows couples"):
            together(module, vectors(SIZES), folder, *callbacks)
    else:
        together(module, vectors(SIZES), folder, *callbacks)


def skipped(folder: Path, rank: int) -> None:
    options = {"precision": None, "plugins": [half_precision()]}
    trainer = together(Loud(MLP()), dealt(LOUD, rank), folder, MaTSStatsCallback(), **options)
    trainer.save_checkpoint(folder / "after.ckpt")


def skipped_at_last(folder: Path, rank: int) -> None:
    """One of the ranks has no examples of the last epoch."""
    options = {"precision": None, "plugins": [half_precision()], "max_epochs": 2, "max_steps": 99}
    together(LoudAtLast(MLP()), dealt(LOUD, rank), folder, MaTSStatsCallback(), **options)


def manual(folder: Path, rank: int) -> None:
    together(Manual(MLP()), vectors(SIZES), folder, MaTSStatsCallback(loss_scale=0.5))


def bounded(folder: Path, rank: int) -> None:
    """7 of all ranks: 3.5 of each."""
    callback = MaTSStatsCallback(max_examples=7)
    together(Module(MLP()), dealt(vectors((3, 4, 3, 4, 3, 4)), rank), folder, callback)


def last(folder: Path, rank: int) -> None:
    every = ModelCheckpoint(folder, "{step}", **EVERY_STEP)
    together(Module(MLP()), vectors(SIZES), folder, MaTSStatsCallback(sidecar="last"), every)


def resumed(folder: Path, rank: int) -> None:
    learning(folder / "whole", rank)
    for step in (2, 3):  # in mid-epoch, and at its end
        crashing(folder / f"crashed {step}", rank, Crash(step))
        path = folder / f"crashed {step}" / f"step={step}.ckpt"
        learning(folder / f"from {step}", rank, ckpt_path=path)


def resumed_bounded(folder: Path, rank: int) -> None:
    crashing(folder / "crashed", rank, Crash(1), max_examples=12)
    path = folder / "crashed" / "step=1.ckpt"
    learning(folder / "resumed", rank, ckpt_path=path, max_examples=12)


def interrupted(folder: Path, rank: int) -> None:
    on_exception = OnExceptionCheckpoint(folder, "exception")
    sidecar_path(folder / "exception.ckpt").write_bytes(b"of an older one")
    crashing(folder / "crashed", rank, Crash(2), on_exception)
    each = ModelCheckpoint(folder / "resumed", "{epoch}", save_top_k=-1)
    callback, data = MaTSStatsCallback(last_n_epochs=2), halves(vectors(SIZES), rank)
    options: dict[str, Any] = {"max_epochs": 2, "ckpt_path": folder / "exception.ckpt"}
    rows = Rows()
    together(Module(MLP(), lr=0.1), data, folder, callback, each, rows, **options)
    (folder / f"rows of {rank}").write_text(str(rows.count))


FITS: list[Callable[[Path, int], None]] = [
    accumulated, padded, shared, flattened, noted, skipped, skipped_at_last, manual, bounded, last,
    resumed, resumed_bounded, interrupted,
]  # fmt: skip


def run_all(rank: int, folder: Path, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    for run in FITS:
        mine = folder / run.__name__
        mine.mkdir(exist_ok=True)
        torch.manual_seed(0)  # in half precision some weights round to another side of a ReLU
        run(mine, rank)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which each fit has one of its name."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_all, (folder, port), nprocs=RANKS)
    return folder


def only(folder: Path) -> Statistics:
    (path,) = folder.rglob("*.ckpt")
    found = load_statistics(path)
    check_belongs(found, state_dict(path), "it")
    return found


def brute_force(path: Path, module: Module, batches: Sequence[Batch]) -> Expected:
    module.load_state_dict(state_dict(path))
    return oracle(module.double(), batches)


def test_accumulated(left: Path) -> None:
    path = left / "accumulated" / "after.ckpt"
    wanted = brute_force(path, Module(Transformer()).double(), texts(SIZES))
    for path in (left / "accumulated").rglob("*.ckpt"):
        found = load_statistics(path)
        assert_equals(found, wanted, 1e-9, [])
        check_belongs(found, state_dict(path), "it")
        assert found.info["epochs"] == [1] and found.info["notes"] == []


def test_rows_that_fill_up_count_twice(left: Path) -> None:
    (path,) = (left / "padded").rglob("*.ckpt")
    batches = vectors(SIZES[:5])
    wanted = brute_force(path, Module(MLP()).double(), batches + batches[:1])
    assert_equals(only(left / "padded"), wanted, 1e-9, [])


def test_ranks_that_share_inputs_in_other_ways(left: Path) -> None:
    (path,) = (left / "shared").rglob("*.ckpt")
    wanted = brute_force(path, Module(Sharing()).double(), SHARING)
    assert_equals(only(left / "shared"), wanted, 1e-9, [])


def test_what_one_rank_has_dropped_is_dropped(left: Path) -> None:
    (path,) = (left / "flattened").rglob("*.ckpt")
    wanted = brute_force(path, Module(PartlyFlattened()).double(), FLAT)
    found = only(left / "flattened")
    middle = ["model.middle.weight", "model.middle.bias"]
    assert not set(middle) & {*found.diagonal_fisher, *found.block_fisher}
    for name in middle:
        del wanted.diagonal_fisher[name]
    del wanted.block_fisher[middle[1]]
    assert_equals(found, wanted, 1e-9, [])
    rows = {row["name"]: row for row in found.info["coverage"]}
    assert rows[middle[0]]["statistics"] == ["gram", "kfac"]
    assert "so an example's gradient cannot be told apart" in rows[middle[0]]["reason"]


def test_what_one_rank_has_noted_is_noted(left: Path) -> None:
    (note,) = only(left / "noted").info["notes"]
    assert note.startswith("batch normalisation over a batch's own rows couples its examples")


def test_what_one_rank_has_skipped_is_counted(left: Path) -> None:
    paths = list((left / "skipped").rglob("*.ckpt"))
    assert len(paths) == 2
    for path in paths:
        module, found = Loud(MLP()), load_statistics(path)
        module.load_state_dict(state_dict(path))
        wanted = oracle(module, LOUD[::2])
        assert found.info["skipped_batches"] == 3 and found.examples == wanted.examples
        assert found.info["notes"] == []  # not that the other rank has no examples
        assert largest_distance(found, wanted) < 0.005


def test_an_epoch_of_which_one_rank_has_no_examples(left: Path) -> None:
    """That rank keeps its examples of the epoch before, which the others have dropped."""
    (path,) = (left / "skipped_at_last").rglob("*.ckpt")
    module, found = Module(MLP()), only(left / "skipped_at_last")
    module.load_state_dict(state_dict(path))
    wanted = oracle(module, LOUD[1::2])
    assert found.info["epochs"] == [1] and found.info["skipped_batches"] == 3
    assert found.examples == wanted.examples
    assert largest_distance(found, wanted) < 0.005


@pytest.mark.parametrize(
    ("name", "batches"),
    [("manual", vectors(SIZES)), ("bounded", vectors((3, 4, 3, 4, 3, 4))[:3])],
)
def test_other_ways(name: str, batches: list[Batch], left: Path) -> None:
    (path,) = (left / name).rglob("*.ckpt")
    wanted = brute_force(path, Module(MLP()).double(), batches)
    assert_equals(only(left / name), wanted, 1e-9, [])


def test_the_last_sidecar_alone_is_kept(left: Path) -> None:
    assert len(list((left / "last").rglob("*.ckpt"))) == 3
    assert list((left / "last").rglob("*.safetensors")) == [
        sidecar_path(left / "last" / "step=3.ckpt")
    ]


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_has_the_statistics_of_an_uninterrupted_one(step: int, left: Path) -> None:
    for n in range(step + 1, 7):
        wanted = load_statistics(left / "resumed" / "whole" / f"step={n}.ckpt")
        found = load_statistics(left / "resumed" / f"from {step}" / f"step={n}.ckpt")
        assert found.examples == wanted.examples
        assert_close(found.tensors, wanted.tensors, 1e-12)
        assert found.info == wanted.info
    assert wanted.examples == 2 * sum(SIZES) and found.info["epochs"] == [0, 1]


def test_one_process_goes_on_from_the_sums_of_several(left: Path, tmp_path: Path) -> None:
    path = left / "resumed" / "crashed 3" / "step=3.ckpt"
    before = load_statistics(path)
    options: dict[str, Any] = {"max_epochs": 2, "ckpt_path": path, **DOUBLE}
    both, second = MaTSStatsCallback(last_n_epochs=2), MaTSStatsCallback()
    for callback in (both, second):
        batches = halves(vectors(SIZES), 0)
        fit(
            Module(MLP()),
            batches,
            tmp_path / str(callback.options.last_n_epochs),
            callback,
            **options,
        )
    assert before.examples == sum(SIZES) and second.statistics.examples == sum(SIZES[::RANKS])
    assert both.statistics.examples == before.examples + second.statistics.examples
    assert_close(both.statistics.tensors, (before + second.statistics).tensors, 1e-12)


def test_a_bound_on_examples_is_resumed(left: Path) -> None:
    """In the first two steps rank 0 has 2 + 4 rows and rank 1 has 4 + 4; 6 each are enough."""
    folder = left / "resumed_bounded"
    counts = [
        load_statistics(folder / where / f"step={n}.ckpt").examples
        for where, n in (("crashed", 1), ("resumed", 2), ("resumed", 3))
    ]
    assert counts == [6, 14, 14]


def test_a_checkpoint_of_an_exception_has_no_sums(left: Path) -> None:
    folder = left / "interrupted"
    assert (folder / "exception.ckpt").exists()
    assert not sidecar_path(folder / "exception.ckpt").exists()
    (path,) = (folder / "resumed").glob("epoch=1*.ckpt")
    found = load_statistics(path)
    (note,) = found.info["notes"]
    assert note.startswith("a checkpoint was saved because of an exception")
    rows = [int((folder / f"rows of {rank}").read_text()) for rank in range(RANKS)]
    assert found.examples == sum(rows) >= sum(SIZES)


# -- how the processes start -----------------------------------------------------------------------


def assert_of_all_rows(path: Path) -> None:
    wanted = brute_force(path, Module(MLP()).double(), vectors(SIZES))
    assert_equals(load_statistics(path), wanted, 1e-9, [])


def test_processes_that_are_spawned(tmp_path: Path) -> None:
    options: dict[str, Any] = {"strategy": "ddp_spawn", "devices": RANKS, **DOUBLE}
    fit(Module(MLP()), vectors(SIZES), tmp_path, MaTSStatsCallback(), **options)
    assert_of_all_rows(next(tmp_path.rglob("*.ckpt")))


def test_a_script_that_is_started_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    source = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_ranks import *

        if __name__ == "__main__":
            options = {{"strategy": "ddp", "devices": RANKS, **DOUBLE}}
            folder = Path({str(tmp_path)!r})
            trainer = fit(Module(MLP()), vectors(SIZES), folder, MaTSStatsCallback(), **options)
            trainer.save_checkpoint(folder / "after.ckpt")
            torch.distributed.destroy_process_group()  # gloo's threads may abort the exit
    """
    script.write_text(textwrap.dedent(source))
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    assert_of_all_rows(tmp_path / "after.ckpt")
    assert len(list(tmp_path.rglob("*.ckpt"))) == 2
    for path in tmp_path.rglob("*.ckpt"):
        assert_same(load_statistics(path), load_statistics(tmp_path / "after.ckpt"))
