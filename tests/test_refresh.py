"""Refresh in one process: against its parts by hand, taken back, interrupted, gone on with."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_lora import tasks as adapters
from test_module import CLASSES, SHARED, Data, Suite, make_trainer, rows, suite
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mats_lightning import (
    MergeModule,
    RefreshPlan,
    Statistics,
    collect_statistics,
    merge_folder,
    merging,
    module,
    refresh,
)
from mats_lightning.batches import first_rows
from mats_lightning.checkpoints import load_weights, save_weights
from mats_lightning.judge import Judge
from mats_lightning.rounds import Folder, Round
from mats_lightning.task_rounds import with_older

__all__ = ["suite"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
]

State = dict[str, Tensor]
SOLVING: dict[str, Any] = {"by": "solving", "labels": "data", "judge": "score"}


class TrainingData(Data):
    """The same with training rows, whose loader shuffles."""

    def setup(self, stage: str) -> None:
        if stage != "fit":
            super().setup(stage)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(self.task, "train"), batch_size=16, shuffle=True)


def merged(suite: Suite, *names: str, **options: Any) -> MergeModule:
    tasks = [suite.task(name, data=TrainingData(name)) for name in names or CLASSES]
    return MergeModule(tasks, "mats", {"iterations": 3} | options)


def refreshed(module: MergeModule, **options: Any) -> list[Round]:
    known = ("folder", "logits_fn", "loaders", "statistics_options")
    given = {name: options.pop(name) for name in known if name in options}
    defaults: dict[str, Any] = {"heads": (), "rounds": 1}  # heads: test_refresh_heads.py
    options = defaults | SOLVING | options
    return refresh(module, RefreshPlan(**options), trainer=make_trainer(), progress=False, **given)


def logits_of(module: Any, batch: list[Tensor]) -> Tensor:
    logits: Tensor = module(batch[0])
    return logits


def assert_same(found: State, wanted: State) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def differ(found: State, wanted: State) -> bool:
    return any(not torch.equal(found[name], wanted[name]) for name in wanted)


def taking(monkeypatch: pytest.MonkeyPatch, *averages: float) -> list[State]:
    """Validation gives these averages, one after the other; the weights that it saw."""
    left, seen = list(averages), []

    def validate(self: Judge) -> float:
        seen.append({name: t.clone() for name, t in self.module.shared_state().items()})
        self.module.scores = dict.fromkeys(self.module.tasks, left.pop(0))
        return 0.5

    monkeypatch.setattr(Judge, "validate", validate)
    return seen


# -- one round by hand -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        ({}, {}),
        ({"mix": 0.4, "normalize": False}, {}),
        ({"kept": ("body.0",)}, {}),
        ({}, {"loss_reduction": "sum"}),
    ],
)
def test_a_round_is_its_parts(
    suite: Suite, plan: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = merged(suite, weights={name: 1.0 + (name == "dict") for name in CLASSES})
    module.merge()
    start = module.shared_state()
    statistics = []
    for task in CLASSES:
        model = module.model(task)
        for parameter in model.head.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(False)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:20]
        x, y = rows(task, "train").tensors
        statistics.append(
            collect_statistics(
                model,
                [[x[order[:16]], y[order[:16]]], [x[order[16:]], y[order[16:]]]],
                statistics=("kfac", "block_fisher", "gradient"),
                progress=False,
                **options,
            )
        )
    step = merging.refresh_step(
        start,
        statistics,
        suite.thetas(list(CLASSES)),
        iterations=4,
        weights=[1.0 + (name == "dict") for name in CLASSES],
        **plan,
    )
    taking(monkeypatch, 0.5, 0.6)
    refreshed(module, rows=20, iterations=4, seed=3, statistics_options=options, **plan)
    found = module.shared_state()
    assert list(found) == list(SHARED)
    for name, tensor in step.state_dict.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    assert differ(found, start)
    assert torch.equal(found["body.0.bias"], start["body.0.bias"]) is bool(plan.get("kept"))


def test_heads_stay_and_the_trainer_tests_what_came_out(suite: Suite) -> None:
    module, other = merged(suite), merged(suite)
    other.merge()
    rounds = refreshed(module, rounds=2, rows=48)
    for task in CLASSES:
        before, after = other.state_of(task), module.state_of(task)
        assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("head."))
    assert not module.scores  # those that chose the rounds are not the model's
    make_trainer().validate(module, verbose=False)
    scores = module.scores
    assert scores == rounds[-1].scores
    best = max(done.average for done in rounds)
    assert sum(scores.values()) / len(scores) == best >= rounds[0].average
    assert differ(module.shared_state(), other.shared_state()) is any(r.taken for r in rounds)


def test_what_is_frozen_stays_and_all_else_trains_afterwards(suite: Suite) -> None:
    made = merged(suite, "log", "dict")
    made.merge()
    start = made.shared_state()
    for task in made.tasks.values():
        task.module.get_parameter("body.0.bias").requires_grad_(False)
    refreshed(made, rows=16)
    assert torch.equal(made.shared_state()["body.0.bias"], start["body.0.bias"])
    frozen = [n.split(".", 2)[2] for n, p in made.named_parameters() if not p.requires_grad]
    assert frozen == ["body.0.bias"] * 2


# -- what is taken back ------------------------------------------------------------------------


def test_a_step_that_worsens_is_halved_and_then_undone(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = merged(suite)
    module.merge()
    start = module.shared_state()
    seen = taking(monkeypatch, 0.5, 0.4, 0.49, 0.3, 0.9)
    rounds = refreshed(module, rounds=5, step=0.8, tries=3, folder=tmp_path)
    assert [done.taken for done in rounds] == [False, False]
    assert rounds[1].tried == pytest.approx({"0.8": 0.4, "0.4": 0.49, "0.2": 0.3})
    assert rounds[1].scores == rounds[0].scores == dict.fromkeys(CLASSES, 0.5)
    assert_same(module.shared_state(), start)
    for task in CLASSES:
        assert torch.equal(
            module.tasks[task].module.state_dict()["body.0.weight"], start["body.0.weight"]
        )
    moved = [after["body.0.weight"] - start["body.0.weight"] for after in seen[1:]]
    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(moved[2], moved[0] / 4, rtol=1e-4, atol=1e-6)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["round-0.safetensors"]


def test_half_a_step_that_is_no_worse_is_taken_and_the_next_round_begins_there(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = merged(suite)
    seen = taking(monkeypatch, 0.5, 0.4, 0.5, 0.6)
    rounds = refreshed(module, rounds=2)
    assert [done.step for done in rounds] == [0.0, 0.5, 1.0]
    assert [done.average for done in rounds] == pytest.approx([0.5, 0.5, 0.6])
    assert_same(module.shared_state(), seen[-1])
    assert differ(seen[-1], seen[-2])


def test_an_absurd_step_is_taken_back_by_true_validation(suite: Suite) -> None:
    module = merged(suite)
    module.merge()
    start = module.shared_state()
    rounds = refreshed(module, mix=1.0, step=1e6, normalize=False, tries=2)
    assert not rounds[1].taken and len(rounds[1].tried) == 2
    assert_same(module.shared_state(), start)


# -- interrupted -------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("call", [1, 4, 6, 8])  # of 5 tasks a round
def test_an_interrupted_refresh_goes_on_to_the_same_result(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, decay: float
) -> None:
    plan: dict[str, Any] = {"rounds": 2, "rows": 20, "mix": 0.5, "decay": decay}
    averages = (0.1, 0.2, 0.3)
    whole = merged(suite)
    taking(monkeypatch, *averages)
    rounds = refreshed(whole, folder=tmp_path / "whole", **plan)
    calls: list[None] = []

    def counted(*args: Any, **options: Any) -> Statistics:
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return collect_statistics(*args, **options)

    monkeypatch.setattr("mats_lightning.measuring.collect_statistics", counted)
    taking(monkeypatch, *averages)
    with pytest.raises(Killed):
        refreshed(merged(suite), folder=tmp_path / "cut", **plan)
    done = call > 5
    taking(monkeypatch, *averages[1 + done :])
    again = merged(suite)
    found = refreshed(again, folder=tmp_path / "cut", **plan)
    assert len(calls) == 1 + 10  # nothing that was finished is taken twice
    assert_same(again.shared_state(), whole.shared_state())
    assert [r.scores for r in found] == [r.scores for r in rounds]
    assert [r.step for r in found] == [r.step for r in rounds]


def test_rounds_are_kept_and_more_may_follow(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = merged(suite)
    seen = taking(monkeypatch, 0.1, 0.2, 0.3)
    refreshed(module, rows=20, folder=tmp_path)
    again = merged(suite)
    rounds = refreshed(again, rows=20, rounds=2, folder=tmp_path)
    for number, state in enumerate(seen):
        kept = dict(load_weights(tmp_path / f"round-{number}.safetensors"))
        assert_same({name: kept[name] for name in state}, state)
    assert_same(again.shared_state(), seen[2])
    record = json.loads((tmp_path / "history.json").read_text())
    assert [done["number"] for done in record["rounds"]] == [0, 1, 2]
    assert record["plan"]["rows"] == 20
    assert rounds[1].seconds["statistics"] > 0 and rounds[1].seconds["validation"] == 0.5
    assert not list((tmp_path / "statistics").iterdir())
    nothing_left = refreshed(merged(suite), rows=20, rounds=2, folder=tmp_path)
    assert nothing_left == rounds
    fewer = merged(suite)
    assert refreshed(fewer, rows=20, rounds=1, folder=tmp_path) == rounds[:2]
    assert_same(fewer.shared_state(), seen[1])
    assert json.loads((tmp_path / "history.json").read_text()) == record


def test_another_refresh_in_the_folder_is_refused(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taking(monkeypatch, 0.1, 0.2)
    refreshed(merged(suite), folder=tmp_path)
    with pytest.raises(ValueError, match=r"holds a refresh with mix=0.0, and this one has 1.0"):
        refreshed(merged(suite), mix=1.0, folder=tmp_path)
    with pytest.raises(ValueError, match="started from other merged weights"):
        refreshed(merged(suite, iterations=1), folder=tmp_path)
    with pytest.raises(ValueError, match="has another statistics_options"):
        refreshed(merged(suite), folder=tmp_path, statistics_options={"loss_reduction": "sum"})
    with pytest.raises(ValueError, match="has another logits_fn"):
        refreshed(merged(suite), folder=tmp_path, logits_fn=logits_of)


def test_a_merge_that_differs_by_rounding_goes_on_with_what_is_kept(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from another machine, or with other threads."""
    seen = taking(monkeypatch, 0.1, 0.2, 0.3)
    refreshed(merged(suite), rows=20, folder=tmp_path)
    module = merged(suite)
    module.merge()
    near = {name: t * (1 + 1e-6 * torch.randn_like(t)) for name, t in module.shared_state().items()}
    assert differ(near, module.shared_state())
    monkeypatch.setattr(module, "merge", lambda *_: None)
    module.replace_shared(merging.MergeResult(near), {})
    rounds = refreshed(module, rows=20, folder=tmp_path)
    assert [done.average for done in rounds] == [0.1, 0.2]
    assert_same(module.shared_state(), seen[1])
    module.replace_shared(merging.MergeResult({n: t * (1 + 1e-4) for n, t in near.items()}), {})
    with pytest.raises(ValueError, match=r"differs by 1\.0e-04 of its norm\): merge as before"):
        refreshed(module, rows=20, folder=tmp_path)


