"""Heads in a refresh: fitted to the merge, to each step, taken back, kept, gone on with."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from test_module import CLASSES, SHARED, by_hand, make_trainer, rows, suite
from test_refresh import (
    Killed,
    Suite,
    TrainingData,
    assert_same,
    differ,
    logits_of,
    merged,
    pytestmark,
    refreshed,
    taking,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mats_lightning import MergeModule, RefreshPlan, refresh, task_rounds
from mats_lightning.checkpoints import load_weights, save_weights
from mats_lightning.heads import HeadFit, fit_head
from mats_lightning.judge import Judge
from mats_lightning.task_rounds import TaskRounds

__all__ = ["pytestmark", "suite"]  # what a test module has: the warnings, a fixture

COUNTS = (1, 5, 20)
HEAD = ("head.weight", "head.bias")


def head_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: state[name].clone() for name in HEAD}


def grouped(suite: Suite) -> MergeModule:
    """left and right have one head, which is merged."""
    tasks = [
        suite.task(
            name,
            data=TrainingData(name),
            head_group="side" if name in ("left", "right") else None,
        )
        for name in CLASSES
    ]
    return MergeModule(tasks, "mats", {"iterations": 3})


def test_heads_alone_are_fitted_as_by_hand(suite: Suite) -> None:
    module, other = grouped(suite), grouped(suite)
    other.merge()
    (done,) = refreshed(module, rounds=0, heads=COUNTS, rows=30, seed=3)
    assert done.number == 0 and not done.taken and done.seconds["heads"] > 0
    assert list(done.heads) == ["log", "dict", "metric"]
    assert_same(module.shared_state(), other.shared_state())
    before, after = {}, {}
    for task in CLASSES:
        model = other.model(task)
        before[task] = by_hand(model, task, "validate")
        if task in done.heads:
            order = torch.randperm(48, generator=torch.Generator().manual_seed(3))[:30]
            x, y = rows(task, "train").tensors
            fit = fit_head(
                model,
                [[x[order[:16]], y[order[:16]]], [x[order[16:]], y[order[16:]]]],
                HEAD,
                iterations=COUNTS,
                score=lambda m=model, t=task: by_hand(m, t, "validate"),  # type: ignore[misc]
            )
            assert fit.iterations == done.heads[task]
            for name, tensor in fit.state.items():
                torch.testing.assert_close(module.state_of(task)[name], tensor)
        else:  # merged with another's
            assert_same(module.state_of(task), other.state_of(task))
        after[task] = by_hand(module.model(task), task, "validate")
        assert after[task] >= before[task]
    assert done.tried == {"0": pytest.approx(sum(before.values()) / len(CLASSES))}
    assert done.scores == pytest.approx(after)
    assert done.average > done.tried["0"] and any(done.heads.values())
    assert not module.scores
    make_trainer().validate(module, verbose=False)
    assert module.scores == pytest.approx(after)


def test_each_step_has_heads_of_its_own(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the statistics are taken under the heads that were fitted before."""
    module = merged(suite, "log", "dict")
    fitted: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # the model, its new head
    measured: list[dict[str, Tensor]] = []
    measure = TaskRounds._statistics

    def noted(model: Any, *args: Any, **options: Any) -> HeadFit:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        fit = fit_head(model, *args, **options)
        fitted.append((before, fit.state))
        return fit

    def noted_statistics(self: TaskRounds, number: int, task: Any, *args: Any) -> Any:
        measured.append(head_of(task.module.state_dict()))
        return measure(self, number, task, *args)

    monkeypatch.setattr(task_rounds, "fit_head", noted)
    monkeypatch.setattr(TaskRounds, "_statistics", noted_statistics)
    # the merge, its heads; a worse step, half of it
    seen = taking(monkeypatch, 0.5, 0.6, 0.4, 0.7)
    scores = itertools.count()  # the last candidate wins
    monkeypatch.setattr(Judge, "score", lambda self, task: float(next(scores)))
    rounds = refreshed(module, rounds=1, heads=(5,), rows=20)
    assert [done.tried for done in rounds] == [{"0": 0.5}, {"1.0": 0.4, "0.5": 0.7}]
    assert rounds[1].heads == {"log": 5, "dict": 5}
    assert len(fitted) == 6 and len(measured) == 2
    for start, state in zip((0, 1), measured, strict=True):
        torch.testing.assert_close(state, fitted[start][1])
    for first, second, third in ((0, 2, 4), (1, 3, 5)):
        # a step that was taken back leaves no head behind: both begin with those of round 0
        for later in (second, third):
            assert_same(head_of(fitted[later][0]), fitted[first][1])
    assert differ(seen[2], seen[3])
    for name, (_, state) in zip(("log", "dict"), fitted[4:], strict=True):
        assert_same(head_of(module.state_of(name)), state)


