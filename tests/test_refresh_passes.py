"""What a refresh shows the tasks' modules in its own passes, and what it leaves in them."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from test_module import CLASSES, Classifier, Suite, make_trainer, rows, suite
from test_refresh import TrainingData, logits_of, merged, refreshed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchmetrics.classification import MulticlassAccuracy

from mats_lightning import MergeModule, RefreshPlan, collect_statistics, merging, refresh
from mats_lightning.checkpoints import save_state
from mats_lightning.judge import Judge
from mats_lightning.measuring import measure
from mats_lightning.passes import evaluating
from mats_lightning.refresh import _Refresh
from mats_lightning.rounds import Round
from mats_lightning.task_rounds import TaskRounds

__all__ = ["suite"]  # a fixture

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


def merge_of(suite: Suite, kind: type[Classifier], data: type[TrainingData]) -> MergeModule:
    tasks = [
        suite.task(name, module=kind(CLASSES[name], "metric"), data=data(name)) for name in CLASSES
    ]
    return MergeModule(tasks, "mats", {"iterations": 3})


def task_rounds(module: MergeModule, **options: Any) -> TaskRounds:
    module.merge()
    plan = RefreshPlan(labels="data", **options)
    return TaskRounds(module, plan, make_trainer(), logits_of, None, {}, {}, False)


# -- metrics -------------------------------------------------------------------------------------


class Counting(Classifier):
    """One metric for training and validation."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self(x)
        self.accuracy.update(logits, y)
        return F.cross_entropy(logits, y)


def test_metrics_of_a_training_step_do_not_come_into_validation(suite: Suite) -> None:
    def run(kind: type[Classifier]) -> Round:
        module = merge_of(suite, kind, TrainingData)
        plan = RefreshPlan(rounds=0, labels="data", heads=(1, 10))
        (done,) = refresh(module, plan, trainer=make_trainer(), progress=False)
        modules: list[Any] = [task.module for task in module.tasks.values()]
        assert not any(own.accuracy.update_called for own in modules)
        return done

    found, wanted = run(Counting), run(Classifier)
    assert found.heads == wanted.heads and any(found.heads.values())
    assert found.scores == wanted.scores and found.losses == wanted.losses


def test_what_a_metric_held_before_stays() -> None:
    metric = MulticlassAccuracy(2, average="micro")
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    model = nn.ModuleDict({"metric": metric, "other": MulticlassAccuracy(2)})
    with evaluating(model):
        metric.update(torch.tensor([0, 1]), torch.tensor([1, 0]))
        model["other"](torch.tensor([0]), torch.tensor([0]))
        assert not metric.training
    assert float(metric.compute()) == 0.5 and metric.training
    assert not model["other"].update_called


# -- batches -------------------------------------------------------------------------------------


class Scaled(TrainingData):
    """Doubles what a batch holds on its way; halved in the rows, so that nothing changes."""

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:  # a name of its own
        return [batch[0] * 2, batch[1]]

    def _halved(self, loader: Any) -> Any:
        x, y = loader.dataset.tensors
        return DataLoader(TensorDataset(x / 2, y), batch_size=loader.batch_size)

    def train_dataloader(self) -> Any:
        return self._halved(super().train_dataloader())

    def val_dataloader(self) -> Any:
        return self._halved(super().val_dataloader()[0])


class Asking(Classifier):
    """Its hook looks at the trainer; the data module's stands in its place, if it has one."""

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        assert not self.trainer.training
        return batch


@pytest.mark.parametrize("by", ["solving", "training"])
def test_batches_come_by_the_hooks_of_the_data_module(suite: Suite, by: str) -> None:
    results = []
    for kind, data in ((Classifier, TrainingData), (Asking, TrainingData), (Asking, Scaled)):
        module = merge_of(suite, kind, data)
        options: dict[str, Any] = {"by": by, "judge": "loss", "learning_rate": 0.01, "heads": (5,)}
        found = refreshed(module, labels="teacher", logits_fn=logits_of, **options)
        assert all("on_after_batch_transfer" not in vars(t.module) for t in module.tasks.values())
        results.append((found, module.shared_state()))
    for found, state in results[1:]:
        for one, other in zip(found, results[0][0], strict=True):
            assert one.step == other.step and one.heads == other.heads
            assert one.losses == pytest.approx(other.losses, rel=1e-4)
        for name, tensor in results[0][1].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=1e-5)


