"""MergeModule on five small tasks, fine-tuned here with the callback.

Three have heads of different sizes, two start from one head and may merge it. What a trainer
reports is held against numbers computed by hand, without Lightning, with `module.model(task)`.
"""

import copy
import functools
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from mats_lightning import (
    MaTSStatsCallback,
    MergeModule,
    Statistics,
    Task,
    collect_statistics,
    load_statistics,
    merging,
    methods,
    sidecar_path,
)
from mats_lightning.checkpoints import load_weights

State = Mapping[str, Tensor]

pytestmark = [  # what Lightning says of loaders this small
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*across ranks is zero"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]

CLASSES = {"log": 2, "dict": 3, "metric": 4, "left": 2, "right": 2}
STYLES = {"left": "epoch end", "right": "collection"}  # of logging; the others' are their names
GROUP = ("left", "right")  # start from one head
SHARED = (
    "body.0.weight",
    "body.0.bias",
    "body.2.weight",
    "body.2.bias",
)
ROWS = {"train": 48, "validate": 13, "test": 21}  # the last batches are uneven


class Classifier(pl.LightningModule):
    """Logs "accuracy" in one of the ways in which a LightningModule may log."""

    def __init__(self, classes: int, style: str, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.LayerNorm(width))
            self.head = nn.Linear(width, classes)
        self.style = style
        self.accuracy = MulticlassAccuracy(classes, average="micro")
        self.collection = MetricCollection(
            {"accuracy": MulticlassAccuracy(classes, average="micro")}
        )
        self.correct: list[Tensor] = []
        self.stages: list[str] = []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.03)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        correct = (logits.argmax(-1) == y).float()
        if self.style == "log":
            self.log("accuracy", correct.mean(), prog_bar=True)
        elif self.style == "dict":
            loss = nn.functional.cross_entropy(logits, y)
            self.log_dict({"accuracy": correct.mean(), "loss": loss}, on_epoch=True)
        elif self.style == "metric":
            self.accuracy.update(logits, y)
            self.log("accuracy", self.accuracy, metric_attribute="accuracy")
        elif self.style == "collection":
            self.collection.update(logits, y)
            self.log_dict(self.collection)
        else:
            self.correct.append(correct)

    def on_test_epoch_start(self) -> None:
        self.correct = []

    def on_test_epoch_end(self) -> None:
        if self.style == "epoch end":
            self.log("accuracy", torch.cat(self.correct).mean())

    validation_step = test_step
    on_validation_epoch_start = on_test_epoch_start
    on_validation_epoch_end = on_test_epoch_end


def rows(task: str, stage: str) -> TensorDataset:
    """Random points, labelled by a teacher of the task."""
    number = list(CLASSES).index(task)
    generator = torch.Generator().manual_seed(10 * number + list(ROWS).index(stage))
    x = torch.randn(ROWS[stage], 6, generator=generator)
    teacher = torch.randn(6, CLASSES[task], generator=torch.Generator().manual_seed(100 + number))
    return TensorDataset(x, (x @ teacher).argmax(-1))


class Data(pl.LightningDataModule):
    """Knows its rows after `setup` alone; its validation loader is a list of one."""

    def __init__(self, task: str) -> None:
        super().__init__()
        self.task = task

    def setup(self, stage: str) -> None:
        self.rows = rows(self.task, stage)

    def test_dataloader(self) -> Any:
        return DataLoader(self.rows, batch_size=8)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.rows, batch_size=8)]