def test_a_folder_without_its_heads_is_refused(suite: Suite, tmp_path: Path) -> None:
    options: dict[str, Any] = {"heads": (1, 10), "rows": 20, "folder": tmp_path, "rounds": 0}
    (done,) = refreshed(merged(suite, "log", "dict"), **options)
    assert done.heads
    (tmp_path / "heads-0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"heads-0\.safetensors is gone, .* heads of log, dict"):
        refreshed(merged(suite, "log", "dict"), **options)


@pytest.mark.parametrize("lost", ["tasks", "rounds", "scores", "everything"])
def test_a_history_of_another_version_is_refused(tmp_path: Path, lost: str) -> None:
    plan, tasks, state = {"rows": 20}, {"log": {"metric": "accuracy"}}, {"w": torch.ones(2)}
    folder, done = Folder(tmp_path), [Round(0, 0.0, {"log": 0.5}, {})]
    folder.keep(plan, tasks, done, state, {})
    assert folder.history(plan, tasks, state) == done
    known = json.loads((tmp_path / "history.json").read_text())
    (known["rounds"][0] if lost == "scores" else known).pop(lost, None)
    text = "{" if lost == "everything" else json.dumps(known)
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"history.json is not what this version .* another folder"
    ):
        folder.history(plan, tasks, state)