class Locked(TrainingData):
    """Has a hook, and what cannot be copied."""

    def __init__(self, task: str) -> None:
        super().__init__(task)
        self.lock = Lock()

    def on_after_batch_transfer(self, batch: Any, index: int) -> Any:
        return batch


@pytest.mark.parametrize("plan", [{"by": "training"}, {"by": "solving"}, {"rounds": 0}])
def test_a_teacher_is_no_copy_of_the_data(suite: Suite, plan: dict[str, Any]) -> None:
    options: dict[str, Any] = {"heads": (5,), "labels": "teacher", "logits_fn": logits_of} | plan
    found, wanted = (
        refreshed(merge_of(suite, Classifier, data), **options) for data in (Locked, TrainingData)
    )
    assert [done.losses for done in found] == [done.losses for done in wanted]


@pytest.mark.parametrize("by", ["solving", "training"])
def test_a_teacher_runs_once_for_each_batch(
    suite: Suite, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[Any], dict[str, Tensor], int]:
        module = merge_of(suite, Classifier, TrainingData)
        own = {id(task.module) for task in module.tasks.values()}
        came: list[int] = []

        def logits(model: Any, batch: list[Tensor]) -> Tensor:
            if id(model) not in own:
                came.append(len(batch[1]))
            return logits_of(model, batch)

        options: dict[str, Any] = {"by": by, "rows": 20, "heads": (5,), "judge": "loss"}
        options |= {"rounds": 2, "learning_rate": 0.01, "labels": "teacher"}
        found = refreshed(module, logits_fn=logits, **options)
        judged = [(done.tried, done.losses, done.heads) for done in found]
        return judged, module.shared_state(), sum(came)

    found, state, examples = run()
    monkeypatch.setattr("mats_lightning.distillation._content", lambda batch: None)
    expected, expected_state, many = run()
    assert found == expected
    for name, tensor in expected_state.items():
        assert torch.equal(state[name], tensor), name
    validated = sum(len(rows(name, "validate")) for name in CLASSES)
    assert examples == 20 * len(CLASSES) + validated < many / 3


class Caching(Classifier):
    """Keeps a tensor that its first forward pass makes, as for positions."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.9, 1.1, x.shape[1])
        logits: Tensor = super().forward(x * self.table)
        return logits


@pytest.mark.parametrize("by", ["solving", "training"])
def test_what_a_validation_leaves_in_a_module_can_train(suite: Suite, by: str) -> None:
    module = merge_of(suite, Caching, TrainingData)
    trainer = make_trainer(inference_mode=True)
    plan = RefreshPlan(by=by, labels="data", heads=(5,))  # type: ignore[arg-type]
    assert len(refresh(module, plan, trainer=trainer, progress=False)) == 2
    assert trainer.validate_loop.inference_mode


@pytest.mark.parametrize("labels", ["data", "teacher"])
def test_sampled_curvature_goes_with_a_loss_of_its_own(suite: Suite, labels: str) -> None:
    """The loss is for heads and what judges."""

    def run(**options: Any) -> list[Round]:
        module = merge_of(suite, Classifier, TrainingData)
        plan: Any = {"by": "solving", "fisher": "sampled", "heads": (5,), "labels": labels}
        return refresh(
            module,
            RefreshPlan(**plan),
            trainer=make_trainer(),
            progress=False,
            logits_fn=logits_of,
            **options,
        )

    found = run(loss_fn=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))
    assert [done.losses for done in found] == [done.losses for done in run()]


class Splitting(TrainingData):
    """Splits at random, anew each time."""

    calls = 0

    def setup(self, stage: str) -> None:
        Splitting.calls += 1
        super().setup("validate")
        self.parts: list[Any] = random_split(rows(self.task, "train"), [0.5, 0.5])

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], batch_size=16, shuffle=True)


def test_rows_are_asked_for_once(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    before = TaskRounds._picked

    def picked(self: TaskRounds, task: Any) -> Any:
        seen.append(task)
        return before(self, task)

    monkeypatch.setattr(TaskRounds, "_picked", picked)
    module = merge_of(suite, Classifier, Splitting)
    refreshed(module, by="training", rounds=2, judge="loss", learning_rate=0.01)
    assert len(seen) == len(CLASSES)
    # the loaders, and one a validation of Lightning's: its own way
    assert Splitting.calls <= len(CLASSES) * (2 + 7)


class Hooked(TrainingData):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("the data was copied")


def test_a_tasks_own_model_does_not_copy_its_data(suite: Suite) -> None:
    """Which the module's hooks lead to, where they are those of its data module."""
    module = merge_of(suite, Classifier, Hooked)
    plan = RefreshPlan(heads=(), rows=48)
    (_, done) = refresh(module, plan, trainer=make_trainer(), logits_fn=logits_of, progress=False)
    assert done.tried