def make_trainer(**options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@dataclass
class Suite:
    """What was fine-tuned: <folder>/<task>.ckpt, with its sidecar beside it."""

    folder: Path
    start: dict[str, Tensor]  # the weights that all bodies, and the group's heads, started from

    def checkpoint(self, task: str) -> Path:
        return self.folder / f"{task}.ckpt"

    def task(self, name: str, **changes: Any) -> Task:
        defaults: dict[str, Any] = {
            "module": Classifier(CLASSES[name], STYLES.get(name, name)),
            "checkpoint": self.checkpoint(name),
            "data": Data(name),
        }
        return Task(name, **(defaults | changes))

    def tasks(self, *names: str, **changes: Any) -> list[Task]:
        return [self.task(name, **changes) for name in names or CLASSES]

    @property
    def pretrained(self) -> dict[str, Tensor]:
        return {name: self.start[name] for name in SHARED}

    @property
    def head(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.start.items() if name.startswith("head.")}

    def thetas(self, names: Sequence[str], parameters: Sequence[str] = SHARED) -> list[State]:
        states = [load_weights(self.checkpoint(name)) for name in names]
        return [{p: state[p] for p in parameters} for state in states]

    def statistics(self, names: Sequence[str]) -> list[Statistics]:
        return [load_statistics(self.checkpoint(name)) for name in names]


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    folder = tmp_path_factory.mktemp("tasks")
    for name, classes in CLASSES.items():
        module = Classifier(classes, name)
        trainer = make_trainer(max_epochs=3, callbacks=[MaTSStatsCallback()])
        trainer.fit(module, DataLoader(rows(name, "train"), batch_size=16))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
    return Suite(folder, Classifier(CLASSES["left"], "").state_dict())


def by_hand(model: nn.Module, task: str, stage: str) -> float:
    """Accuracy over all rows at once."""
    x, y = rows(task, stage).tensors
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def assert_equal(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def differ(one: State, other: State) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


# -- what a trainer reports --------------------------------------------------------------------

INDIVIDUAL = {"log": 0.9, "dict": 0.8, "metric": 0.7, "left": 0.6, "right": 0.5}


@pytest.mark.parametrize("stage", ["test", "validate"])
@pytest.mark.parametrize("loaders", ["data modules", "data loaders"])
def test_a_trainer_reports_what_is_computed_by_hand(
    suite: Suite, stage: str, loaders: str, recwarn: pytest.WarningsRecorder
) -> None:
    tasks = suite.tasks()
    if loaders == "data loaders":
        for task in tasks:
            task.data = DataLoader(rows(task.name, stage), batch_size=8)
    module = MergeModule(tasks, "mats", {"iterations": 2}, individual=INDIVIDUAL)
    trainer = make_trainer()
    results = getattr(trainer, stage)(module, verbose=False)

    scores = {name: by_hand(module.model(name), name, stage) for name in CLASSES}
    assert len(set(scores.values())) > 2  # a mix-up of tasks would be seen
    reported = {k: v for result in results for k, v in result.items()}
    assert reported == pytest.approx({k: float(v) for k, v in trainer.callback_metrics.items()})
    for name, score in scores.items():
        assert reported[f"{name}/accuracy"] == pytest.approx(score, abs=1e-6)
    assert "dict/loss" in reported
    assert reported["average"] == pytest.approx(sum(scores.values()) / 5, abs=1e-6)
    relative = sum(scores[name] / INDIVIDUAL[name] for name in scores) / 5
    assert reported["relative"] == pytest.approx(relative, abs=1e-6)
    assert module.scores == pytest.approx(scores, abs=1e-6)
    assert not [w for w in recwarn if "does not run in a MergeModule" in str(w.message)]


def test_without_individual_nothing_is_relative(suite: Suite) -> None:
    module, trainer = MergeModule(suite.tasks(), "average"), make_trainer()
    trainer.test(module, verbose=False)
    assert "average" in trainer.callback_metrics
    assert "relative" not in trainer.callback_metrics


def test_another_primary_metric(suite: Suite) -> None:
    module = MergeModule(suite.tasks("dict", metric="loss"), "individual")
    make_trainer().test(module, verbose=False)
    x, y = rows("dict", "test").tensors
    with torch.no_grad():
        expected = nn.functional.cross_entropy(module.model("dict").eval()(x), y)
    assert module.scores == pytest.approx({"dict": float(expected)}, rel=1e-5)


def test_runs_in_a_row_report_the_same(suite: Suite) -> None:
    module, trainer = MergeModule(suite.tasks(), "mats", {"iterations": 2}), make_trainer()
    first = trainer.test(module, verbose=False)
    trainer.validate(module, verbose=False)
    assert trainer.test(module, verbose=False) == first
    assert make_trainer().test(module, verbose=False) == first


def test_modules_of_the_same_tasks_do_not_disturb_each_other(suite: Suite) -> None:
    """Both put their weights into the tasks' modules; each run has its own."""
    tasks = suite.tasks()
    first, second = (
        MergeModule(tasks, "individual"),
        MergeModule(tasks, "pretrained", pretrained=suite.start),
    )
    make_trainer().test(first, verbose=False)
    alone = first.scores
    make_trainer().test(second, verbose=False)
    assert second.scores != alone
    make_trainer().test(first, verbose=False)
    assert first.scores == alone


def test_children_are_as_they_were_after_a_run(suite: Suite) -> None:
    module = MergeModule(suite.tasks(), "average")
    make_trainer().test(module, verbose=False)
    for task in module.tasks.values():
        assert "log" not in vars(task.module)
        assert task.module._trainer is None


def test_children_are_as_they_were_after_a_crash(suite: Suite) -> None:
    class Crash(Classifier):
        def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
            assert "log" in vars(self)
            assert self.trainer.testing
            raise RuntimeError("out of memory, say")

    module = MergeModule([suite.task("log", module=Crash(2, "log"))], "average")
    with pytest.raises(RuntimeError, match="say"):
        make_trainer().test(module, verbose=False)
    assert "log" not in vars(module.tasks["log"].module)
    assert module.tasks["log"].module._trainer is None


class Shifted(Classifier):
    """Needs its hook: its inputs are moved on the way to the device."""

    def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        assert dataloader_idx == 0  # its own
        assert self.trainer.testing
        return [batch[0] + 3, batch[1]]


class ShiftingData(Data):
    def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
        return [batch[0] - 3, batch[1]]


def test_batch_hooks_of_tasks_run(suite: Suite) -> None:
    tasks = suite.tasks("dict", "metric", "log")
    tasks[1].module = Shifted(4, "metric")
    tasks[2].data = ShiftingData("log")
    module = MergeModule(tasks, "individual")
    make_trainer().test(module, verbose=False)

    def accuracy(name: str, shift: float) -> float:
        x, y = rows(name, "test").tensors
        with torch.no_grad():
            return float((module.model(name).eval()(x + shift).argmax(-1) == y).float().mean())

    shifts = {"dict": 0.0, "metric": 3.0, "log": -3.0}
    assert module.scores == pytest.approx({n: accuracy(n, s) for n, s in shifts.items()})
    assert accuracy("metric", 3.0) != accuracy("metric", 0.0)
    assert accuracy("log", -3.0) != accuracy("log", 0.0)


def test_setup_of_tasks_runs_and_other_hooks_are_named(suite: Suite) -> None:
    class Hooked(Classifier):
        def on_test_batch_end(self, *args: Any) -> None:
            raise AssertionError("it runs after all")

    tasks = [suite.task("dict"), suite.task("log", module=Hooked(2, "log"))]
    with pytest.warns(UserWarning, match=r"task 'log': Hooked\.on_test_batch_end does not run"):
        make_trainer().test(MergeModule(tasks, "average"), verbose=False)
    assert [task.module.stages for task in tasks] == [["test"], ["test"]]


# -- what is merged ----------------------------------------------------------------------------

MERGES: dict[str, dict[str, Any]] = {
    "average": {},
    "task_arithmetic": {"scale": 0.4},
    "ties": {"density": 0.3, "scale": 0.9},
    "dare": {"drop_rate": 0.5, "scale": 0.4, "seed": 3},
    "iso_c": {"scale": 0.4},
    "tsv_m": {"scale": 0.9, "averaged": ["body.2"]},
    "fisher": {"floor": 1e-7, "normalize": True},
    "regmean": {"off_diagonal": 0.8, "uncovered": "pretrained"},
    "mats": {
        "iterations": 3,
        "init": "pretrained",
        "normalize": True,
        "off_diagonal": 0.9,
        "damping": 0.01,
        "objective": ("kfac", "diagonal_fisher"),
    },
}
WEIGHTS = {"dict": 2.0, "log": 1.0, "metric": 0.5, "left": 1.0, "right": 3.0}


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("weights", ["none", "by name", "a list"])
def test_options_mean_what_they_mean_to_the_function(
    suite: Suite, method: str, weights: str
) -> None:
    options, chosen = dict(MERGES[method]), None
    if weights != "none":
        chosen = [WEIGHTS[name] for name in CLASSES]
        options["weights"] = WEIGHTS if weights == "by name" else chosen
    module = MergeModule(suite.tasks(), method, options, pretrained=suite.pretrained)

    arguments: dict[str, Any] = {**MERGES[method], "weights": chosen}
    if method in ("fisher", "regmean", "mats"):
        arguments["statistics"] = suite.statistics(list(CLASSES))
    if method != "average":
        arguments["pretrained"] = suite.pretrained
    if method == "fisher":
        del arguments["pretrained"]
    result = getattr(merging, method)(suite.thetas(list(CLASSES)), **arguments)
    expected = result.state_dict if method == "mats" else result

    module.merge(progress=False)
    for name, task in module.tasks.items():
        own = {k: v for k, v in load_weights(suite.checkpoint(name)).items() if k not in SHARED}
        assert set(own) == {"head.weight", "head.bias"}
        assert_equal(module.state_of(name), {**expected, **own})
        assert_equal(task.module.state_dict(), {**expected, **own})
        assert_equal(module.model(name).state_dict(), {**expected, **own})


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_a_scale_is_that_of_what_was_merged(suite: Suite, method: str) -> None:
    """Of the shared parameters, and of the head of a group."""
    tasks = suite.tasks()
    for task in tasks:
        task.head_group = "polarity" if task.name in GROUP else None
    options: dict[str, Any] = {"iterations": [1, 3]} if method == "mats" else {}
    plain = MergeModule(tasks, method, options)
    longer = MergeModule(
        tasks,
        method,
        {**options, "scale": 1.7},
        pretrained=suite.pretrained,
        pretrained_heads={"polarity": suite.head},
    )
    for count in options.get("iterations", [0]):
        plain.use(count)
        longer.use(count)
        for name in CLASSES:
            merged, found = plain.state_of(name), longer.state_of(name)
            starts = {**suite.pretrained, **(suite.head if name in GROUP else {})}
            for key, value in merged.items():
                start = starts.get(key)
                expected = value if start is None else start + 1.7 * (value - start)
                torch.testing.assert_close(found[key], expected)
        assert differ(plain.shared_state(), longer.shared_state())
    with pytest.raises(ValueError, match="start of the head group 'polarity'"):
        MergeModule(tasks, method, {"scale": 1.7}, pretrained=suite.pretrained).merge()


def test_weights_change_the_merge(suite: Suite) -> None:
    plain = MergeModule(suite.tasks(), "average").state_of("log")
    weighted = MergeModule(suite.tasks(), "average", {"weights": WEIGHTS}).state_of("log")
    assert differ({n: plain[n] for n in SHARED}, weighted)


def test_merge_works_without_a_trainer(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    module = MergeModule(suite.tasks(), "mats", {"iterations": 2})
    module.merge()
    thetas, statistics = suite.thetas(list(CLASSES)), suite.statistics(list(CLASSES))
    expected = merging.mats(thetas, statistics, iterations=2)
    state = module.tasks["dict"].module.state_dict()
    assert_equal({name: state[name] for name in SHARED}, expected.state_dict)
    assert module.blocks == expected.blocks


def test_on_a_device_without_float64_it_merges_on_the_cpu(suite: Suite) -> None:
    module = MergeModule(suite.tasks("log", "dict"), "mats", {"iterations": 1})
    module.merge(device="mps", progress=False)
    assert {tensor.device.type for tensor in module.state_of("log").values()} == {"cpu"}


def test_what_a_module_keeps_beside_its_tensors_stays_its_own(suite: Suite) -> None:
    class Counting(Classifier):
        count = 3

        def get_extra_state(self) -> dict[str, int]:
            return {"count": self.count}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.count = state["count"]

    tasks = [suite.task("log", module=Counting(2, "log")), suite.task("dict")]
    module = MergeModule(tasks, "average")
    counting = module.model("log")
    assert isinstance(counting, Counting)
    assert counting.count == 3
    assert torch.equal(counting.head.weight, load_weights(suite.checkpoint("log"))["head.weight"])


@pytest.mark.parametrize("method", ["fisher", "regmean", "mats"])
def test_what_is_not_covered_is_named(
    suite: Suite, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"mats": {"objective": "gram"}, "fisher": {}, "regmean": {}}[method]
    module = MergeModule(suite.tasks(), method, options)
    with caplog.at_level("INFO"):
        module.merge(progress=False)
    text = "shared parameters: 3 parameters without a statistic of this objective (average):"
    named = [r.getMessage() for r in caplog.records if text in r.getMessage()]
    assert len(named) == (0 if method == "fisher" else 1)
    if named:
        assert "body.0.bias, body.2.weight, body.2.bias" in named[0]


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_running_statistics_are_not_named_as_uncovered(
    suite: Suite, method: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    tasks = []
    for name in ("log", "dict"):
        module = Classifier(CLASSES[name], name)
        module.body.append(nn.BatchNorm1d(8))
        torch.save({"state_dict": module.state_dict()}, tmp_path / name)
        batch = list(rows(name, "train").tensors)
        statistics = collect_statistics(module, [batch], progress=False)
        tasks.append(Task(name, module, tmp_path / name, Data(name), statistics=statistics))
    with caplog.at_level("INFO"):
        MergeModule(tasks, method).merge(progress=False)
    named = [r.getMessage() for r in caplog.records if "without a statistic" in r.getMessage()]
    if method == "fisher":
        assert not named
    else:
        assert "5 parameters without a statistic" in named[0]  # three biases, two weights


def test_individual_and_pretrained_are_rows_of_a_comparison(suite: Suite) -> None:
    individual = MergeModule(suite.tasks(), "individual")
    start = MergeModule(suite.tasks(), "pretrained", pretrained=suite.pretrained)
    for name in CLASSES:
        weights = dict(load_weights(suite.checkpoint(name)))
        assert_equal(individual.model(name).state_dict(), weights)
        assert_equal(start.model(name).state_dict(), {**weights, **suite.pretrained})
        assert differ(suite.pretrained, weights)


def test_pretrained_is_all_of_a_task_that_no_head_owns(suite: Suite) -> None:
    """Of each task, whatever is in another one's head."""
    for heads in ((("head",), ()), ((), ("head",))):
        left, right = (
            suite.task(name, head=head) for name, head in zip(GROUP[:2], heads, strict=True)
        )
        start = {**suite.pretrained, **suite.head}
        module = MergeModule([left, right], "pretrained", pretrained=start)
        for task in (left, right):
            own = suite.pretrained if task.head else start
            expected = {**load_weights(suite.checkpoint(task.name)), **own}
            assert_equal(module.state_of(task.name), expected)


def test_pretrained_may_be_a_path(suite: Suite, tmp_path: Path) -> None:
    torch.save({"state_dict": suite.start}, tmp_path / "start.ckpt")
    options = {"scale": 0.5}
    by_path = MergeModule(suite.tasks(), "task_arithmetic", options, tmp_path / "start.ckpt")
    by_state = MergeModule(suite.tasks(), "task_arithmetic", options, suite.start)
    assert_equal(by_path.state_of("log"), by_state.state_of("log"))


@pytest.mark.parametrize("method", ["average", "mats", "task_arithmetic"])
def test_a_head_group_merges_the_head_of_its_members(suite: Suite, method: str) -> None:
    tasks = suite.tasks()
    for task in tasks:
        if task.name in GROUP:
            task.head_group = "polarity's"
        elif task.name == "log":
            task.head_group = "alone"
    head = ("head.weight", "head.bias")
    thetas = suite.thetas(GROUP, head)
    options: dict[str, Any] = {"weights": WEIGHTS}
    weights = [WEIGHTS[name] for name in GROUP]
    if method == "average":
        expected: State = merging.average(thetas, weights=weights)
    elif method == "mats":
        options["iterations"] = 4
        statistics = suite.statistics(GROUP)
        expected = merging.mats(thetas, statistics, iterations=4, weights=weights).state_dict
    else:
        options["scale"] = 0.4
        expected = merging.task_arithmetic(thetas, suite.head, 0.4, weights=weights)
    module = MergeModule(
        tasks, method, options, suite.pretrained, pretrained_heads={"polarity's": suite.head}
    )
    for name in CLASSES:
        state, own = module.state_of(name), load_weights(suite.checkpoint(name))
        found = {parameter: state[parameter] for parameter in head}
        assert_equal(found, expected if name in GROUP else {p: own[p] for p in head})
    if method == "mats":
        assert set(module.blocks) == {*SHARED, *(f"head group 'polarity's': {p}" for p in head)}


@pytest.mark.parametrize("method", ["average", "mats", "task_arithmetic"])
def test_a_head_group_of_tasks_without_weight_is_averaged(suite: Suite, method: str) -> None:
    tasks = suite.tasks("log", *GROUP)
    for task in tasks[1:]:
        task.head_group = "polarity"
    options: dict[str, Any] = {"weights": [1.0, 0.0, 0.0]}
    if method == "mats":
        options["iterations"] = [1, 2]
    elif method == "task_arithmetic":
        options["scale"] = 1.0
    module = MergeModule(tasks, method, options, suite.start)
    expected = merging.average(suite.thetas(GROUP, ("head.weight", "head.bias")))
    for name in GROUP:
        state = module.state_of(name)
        assert_equal({p: state[p] for p in expected}, expected)
    own = load_weights(suite.checkpoint("log"))
    torch.testing.assert_close(module.shared_state(), {name: own[name] for name in SHARED})


def test_a_start_of_the_shared_parameters_leaves_heads_at_their_average(suite: Suite) -> None:
    states = {}
    for init in ("average", "state dict"):
        start: Any = suite.pretrained if init == "state dict" else init
        tasks = suite.tasks(*GROUP, head_group="polarity")
        module = MergeModule(tasks, "mats", {"iterations": 1, "init": start})
        states[init] = module.state_of("left")
    for name, tensor in states["average"].items():
        assert torch.equal(states["state dict"][name], tensor) == (name not in SHARED), name


def test_averaged_names_are_looked_for_in_all_parts(suite: Suite) -> None:
    """Those of the shared parameters are not in the head, and the other way round."""
    tasks = suite.tasks(*GROUP, head_group="polarity")
    options: dict[str, Any] = {"iterations": 2, "averaged": ["body.2", "head.weight"]}
    module = MergeModule(tasks, "mats", options)
    kinds = {name: block.statistic for name, block in module.blocks.items()}
    identity = {name for name, kind in kinds.items() if kind == "identity"}
    head = "head group 'polarity': head.weight"
    assert identity == {name for name in SHARED if "body.2" in name} | {head}
    options["averaged"] = "body.7"
    with pytest.raises(ValueError, match=r"averaged: no parameter has 'body\.7' in its name"):
        MergeModule(tasks, "mats", options).merge(progress=False)


def test_use_switches_between_iteration_counts(suite: Suite) -> None:
    tasks = suite.tasks()
    for task in tasks:
        task.head_group = "polarity" if task.name in GROUP else None
    module = MergeModule(tasks, "mats", {"iterations": [1, 5, 2], "tolerance": 0.0})
    trainer = make_trainer()
    seen = []
    for count in (5, 1, 2, 5):
        module.use(count)
        alone = MergeModule(suite.tasks(), "mats", {"iterations": count, "tolerance": 0.0})
        for name in set(CLASSES) - set(GROUP):
            assert_equal(module.state_of(name), alone.state_of(name))
            assert_equal(module.tasks[name].module.state_dict(), alone.state_of(name))
        assert max(block.iterations for block in module.blocks.values()) == count
        trainer.test(module, verbose=False)
        for name in CLASSES:
            assert module.scores[name] == pytest.approx(by_hand(module.model(name), name, "test"))
        seen.append(module.state_of("left"))
    assert_equal(seen[0], seen[3])
    assert differ(seen[0], seen[1])


def test_only_one_state_can_be_kept(suite: Suite) -> None:
    tasks = suite.tasks()
    for task in tasks:
        task.head_group = "polarity" if task.name in GROUP else None
    module = MergeModule(tasks, "mats", {"iterations": [1, 5, 2], "tolerance": 0.0})
    module.use(2)
    expected = {name: module.state_of(name) for name in CLASSES}
    module.use(2, only=True)
    for name in CLASSES:
        assert_equal(module.state_of(name), expected[name])
    module.use(2)
    states = module._outcome()._states
    assert len(states) == 2 and all(set(own) == {2} for own in states.values())
    with pytest.raises(ValueError, match=r"no state after 5 iterations; .*\[2\] are kept"):
        module.use(5)


def test_after_the_merge_the_last_count_is_in_use(suite: Suite) -> None:
    module = MergeModule(suite.tasks(), "mats", {"iterations": [1, 5, 2], "tolerance": 0.0})
    module.merge(progress=False)
    assert max(block.iterations for block in module.blocks.values()) == 5


def test_without_iterations_the_default_of_mats_is_a_count(suite: Suite) -> None:
    module = MergeModule(suite.tasks(), "mats", {"tolerance": 0.0})
    count = max(block.iterations for block in module.blocks.values())
    assert count > 0
    module.use(count)


def test_it_merges_once(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    @functools.wraps(merging.average)
    def counted(thetas: Sequence[State], **options: Any) -> Any:
        calls.append(len(thetas))
        return merging.average(thetas, **options)

    monkeypatch.setitem(methods.METHODS, "average", counted)
    tasks = suite.tasks()
    for task in tasks:
        task.head_group = "polarity" if task.name in GROUP else None
    module = MergeModule(tasks, "average")
    make_trainer().test(module, verbose=False)
    make_trainer().validate(module, verbose=False)
    module.merge()
    module.model("log")
    module.use(0)
    assert calls == [5, 2]  # the shared parameters, and the group's head


# -- the model that is handed out --------------------------------------------------------------


def test_a_model_is_independent_and_can_be_trained_after_a_test(suite: Suite) -> None:
    module = MergeModule(suite.tasks(), "mats", {"iterations": 2})
    make_trainer().test(module, verbose=False)

    def everything() -> list[dict[str, Tensor]]:
        states = [module.state_of(name) for name in CLASSES]
        states += [task.module.state_dict() for task in module.tasks.values()]
        states += [dict(load_weights(suite.checkpoint(name))) for name in CLASSES]
        return [{name: tensor.clone() for name, tensor in state.items()} for state in states]

    model = module.model("metric")
    other = module.model("metric")
    before, its_own = everything(), copy.deepcopy(model.state_dict())
    assert not any(p.is_inference() for p in (*model.parameters(), *model.buffers()))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, DataLoader(rows("metric", "train"), batch_size=16))
    trainer.test(model, DataLoader(rows("metric", "test"), batch_size=8), verbose=False)
    assert differ(model.state_dict(), its_own)
    assert_equal(other.state_dict(), its_own)
    for found, expected in zip(everything(), before, strict=True):
        assert_equal(found, expected)


def test_the_module_of_a_task_can_be_trained_after_a_test(suite: Suite) -> None:
    module = MergeModule(suite.tasks("log", "dict"), "average")
    make_trainer().test(module, verbose=False)
    child = module.tasks["log"].module
    before = copy.deepcopy(child.state_dict())
    make_trainer(max_epochs=1).fit(child, DataLoader(rows("log", "train"), batch_size=16))
    assert differ(child.state_dict(), before)


# -- bad input: files --------------------------------------------------------------------------


def test_a_missing_sidecar(suite: Suite, tmp_path: Path) -> None:
    shutil.copy(suite.checkpoint("dict"), tmp_path / "dict.ckpt")
    tasks = [suite.task("log"), suite.task("dict", checkpoint=tmp_path / "dict.ckpt")]
    message = r"task 'dict': no statistics at .*dict\.ckpt\.mats\.safetensors: train with MaTSStats"
    with pytest.raises(FileNotFoundError, match=message):
        MergeModule(tasks, "mats").merge(progress=False)
    MergeModule(tasks, "average").merge(progress=False)  # which needs none


def test_a_sidecar_of_other_weights(suite: Suite) -> None:
    other = sidecar_path(suite.checkpoint("left"))
    tasks = [suite.task("log"), suite.task("right", statistics=other)]
    message = (
        r"task 'right' .* belong to other weights: .* use the sidecar that was saved with this"
    )
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "fisher").merge(progress=False)


def test_a_sidecar_of_another_architecture(suite: Suite) -> None:
    statistics = replace(load_statistics(suite.checkpoint("dict")))
    row = {"name": "body.0.weight", "shape": [9, 6], "statistics": [], "reason": ""}
    statistics.info = {"coverage": [row], "digest": {"body.0.weight": "of a wider one"}}
    tasks = [suite.task("dict", statistics=statistics), suite.task("log")]
    message = r"task 'dict' .*another architecture: 'body\.0\.weight' has shape \(9, 6\) there"
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "fisher").merge(progress=False)


def test_a_missing_checkpoint(suite: Suite, tmp_path: Path) -> None:
    tasks = [suite.task("log"), suite.task("dict", checkpoint=tmp_path / "none.ckpt")]
    with pytest.raises(FileNotFoundError, match=r"task 'dict': no weights at .*none\.ckpt"):
        MergeModule(tasks, "average").merge(progress=False)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint(suite: Suite, tmp_path: Path, share: float) -> None:
    path = tmp_path / "dict.ckpt"
    state = dict(load_weights(suite.checkpoint("dict")))
    torch.save({"state_dict": state, "others": torch.zeros(100_000)}, path)  # of a usual size
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    tasks = [suite.task("log"), suite.task("dict", checkpoint=path)]
    message = r"task 'dict': .*dict\.ckpt cannot be read .* copy or save it again"
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "average").merge(progress=False)


def test_a_truncated_sidecar(suite: Suite, tmp_path: Path) -> None:
    for path in (suite.checkpoint("dict"), sidecar_path(suite.checkpoint("dict"))):
        shutil.copy(path, tmp_path)
    sidecar = sidecar_path(tmp_path / "dict.ckpt")
    sidecar.write_bytes(sidecar.read_bytes()[:-100])
    tasks = [suite.task("log"), suite.task("dict", checkpoint=tmp_path / "dict.ckpt")]
    with pytest.raises(ValueError, match=r"task 'dict': .* damaged or truncated .* copy it again"):
        MergeModule(tasks, "mats").merge(progress=False)


def test_a_checkpoint_of_another_architecture(suite: Suite) -> None:
    wide = suite.task("dict", module=Classifier(3, "dict", width=9))
    message = (
        r"task 'dict': 'body\.0\.weight' has shape \(8, 6\) in .*, Classifier has \(9, 6\): build"
    )
    with pytest.raises(ValueError, match=message):
        MergeModule([suite.task("log"), wide], "average").merge(progress=False)
    deep = Classifier(3, "dict")
    deep.body.append(nn.Linear(8, 8))
    message = (
        r"task 'dict': .* of another architecture than Classifier: 'body\.3\.bias' is in the module"
    )
    with pytest.raises(ValueError, match=message):
        tasks = [suite.task("log"), suite.task("dict", module=deep)]
        MergeModule(tasks, "average").merge(progress=False)


@pytest.mark.parametrize("given", ["nothing", "other names"])
def test_statistics_that_cover_nothing(suite: Suite, given: str) -> None:
    """Everything would be averaged without a word."""
    statistics = Statistics()
    if given == "other names":
        right = load_statistics(suite.checkpoint("dict"))
        statistics = Statistics(
            {f"diagonal_fisher/backbone.{n}": right.diagonal_fisher[n] for n in SHARED}, examples=1
        )
    tasks = [suite.task("log"), suite.task("dict", statistics=statistics)]
    found = "nothing" if given == "nothing" else r"'backbone\.body"
    message = (
        r"task 'dict': its statistics cover none of the parameters to merge"
        rf" \('body\.0\.weight' \.\.\.\), but {found}.*MaTSStatsCallback"
    )
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "fisher").merge(progress=False)