@pytest.mark.parametrize("odd", ["metric", "weight", "head"])
def test_a_refresh_of_other_tasks_in_the_folder_is_refused(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    def averaged(changes: dict[str, Any], **weights: float) -> MergeModule:
        tasks = [
            suite.task("log", data=TrainingData("log")),
            suite.task("dict", **{"data": TrainingData("dict")} | changes),
        ]
        return MergeModule(tasks, "average", {"weights": {"log": 1.0, "dict": 1.0} | weights})

    state = dict(load_weights(suite.checkpoint("dict")))
    save_weights(state | {"head.bias": state["head.bias"] + 1}, tmp_path / "other.safetensors")
    other = {
        "metric": averaged({"metric": "loss"}),
        "weight": averaged({}, dict=2.0),
        "head": averaged({"checkpoint": tmp_path / "other.safetensors"}),
    }
    taking(monkeypatch, 0.1, 0.2)
    rounds = refreshed(averaged({}), folder=tmp_path / "kept")
    with pytest.raises(ValueError, match=f"of other tasks: 'dict' has another {odd}"):
        refreshed(other[odd], folder=tmp_path / "kept")
    assert refreshed(averaged({}), folder=tmp_path / "kept") == rounds


# -- rows and labels ---------------------------------------------------------------------------


def test_the_first_rows_do_not_depend_on_how_the_loader_shuffles() -> None:
    numbers = TensorDataset(torch.arange(100))
    found = []
    for loader in (
        DataLoader(numbers, batch_size=8, shuffle=True),
        DataLoader(numbers, batch_size=8),
    ):
        batches = [batch[0] for batch in first_rows(loader, 20, seed=1)]
        assert [len(batch) for batch in batches] == [8, 8, 4]
        found.append(torch.cat(batches).tolist())
    assert found[0] == found[1] and len(set(found[0])) == 20
    longer = torch.cat([batch[0] for batch in first_rows(loader, 1000, seed=1)]).tolist()
    assert longer[:20] == found[0] and sorted(longer) == list(range(100))
    other = torch.cat([batch[0] for batch in first_rows(loader, 20, seed=2)]).tolist()
    assert other != found[0]


def test_a_teacher_needs_no_labels(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("log", "dict", "metric")

    def wrong(task: str, labels: str) -> MergeModule:
        loaders = {}
        for name in names:
            x, y = rows(name, "train").tensors
            y = torch.zeros_like(y) if labels == "wrong" else y
            loaders[name] = DataLoader(TensorDataset(x, y), batch_size=16)
        module = merged(suite, *names)
        taking(monkeypatch, 0.1, 0.2)
        options = {"mix": 0.5, "fisher": "sampled", "labels": task}
        refreshed(module, logits_fn=logits_of, loaders=loaders, **options)
        return module

    states = {
        (source, labels): wrong(source, labels).shared_state()
        for source in ("teacher", "data")
        for labels in ("right", "wrong")
    }
    assert_same(states["teacher", "right"], states["teacher", "wrong"])
    assert differ(states["data", "right"], states["data", "wrong"])
    assert differ(states["data", "right"], states["teacher", "right"])


def test_the_teacher_is_the_tasks_own_model(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one model is merged with itself it predicts as its teacher: no gradient, no step."""
    module = merged(suite, "dict")
    module.merge()
    start = module.shared_state()
    taking(monkeypatch, 0.1, 0.1)
    options: dict[str, Any] = {"mix": 1.0, "fisher": "sampled", "damping": 0.01}
    refreshed(module, labels="teacher", logits_fn=logits_of, **options)
    for name, tensor in module.shared_state().items():
        torch.testing.assert_close(tensor, start[name], rtol=0, atol=1e-4)


def test_older_curvature_counts_for_less_and_older_gradients_not_at_all() -> None:
    def taken(seed: int) -> Statistics:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
        x = torch.randn(10, 4, 3, dtype=torch.float64)
        return collect_statistics(
            model,
            [x],
            statistics=("kfac", "block_fisher", "gradient"),
            loss_fn=lambda m, b: m(b)[:, :, 0].exp().sum(1).mean(),
            progress=False,
        )

    new, old = taken(0), taken(1)
    total = with_older(new, old, 0.5)
    assert total.examples == 15 and total.positions == {"0": 60}
    torch.testing.assert_close(total.kfac["0"][0], (2 * new.gram["0"] + old.gram["0"]) / 3)
    torch.testing.assert_close(total.kfac["0"][1], (2 * new.kfac["0"][1] + old.kfac["0"][1]) / 3)
    blocks = [s.block_fisher["1.weight"] for s in (new, old)]
    torch.testing.assert_close(total.block_fisher["1.weight"], (2 * blocks[0] + blocks[1]) / 3)
    for name, gradient in new.gradient.items():
        torch.testing.assert_close(total.gradient[name], gradient)
    assert new.faded(0.01).examples == 0


def test_modules_of_another_precision_than_their_checkpoints_are_refreshed(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their values are so coarse that bfloat16 has them, and their means, exactly."""
    made: dict[torch.dtype, MergeModule] = {}
    for dtype in (torch.bfloat16, torch.float32):
        tasks = []
        for name in ("log", "dict"):
            path = tmp_path / f"{name}-{dtype}.safetensors"
            state = dict(load_weights(suite.checkpoint(name)))
            save_weights({n: (t * 8).round().div(8).to(dtype) for n, t in state.items()}, path)
            tasks.append(suite.task(name, data=TrainingData(name), checkpoint=path))
        made[dtype] = MergeModule(tasks, "average")
        seen = taking(monkeypatch, 0.1, 0.2)
        rounds = refreshed(made[dtype], rows=20, mix=0.5)
        assert rounds[1].taken and differ(seen[1], seen[0])
    found = made[torch.bfloat16].shared_state()
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert_same(found, made[torch.float32].shared_state())


# -- the card, and what is refused ---------------------------------------------------------------


def test_the_card_says_what_was_done(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    made = merged(suite, "log", "dict")
    taking(monkeypatch, 0.1, 0.2, 0.3, 0.1, 0.1)
    refreshed(made, rounds=3, rows=20, mix=0.5, tries=2, kept=("body.2",))
    cards: list[Any] = []

    class Inner(nn.Module):
        config = type("Config", (), {"name_or_path": "start"})

    monkeypatch.setattr(merge_folder, "backbone_prefix", lambda *args: "body.")
    monkeypatch.setattr(module.MergeModule, "model", lambda *args: nn.ModuleDict({"body": Inner()}))
    monkeypatch.setattr(merge_folder, "export_huggingface", lambda *args: cards.append(args[4]))
    made.export("nowhere")
    assert cards[0].options["iterations"] == 3
    assert cards[0].refreshed and cards[0].scores is None
    found = cards[0].options["refresh"]
    assert (found["rounds"], found["mix"], found["kept"]) == (2, 0.5, ["body.2"])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"rounds": 0, "heads": ()}, "rounds=0 and heads=\\(\\): there is nothing to do"),
        ({"rows": 0}, "rows=0"),
        ({"rows": 32.5}, "rows=32.5; it must be a whole number, 1 or more"),
        ({"heads": 5}, r"heads=5; it must be a tuple, \(5,\)"),
        ({"tries": 0}, "tries=0"),
        ({"mix": 1.1}, "mix=1.1; it lies between 0 and 1"),
        ({"decay": -0.1}, "decay=-0.1; it lies"),
        ({"step": 0.0}, "step=0.0; it must be a positive number"),
        ({"damping": -0.1}, "damping=-0.1: it cannot be negative"),
        ({"preconditioner_damping": float("nan")}, "preconditioner_damping=nan: it cannot be"),
        ({"radius": -1.0}, "radius=-1.0: it cannot be negative"),
        ({"radius": float("nan")}, "radius=nan: it cannot be negative"),
        ({"fisher": "true"}, "fisher='true'; choose from empirical, sampled"),
        ({"labels": "none"}, "labels='none'; choose from data, teacher"),
        ({"objective": "average"}, "objective='average' has no statistics to take again"),
        ({"objective": "hessian"}, "objective='hessian'"),
    ],
)
def test_plans_out_of_range_are_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RefreshPlan(**plan)