# -- losses that judge ---------------------------------------------------------------------------


def test_losses_need_no_gradient_and_may_be_infinite(suite: Suite) -> None:
    module = merged(suite)
    judge = Judge(module, make_trainer(), task_rounds(module, heads=()).loss_fn_of)
    for task in module.tasks.values():
        task.module.requires_grad_(False)
    judge.validate()
    assert list(judge.losses) == list(module.tasks)
    assert all(0 < loss < 10 for loss in judge.losses.values())
    name, task = next(iter(module.tasks.items()))
    own: Any = task.module
    with torch.no_grad():
        own.head.weight.fill_(float("nan"))
    assert math.isnan(judge._loss(name, None))
    before = Round(0, 0.0, {name: 0.5}, {}, losses={name: 1.0})
    for loss, better in ((float("nan"), False), (float("inf"), False), (1.0, True), (1.1, False)):
        done = Round(1, 1.0, {name: 0.9}, {}, losses={name: loss})
        assert done.is_no_worse(before) == better


@pytest.mark.parametrize("judge", ["loss", "score"])
@pytest.mark.parametrize("by", ["training", "solving"])
def test_a_step_that_destroys_the_model_is_a_worse_one(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str, judge: str
) -> None:
    refreshing: Any = sys.modules[_Refresh.__module__]  # a function has its name in the package
    between = refreshing._between
    spoilt = {1.0}

    def spoiling(before: Any, after: Any, share: float) -> Any:
        state = between(before, after, share)
        return {n: t * math.nan for n, t in state.items()} if share in spoilt else state

    monkeypatch.setattr(refreshing, "_between", spoiling)
    options: dict[str, Any] = {"by": by, "judge": judge, "heads": (1,), "learning_rate": 0.01}
    module = merged(suite)
    rounds = refreshed(module, folder=tmp_path, tries=6, rounds=1, **options)
    assert math.isnan(rounds[1].tried["1.0"]) and rounds[1].step < 1
    assert all(t.isfinite().all() for t in module.shared_state().values())
    assert str(refreshed(merged(suite), folder=tmp_path, tries=6, rounds=1, **options)) == str(
        rounds
    )
    spoilt |= {0.5, 0.25}
    module = merged(suite)
    rounds = refreshed(module, rounds=1, **options)
    assert not rounds[1].taken and all(map(math.isnan, rounds[1].tried.values()))
    assert rounds[1].seconds["heads"] > 0  # of fits that came to nothing
    wanted = merged(suite)
    refreshed(wanted, **options | {"rounds": 0})
    for task in module.tasks:
        for name, tensor in wanted.state_of(task).items():
            assert torch.equal(module.state_of(task)[name], tensor), name


def test_what_judges_is_what_is_kept_and_told(
    suite: Suite, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"by": "training", "judge": "loss", "learning_rate": 0.01}
    rounds = refreshed(merged(suite), folder=tmp_path, heads=(1,), **options)
    assert rounds[1].tried == {"1.0": pytest.approx(rounds[1].judged)}
    assert rounds[0].judged == pytest.approx(sum(rounds[0].losses.values()) / len(CLASSES))
    told = f"losses {rounds[0].judged:.4f} -> {rounds[1].judged:.4f}"
    assert any(told in record.message for record in caplog.records)


def test_a_folder_knows_what_was_validated_on(suite: Suite, tmp_path: Path) -> None:
    plan = RefreshPlan(heads=(), labels="data")
    trainer = make_trainer(limit_val_batches=1)
    refresh(merged(suite), plan, trainer=trainer, folder=tmp_path, progress=False)
    with pytest.raises(ValueError, match="has another number of validation batches"):
        refresh(merged(suite), plan, trainer=make_trainer(), folder=tmp_path, progress=False)