def test_a_statistic_that_was_not_taken(suite: Suite) -> None:
    """The sidecar holds the tasks' diagonal Fishers, and RegMean needs Gram matrices."""
    tasks = suite.tasks("log", "dict")
    for task in tasks:
        taken = load_statistics(task.checkpoint)
        kept = {key: taken.tensors[key] for key in taken.tensors if key.startswith("diagonal")}
        task.statistics = Statistics(kept, taken.examples, info=taken.info)
    message = "regmean of the shared parameters: no parameter .* statistic gram.*model 1 is 'dict'"
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "regmean").merge(progress=False)
    MergeModule(tasks, "fisher").merge(progress=False)


def test_errors_of_the_merge_say_which_model_is_which_task(suite: Suite) -> None:
    taken = load_statistics(suite.checkpoint("dict"))
    broken = {key: taken.tensors[key].clone() for key in taken.tensors}
    broken["G/body.0"][0, 0] = float("nan")
    statistics = replace(taken, tensors=broken)
    tasks = [suite.task("log"), suite.task("dict", statistics=statistics)]
    message = r"mats of the shared parameters: .*'body\.0\.weight' has NaN .*model 1 is 'dict'"
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "mats").merge(progress=False)


# -- bad input: arguments ----------------------------------------------------------------------