@pytest.fixture
def untouched(suite: Suite) -> Iterator[MergeModule]:
    made = merged(suite, "log", "dict")
    made.merge()
    before = copy.deepcopy(made.shared_state())
    yield made
    assert_same(made.shared_state(), before)


def test_what_a_refresh_cannot_do(suite: Suite, untouched: MergeModule) -> None:
    with pytest.raises(ValueError, match="'individual' merges nothing"):
        refreshed(MergeModule(list(untouched.tasks.values()), "individual"))
    with pytest.raises(ValueError, match="labels='teacher' needs the logits"):
        refreshed(untouched, labels="teacher")
    with pytest.raises(ValueError, match="a LightningModule does not say which these are"):
        refreshed(untouched, fisher="sampled")
    with pytest.raises(ValueError, match="loaders: 'other' is no task; the tasks are log, dict"):
        refreshed(untouched, loaders={"other": []})
    with pytest.raises(ValueError, match="loaders: the batches of 'log' can be read once"):
        refreshed(untouched, loaders={"log": iter([])})
    with pytest.raises(ValueError, match="by='training' takes no statistics: leave them out"):
        refreshed(untouched, by="training", statistics_options={"mask_fn": len})
    with pytest.raises(ValueError, match="statistics_options: 'seed' is none of mask_fn, loss_re"):
        refreshed(untouched, statistics_options={"seed": 1})
    with pytest.raises(ValueError, match="loss_reduction goes with RefreshPlan"):
        options = {"loss_reduction": "sum"}
        refreshed(untouched, labels="teacher", logits_fn=logits_of, statistics_options=options)
    trainer = pl.Trainer(accelerator="cpu", devices=2, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="the trainer has 2 devices"):
        refresh(untouched, trainer=trainer, logits_fn=logits_of)
    trainer = make_trainer(precision="bf16-true")
    with pytest.raises(ValueError, match="precision='bf16-true', which converts the tasks' mod"):
        refresh(untouched, trainer=trainer)