def test_a_round_that_is_taken_back_leaves_its_heads_as_they_were(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = merged(suite, "log", "dict")
    taking(monkeypatch, 0.1, 0.6, 0.4, 0.3)
    kept: dict[str, Any] = {}
    put = MergeModule.replace_heads

    def noted(self: MergeModule, given: Any, how: Any) -> None:
        kept.setdefault("first", given)
        put(self, given, how)

    monkeypatch.setattr(MergeModule, "replace_heads", noted)
    rounds = refreshed(module, rounds=2, heads=COUNTS, rows=20, tries=2, folder=tmp_path)
    assert [done.taken for done in rounds] == [False, False]
    for name in ("log", "dict"):
        assert_same(head_of(module.state_of(name)), kept["first"][name])
    assert rounds[1].heads == rounds[0].heads
    assert not (tmp_path / "heads-1.safetensors").exists()


@pytest.mark.parametrize("call", [1, 4, 7])  # of 5 tasks' heads a round
def test_an_interrupted_refresh_has_the_same_heads(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    plan: dict[str, Any] = {"rounds": 1, "rows": 20, "heads": COUNTS}
    whole = merged(suite)
    rounds = refreshed(whole, folder=tmp_path / "whole", **plan)
    calls: list[None] = []

    def counted(*args: Any, **options: Any) -> HeadFit:
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return fit_head(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(task_rounds, "fit_head", counted)
        with pytest.raises(Killed):
            refreshed(merged(suite), folder=tmp_path / "cut", **plan)
    again, finished = merged(suite), merged(suite)
    found = refreshed(again, folder=tmp_path / "cut", **plan)
    assert [(r.scores, r.step, r.heads) for r in found] == [
        (r.scores, r.step, r.heads) for r in rounds
    ]
    monkeypatch.setattr(task_rounds, "fit_head", None)  # nothing is left to fit
    assert refreshed(finished, folder=tmp_path / "cut", **plan) == found
    for task in CLASSES:
        assert_same(again.state_of(task), whole.state_of(task))
        assert_same(finished.state_of(task), whole.state_of(task))


@pytest.mark.parametrize(
    ("where", "call", "done", "error"),  # round 0 validates twice; each round fits two heads
    [
        ("validation", 2, None, RuntimeError),
        ("validation", 3, 0, KeyboardInterrupt),
        ("validation", 4, 1, RuntimeError),
        ("head", 2, None, KeyboardInterrupt),
        ("head", 3, 0, RuntimeError),
        ("head", 6, 1, KeyboardInterrupt),
    ],
)
def test_an_interrupted_round_leaves_nothing_behind(
    suite: Suite,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    call: int,
    done: int | None,
    error: type[BaseException],
) -> None:
    names = ("log", "dict")
    plan: dict[str, Any] = {"rounds": 2, "rows": 20, "mix": 0.5, "heads": (1, 5)}
    calls = dict.fromkeys(("validation", "head"), 0)

    def counted(what: str) -> None:
        calls[what] += 1
        if (what, calls[what]) == (where, call):
            raise error

    def validate(self: Judge) -> float:
        counted("validation")
        best[0] += 0.1
        self.module.scores = dict.fromkeys(names, best[0])
        return 0.5

    def fitted(*args: Any, **options: Any) -> HeadFit:
        counted("head")
        return fit_head(*args, **options)

    def assert_is(found: MergeModule, wanted: MergeModule) -> None:
        for name in names:
            assert_same(found.state_of(name), wanted.state_of(name))
            assert_same(found.tasks[name].module.state_dict(), wanted.state_of(name))
        assert not found.scores

    best, whole, module = [0.0], merged(suite, *names), merged(suite, *names)
    with monkeypatch.context() as patch:
        patch.setattr(Judge, "validate", validate)
        patch.setattr(task_rounds, "fit_head", fitted)
        with pytest.raises(error):
            refreshed(module, folder=tmp_path / "cut", **plan)
        assert calls[where] == call
        after = merged(suite, *names)
        if done is None:
            after.merge()
        else:
            refreshed(after, folder=tmp_path / "cut", **plan | {"rounds": done})
        assert_is(module, after)
        found = refreshed(module, folder=tmp_path / "cut", **plan)
        refreshed(whole, folder=tmp_path / "whole", **plan)
    assert [r.taken for r in found] == [False, True, True]
    assert_is(module, whole)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_same_module_may_go_on(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: float
) -> None:
    names = ("log", "dict")
    plan: dict[str, Any] = {"rows": 20, "mix": 0.5, "heads": (1, 5), "decay": decay}
    whole, module = merged(suite, *names), merged(suite, *names)
    taking(monkeypatch, 0.1, 0.2, 0.3, 0.4)
    rounds = refreshed(whole, rounds=2, **plan)
    seen = taking(monkeypatch, 0.1, 0.2, 0.3, 0.4)
    refreshed(module, rounds=1, folder=tmp_path, **plan)
    found = refreshed(module, rounds=2, folder=tmp_path, **plan)
    assert [(r.step, r.scores, r.heads) for r in found] == [
        (r.step, r.scores, r.heads) for r in rounds
    ]
    assert differ(seen[3], seen[2])
    for name in names:
        assert_same(module.state_of(name), whole.state_of(name))


def test_both_names_of_a_parameter_in_a_head_are_fitted(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Twice(nn.Module):
        """Two layers of one bias."""

        def __init__(self, classes: int) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, classes), nn.Linear(8, classes)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            both: Tensor = self.a(x) + self.b(x.square())
            return both

    names, tasks = ("log", "dict"), []
    for name in names:
        task = suite.task(name, data=TrainingData(name))
        body = load_weights(suite.checkpoint(name))
        task.module.load_state_dict({n: body[n] for n in SHARED}, strict=False)
        task.module.head = Twice(CLASSES[name])
        save_weights(task.module.state_dict(), tmp_path / f"{name}.safetensors")
        tasks.append(replace(task, checkpoint=tmp_path / f"{name}.safetensors"))
    module = MergeModule(tasks, "average")
    fits: list[HeadFit] = []

    def noted(*args: Any, **options: Any) -> HeadFit:
        fits.append(fit_head(*args, **options))
        return fits[-1]

    monkeypatch.setattr(task_rounds, "fit_head", noted)
    scores = itertools.count()  # the last candidate wins
    monkeypatch.setattr(Judge, "score", lambda self, task: float(next(scores)))
    refreshed(module, rounds=0, heads=(5,), rows=20)
    for name, fit in zip(names, fits, strict=True):
        assert set(fit.state) == {"head.a.weight", "head.a.bias", "head.b.weight"}
        wanted = fit.state | {"head.b.bias": fit.state["head.a.bias"]}
        before = load_weights(tmp_path / f"{name}.safetensors")
        for state in (module.state_of(name), module.tasks[name].module.state_dict()):
            for key, tensor in wanted.items():
                assert torch.equal(state[key], tensor) and not torch.equal(before[key], tensor)


def test_a_teacher_fits_heads_without_labels(suite: Suite) -> None:
    names = ("log", "dict")
    found = {}
    for labels in ("right", "wrong"):
        loaders = {}
        for name in names:
            x, y = rows(name, "train").tensors
            y = torch.zeros_like(y) if labels == "wrong" else y
            loaders[name] = DataLoader(TensorDataset(x, y), batch_size=16)
        module = merged(suite, *names)
        (done,) = refreshed(
            module,
            rounds=0,
            heads=COUNTS,
            labels="teacher",
            logits_fn=logits_of,
            loaders=loaders,
        )
        found[labels] = module.state_of("dict")
        assert done.average > done.tried["0"]
    assert_same(found["right"], found["wrong"])


def test_heads_are_fitted_to_the_pretrained_model_too(suite: Suite) -> None:
    tasks = [suite.task(name, data=TrainingData(name)) for name in CLASSES]
    module = MergeModule(tasks, "pretrained", pretrained=suite.pretrained)
    (done,) = refreshed(module, rounds=0, heads=COUNTS)
    assert done.average > done.tried["0"]
    assert_same({n: module.state_of("log")[n] for n in SHARED}, suite.pretrained)
    with pytest.raises(ValueError, match="'pretrained' merges nothing"):
        refreshed(module, rounds=1, heads=COUNTS)


def test_buffers_of_a_head_stay(suite: Suite, tmp_path: Path) -> None:
    tasks = []
    for name in ("log", "dict"):
        task = suite.task(name, data=TrainingData(name))
        task.module.load_state_dict(load_weights(suite.checkpoint(name)))
        task.module.head.register_buffer("seen", torch.tensor([7.0]))  # type: ignore[union-attr]
        save_weights(task.module.state_dict(), tmp_path / f"{name}.safetensors")
        tasks.append(replace(task, checkpoint=tmp_path / f"{name}.safetensors"))
    module = MergeModule(tasks, "average")
    (done,) = refreshed(module, rounds=0, heads=COUNTS)
    assert any(done.heads.values())
    assert all(module.state_of(name)["head.seen"] == 7 for name in done.heads)


def test_the_trainers_loggers_hear_of_no_candidate(suite: Suite, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = make_trainer()
    trainer.loggers = [logger]
    plan = RefreshPlan(rounds=0, heads=(1, 2), labels="data")
    refresh(merged(suite, "log", "dict"), plan, trainer=trainer, progress=False)
    assert trainer.loggers == [logger]
    logger.save()
    lines = Path(logger.experiment.metrics_file_path).read_text().splitlines()
    assert len(lines) == 3  # the header, the merge, its fitted heads
    assert "log/accuracy" in lines[0] and ",accuracy" not in lines[0]


def test_what_cannot_be_done_with_heads_is_refused(suite: Suite) -> None:
    module = merged(suite, "log", "dict")
    with pytest.raises(ValueError, match="no task is named 'other'"):
        module.replace_heads({"other": {}}, {})
    with pytest.raises(ValueError, match=r"head of task 'log': .*'head.bias' is in model 0 alone"):
        module.replace_heads({"log": {"head.weight": torch.zeros(2, 8)}}, {})
    with pytest.raises(ValueError, match=r"heads=\(0,\); iterations from 1 on"):
        RefreshPlan(heads=(0,))
    odd = MergeModule(
        [suite.task(n, data=TrainingData(n), metric="f1") for n in ("log", "dict")], "average"
    )
    with pytest.raises(ValueError, match="did not log its primary metric 'f1'"):
        refreshed(odd, rounds=0, heads=(1,))
    merged_heads = [
        suite.task(n, data=TrainingData(n), head_group="side") for n in ("left", "right")
    ]
    with pytest.raises(ValueError, match="no task has a head of its own to fit"):
        refreshed(MergeModule(merged_heads, "average"), rounds=0, heads=(1,))