def test_warnings_of_the_merge_say_which_model_is_which_task(suite: Suite) -> None:
    tasks = suite.tasks("log", "dict", "metric")
    found = load_statistics(suite.checkpoint("dict"))
    rest = {key: found.tensors[key] for key in found.tensors if key != "G/body.0"}
    tasks[1].statistics = replace(found, tensors=rest)
    module = MergeModule(tasks, "mats", {"weights": [0.0, 1.0, 1.0]})
    message = (
        r"^mats of the shared parameters: 'body\.0\.weight' has the statistic kfac in model 1 but"
        r" not in model 0: it is averaged.* \(model 0 is 'dict', model 1 is 'metric'\)"
    )
    with pytest.warns(UserWarning, match=message):
        module.merge(progress=False)


def test_a_task_of_weight_0_needs_no_statistics(suite: Suite, tmp_path: Path) -> None:
    tasks = suite.tasks("log", "dict", "metric")
    bare = Path(shutil.copy(tasks[0].checkpoint, tmp_path))
    assert not sidecar_path(bare).exists()
    tasks[0] = replace(tasks[0], checkpoint=bare)
    found = MergeModule(tasks, "mats", {"weights": [0.0, 1.0, 1.0]}).shared_state()
    expected = MergeModule(tasks[1:], "mats").shared_state()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_another_head_size_without_head(suite: Suite) -> None:
    message = (
        r"average of the shared parameters: 'head\.weight' has shape \(2, 8\) in model 0 and"
        r" \(3, 8\) in model 1; a head of another size belongs to its task"
        r".*model 0 is 'log', model 1 is 'dict'"
    )
    with pytest.raises(ValueError, match=message):
        MergeModule(suite.tasks("log", "dict", head=()), "average").merge(progress=False)