# -- plans ---------------------------------------------------------------------------------------


def test_a_step_of_a_training_is_a_part_of_it(suite: Suite) -> None:
    states = []
    for step in (1.0, 0.25):
        module = merged(suite)
        module.merge()
        start = module.shared_state()
        options: dict[str, Any] = {"by": "training", "learning_rate": 0.01, "judge": "loss"}
        (_, done) = refreshed(module, step=step, **options)
        assert done.step == step
        states.append({n: t - start[n] for n, t in module.shared_state().items()})
    for name, moved in states[0].items():
        torch.testing.assert_close(states[1][name], moved / 4, rtol=1e-3, atol=1e-6)


def test_the_evidence_of_the_last_solve_stays(
    suite: Suite, caplog: pytest.LogCaptureFixture
) -> None:
    module = merged(suite)
    module.merge()
    merge = dict(module.blocks)
    assert merge
    rounds = refreshed(module, step=1e6, tries=1)  # taken back
    assert not rounds[1].taken and module.blocks == merge
    module = merged(suite)
    assert refreshed(module, objective="gram", step=1e-6)[1].taken
    assert set(module.blocks) == {"body.0.weight"} != set(merge)
    told = "refresh: 3 parameters without a statistic of this objective stay as they are"
    assert any(told in record.message for record in caplog.records)


def test_an_interrupted_round_leaves_the_evidence_too(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: _Refresh, *arguments: Any) -> None:
        raise KeyboardInterrupt

    module = merged(suite)
    module.merge()
    merge = dict(module.blocks)
    monkeypatch.setattr(_Refresh, "_solved", stop)
    with pytest.raises(KeyboardInterrupt):
        refreshed(module)
    assert module.blocks == merge


def test_a_gradient_steps_from_where_all_tasks_are() -> None:
    """No distance to the tasks bounds a step that their gradient asks for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]
    found = collect_statistics(
        model,
        batches,
        statistics=("kfac", "block_fisher", "gradient"),
        loss_fn=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        progress=False,
    )
    theta = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for mix in (0.5, 1.0):
        result = merging.refresh_step(theta, [found], [theta], mix=mix, damping=0.1)
        moved = {n: float((t - theta[n]).norm()) for n, t in result.state_dict.items()}
        assert all(distance > 1e-3 for distance in moved.values()), (mix, moved)


# -- parties -------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_leave_the_module_as_it_was(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = {name: tensor + 1 for name, tensor in before.items()}
    other["1.weight"] = torch.zeros(5, 3)
    save_state(other, tmp_path / "merged.safetensors")

    def none() -> Iterator[Any]:
        raise AssertionError("read")
        yield

    with pytest.raises(ValueError, match=r"'1\.weight' has shape \(5, 3\)"):
        measure(tmp_path / "merged.safetensors", module, none(), tmp_path / "a.mats.safetensors")
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# -- a loss of one's own -------------------------------------------------------------------------


class Manual(Classifier):
    """Optimizes by itself, so its training_step gives no loss."""

    def __init__(self, classes: int, style: str) -> None:
        super().__init__(classes, style)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        raise AssertionError("it would train")


@pytest.mark.parametrize("by", ["solving", "training"])
def test_modules_that_optimize_by_themselves_need_a_loss(suite: Suite, by: str) -> None:
    def loss(module: Any, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    options: dict[str, Any] = {"labels": "data", "judge": "loss", "learning_rate": 0.01}
    plan = RefreshPlan(by=by, heads=(5,), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Manual optimizes manually, .* pass loss_fn="):
        refresh(merge_of(suite, Manual, TrainingData), plan, trainer=make_trainer(), progress=False)
    results = []
    for kind, loss_fn in ((Manual, loss), (Classifier, None)):
        module = merge_of(suite, kind, TrainingData)
        rounds = refresh(module, plan, trainer=make_trainer(), loss_fn=loss_fn, progress=False)
        results.append((rounds, module.shared_state()))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one.step == other.step and one.losses == pytest.approx(other.losses)
    for name, tensor in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], tensor)