@pytest.mark.parametrize(
    "plan", [RefreshPlan(rounds=0, heads=(1,), **SOLVING), RefreshPlan(heads=(), **SOLVING)]
)
def test_validation_of_no_rows_is_refused(untouched: MergeModule, plan: RefreshPlan) -> None:
    trainer = make_trainer(limit_val_batches=0)
    with pytest.raises(ValueError, match="give the tasks validation rows, and a trainer without"):
        refresh(untouched, plan, trainer=trainer, progress=False)


def test_what_is_wrong_is_said_before_anything_is_computed(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = taking(monkeypatch, 0.1, 0.2)
    with pytest.raises(ValueError, match="a LightningModule does not say which these are"):
        refreshed(merged(suite, "log", "dict"), fisher="sampled")
    with pytest.raises(ValueError, match=r"kept: no parameter has 'body\.7' in its name"):
        refreshed(merged(suite, "log", "dict"), kept=("body.7",))
    plain = suite.task("dict", data=DataLoader(rows("dict", "validate"), batch_size=8))
    with pytest.raises(ValueError, match="task 'dict' has a DataLoader for test and validation"):
        refreshed(MergeModule([suite.task("log", data=TrainingData("log")), plain], "average"))
    for change, message in (
        (lambda net: net.body.requires_grad_(False), "nothing trains of what the tasks share"),
        (lambda net: net.bfloat16(), "is in torch.bfloat16, in which small steps are lost"),
    ):
        made = merged(suite, "log", "dict")
        for task in made.tasks.values():
            change(task.module)
        with pytest.raises(ValueError, match=message):
            refreshed(made, by="training")
    assert not seen


def test_a_teacher_of_one_class_is_refused(suite: Suite) -> None:
    """Its softmax is 1 whatever the weights are, so nothing would be learnt or judged."""
    made = merged(suite, "log", "dict")
    plan = RefreshPlan(heads=(), rows=20)
    with pytest.raises(ValueError, match=r"task 'log'.*\(\d+, 1\), and one class alone"):
        refresh(
            made,
            plan,
            trainer=make_trainer(),
            logits_fn=lambda module, batch: module(batch[0])[:, :1],
            progress=False,
        )


def test_products_of_adapters_are_not_refreshed(tmp_path: Path) -> None:
    module = MergeModule(adapters(tmp_path), "average", {"lora_rank": 4})
    with pytest.raises(ValueError, match=r"lora_rank=4 merges the products .*factor by factor"):
        refreshed(module, loaders={name: [] for name in module.tasks})


def test_tasks_without_training_rows_are_named(suite: Suite) -> None:
    loader = DataLoader(rows("dict", "validate"), batch_size=8)
    made = MergeModule([suite.task("dict", data=loader)], "average")
    with pytest.raises(ValueError, match="task 'dict' has a DataLoader for test and validation"):
        refreshed(made)

    class Streaming(TrainingData):
        def train_dataloader(self) -> Any:
            return iter([])

    made = MergeModule([suite.task("dict", data=Streaming("dict"))], "average")
    with pytest.raises(ValueError, match="task 'dict': rows cannot be picked out"):
        refreshed(made)


def test_other_shared_weights_must_fit(untouched: MergeModule) -> None:
    state = untouched.shared_state()
    less = {name: t for name, t in state.items() if name != "body.0.bias"}
    with pytest.raises(ValueError, match=r"'body\.0\.bias' is in model 0 alone"):
        untouched.replace_shared(merging.MergeResult(less), {})


def test_iteration_counts_that_were_not_refreshed_are_let_go_of(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = merged(suite, iterations=[1, 3])
    made.use(1)
    taking(monkeypatch, 0.1, 0.2)
    refreshed(made)
    made.use(1)
    with pytest.raises(ValueError, match=r"no state after 3 iterations.*\[1\] are kept"):
        made.use(3)