def test_heads_that_are_named_differently(suite: Suite) -> None:
    tasks = [suite.task("log"), suite.task("dict", head=("head", "body.2"))]
    message = (
        r"'log' and 'dict' do not have the same parameters .*'body\.2\.bias'.*Task\(head=\.\.\.\)"
    )
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "average").merge(progress=False)


def several_loaders(suite: Suite) -> list[Task]:
    class Two(Data):
        def test_dataloader(self) -> Any:
            return {"a": DataLoader(self.rows), "b": DataLoader(self.rows)}

    return [suite.task("log"), suite.task("dict", data=Two("dict"))]


def same_module(suite: Suite) -> list[Task]:
    module = Classifier(2, "log")
    return [suite.task("left", module=module), suite.task("right", module=module)]


def same_body(suite: Suite) -> list[Task]:
    tasks = suite.tasks("log", "dict")
    tasks[1].module.body = tasks[0].module.body
    return tasks


BAD_TASKS: dict[str, tuple[Callable[[Suite], list[Task]], str]] = {
    "none": (lambda s: [], "needs at least one task"),
    "named twice": (
        lambda s: s.tasks("log", "dict", "log"),
        "two tasks are named 'log': give each",
    ),
    "one module": (
        same_module,
        r"tasks 'left' and 'right' share 'body\.0\.weight': each needs a Li",
    ),
    "one body": (same_body, r"tasks 'log' and 'dict' share 'body\.0\.weight': each needs"),
    "no such head": (
        lambda s: s.tasks("log", "dict", head=("classifier",)),
        r"task 'log': no parameter of Classifier belongs to the head 'classifier'; its names begin"
        r" with body, head; pass head=\(\)",
    ),
    "half a name": (lambda s: s.tasks("log", head=("hea",)), "belongs to the head 'hea'"),
    "a group without a head": (
        lambda s: s.tasks("left", "right", head=(), head_group="g"),
        r"task 'left' is in the head group 'g' and has no head: .*Task\(head=\.\.\.\)",
    ),
    "several loaders": (several_loaders, "task 'dict' has 2 test data loaders; make each a task"),
    "no primary metric": (
        lambda s: [s.task("log"), s.task("dict", metric="f1")],
        r"task 'dict' did not log its primary metric 'f1'; it logged accuracy, loss; .*\(metric=",
    ),
    "no rows": (
        lambda s: [s.task("log"), s.task("dict", data=DataLoader(TensorDataset(torch.ones(0, 6))))],
        "task 'dict' did not log its primary metric 'accuracy'; it logged nothing",
    ),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_bad_tasks(suite: Suite, case: str) -> None:
    make, message = BAD_TASKS[case]
    with pytest.raises(ValueError, match=message):
        make_trainer().test(MergeModule(make(suite), "average"), verbose=False)


def tied(suite: Suite, head: tuple[str, ...]) -> Task:
    module = Classifier(6, "log", width=6)
    module.head.weight = module.body.get_parameter("0.weight")
    return suite.task("log", module=module, head=head)


@pytest.mark.parametrize("head", [("head",), ("body.0.weight",)])
def test_a_parameter_cannot_be_the_task_s_and_be_merged(
    suite: Suite, head: tuple[str, ...]
) -> None:
    message = (
        r"task 'log': 'body\.0\.weight' and 'head\.weight' are one parameter, .*: name both in"
        r" Task\(head=\.\.\.\), or neither"
    )
    with pytest.raises(ValueError, match=message):
        MergeModule([tied(suite, head)], "average")


@pytest.mark.parametrize("head", [("head", "body.0"), ()])
def test_a_parameter_may_be_tied_within_the_head_or_what_is_merged(
    suite: Suite, tmp_path: Path, head: tuple[str, ...]
) -> None:
    tasks = [tied(suite, head), replace(tied(suite, head), name="other")]
    for i, task in enumerate(tasks):
        state = {n: t + i for n, t in task.module.state_dict().items()}
        task.checkpoint = tmp_path / f"{task.name}.ckpt"
        torch.save({"state_dict": state}, task.checkpoint)
    module = MergeModule(tasks, "average")
    for i, name in enumerate(module.tasks):
        model = module.model(name)
        expected = tasks[0].weights["head.weight"] + (i if head else 0.5)
        torch.testing.assert_close(model.get_parameter("head.weight"), expected)
        assert model.get_parameter("head.weight") is model.get_parameter("body.0.weight")


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "avrage"}, "no method is called 'avrage'; choose from average, task_ar"),
    "option": (
        {"method": "fisher", "options": {"iterations": 3}},
        "fisher has no option 'iterations'; it has floor, lora_rank, normalize, scale, uncovered",
    ),
    "option of a reference": (
        {"method": "individual", "options": {"scale": 3}},
        "individual has no option 'scale'; it has none",
    ),
    "ours": ({"options": {"statistics": []}}, "mats has no option 'statistics'"),
    "missing": ({"method": "ties", "options": {"density": 0.2}}, "ties needs the option 'scale'"),
    "pretrained": (
        {"method": "ties", "options": {"density": 0.2, "scale": 1.0}},
        "'ties' .* needs the model that the tasks started from: pass pretrained=",
    ),
    "init": ({"options": {"init": "pretrained"}}, "'mats' .* pass pretrained="),
    "scale": ({"options": {"scale": 1.5}}, "'mats' with {'scale': 1.5} .* pass pretrained="),
    "scale of none": (
        {"method": "average", "options": {"scale": 1.5}},
        "average has no option 'scale'; it has lora_rank",
    ),
    "no number": ({"options": {"scale": float("nan")}}, "scale=nan: a finite number"),
    "unknown weight": (
        {"options": {"weights": {"log": 1, "dict": 1, "dcit": 2}}},
        r"options\['weights'\]: 'dcit' is no task, or has no weight; the tasks are log, dict",
    ),
    "missing weight": (
        {"options": {"weights": {"log": 1}}},
        r"'dict' is no task, or has no weight",
    ),
    "number of weights": ({"options": {"weights": [1, 2, 3]}}, "3 weights for 2 models"),
    "negative weight": (
        {"options": {"weights": {"log": 1, "dict": -1}}},
        "must be finite, not neg",
    ),
    "unknown individual": (
        {"individual": {"log": 1.0, "dcit": 1.0, "dict": 1.0}},
        "individual: 'dcit' is no task, or is missing; the tasks are log, dict",
    ),
    "missing individual": (
        {"individual": {"log": 1.0}},
        "individual: 'dict' is no task, or is miss",
    ),
    "zero individual": (
        {"individual": {"log": 1.0, "dict": 0.0}},
        "individual: 'dict' has the score 0, and nothing is relative to that",
    ),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_at_once(suite: Suite, case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(ValueError, match=message):
        MergeModule(suite.tasks("log", "dict"), **arguments)


def test_a_head_group_needs_its_start_where_the_method_does(suite: Suite) -> None:
    tasks = suite.tasks(*GROUP, head_group="polarity")
    module = MergeModule(tasks, "task_arithmetic", {"scale": 0.4}, suite.pretrained)
    with pytest.raises(
        ValueError, match=r"start of the head group 'polarity': pass pretrained_heads="
    ):
        module.merge(progress=False)


@pytest.mark.parametrize(
    ("method", "options"), [("pretrained", {}), ("mats", {"init": "pretrained"})]
)
def test_a_start_with_other_names(suite: Suite, method: str, options: dict[str, Any]) -> None:
    start = {f"model.{name}": tensor for name, tensor in suite.pretrained.items()}
    module = MergeModule(suite.tasks(), method, options, start)
    message = (
        r"'body\.0\.weight' \.\.\. against 'model\.body\.0\.weight' \.\.\.; is a prefix missing"
    )
    with pytest.raises(ValueError, match=message):
        module.merge(progress=False)
    incomplete = {name: suite.start[name] for name in SHARED[1:]}
    with pytest.raises(
        ValueError, match=r"the pretrained model .*: 'body\.0\.weight' is in model 0"
    ):
        MergeModule(suite.tasks(), method, options, incomplete).merge(progress=False)


def test_states_and_tasks_that_are_not_there(suite: Suite) -> None:
    module = MergeModule(suite.tasks("log", "dict"), "mats", {"iterations": [2, 1]})
    with pytest.raises(ValueError, match=r"no state after 3 iterations; .* gave \[1, 2\]"):
        module.use(3)
    with pytest.raises(ValueError, match="no task is named 'metric'; there are log, dict"):
        module.model("metric")
