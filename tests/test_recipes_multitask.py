"""recipes/multitask.py on tiny models: who shares what, which rows are seen, resuming, scores."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import merge
import multitask
import multitask_model
import pytest
import torch
import train_tasks
from classifier import Classifier
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from merge_options import Options, parse_options
from multitask_model import Data, Interleaved, MultitaskClassifier, Settings
from test_recipes import WORDS, Crash, bert, configuration
from test_recipes_images import dinov2, write_configuration
from text_model import TextClassifier
from torch import nn
from torch.utils.data import DataLoader

from mats_lightning.checkpoints import load_weights

__all__ = ["bert", "dinov2"]  # fixtures


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def parts(arguments: list[str]) -> tuple[Options, Data, Settings]:
    options = parse_options(arguments)
    data = {task: train_tasks.task_data(options, task) for task in options.task_list}
    settings: dict[Any, Any] = {
        task: train_tasks.task_settings(
            options, task, part, train_tasks.task_module(options, task, part)
        )
        for task, part in data.items()
    }
    return options, data, settings


def test_one_backbone_and_a_head_a_task_or_group(tmp_path: Path, bert: Path) -> None:
    options, data, _ = parts(configuration(tmp_path, bert))  # colour and size share a head
    module = multitask_model.multitask_module(options, data)
    colour, size, kind = (module.classifiers[name] for name in WORDS)
    assert colour.backbone is size.backbone is kind.backbone is module.backbone
    assert colour.head is size.head and colour.head is not kind.head
    assert module.hparams["heads"] == ["group pair", "kind"]
    for task, part in data.items():  # the start is that of the task's own fine-tune
        alone = train_tasks.task_module(options, task, part).state_dict()
        together = module.classifiers[task.name].state_dict()
        assert all(torch.equal(together[name], value) for name, value in alone.items())
    names = [name.partition(".")[0] for name in module.state_dict()]
    assert set(names) == {"backbone", "heads"}
    assert names.count("backbone") == len(module.backbone.state_dict())
    assert names.count("heads") == 4


def test_a_head_moves_in_its_own_batches_alone(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Momentum and weight decay move it in no others."""
    options, data, settings = parts(configuration(tmp_path, bert, epochs=1))
    taken: list[tuple[int, list[torch.Tensor]]] = []  # each batch's head, and the heads before it
    step = MultitaskClassifier.training_step

    def noted(module: MultitaskClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        heads = [nn.utils.parameters_to_vector(head.parameters()).clone() for head in module.heads]
        taken.append(([0, 0, 1][batch[0]], heads))
        return step(module, batch, batch_idx)

    monkeypatch.setattr(MultitaskClassifier, "training_step", noted)
    multitask_model.train_multitask(options, data, settings)
    pairs = list(itertools.pairwise(taken))[2:]  # the learning rate starts at 0
    assert {own for (own, _), _ in pairs} == {0, 1}
    for (own, before), (_, after) in pairs:
        moved = [not torch.equal(*heads) for heads in zip(before, after, strict=True)]
        assert moved == [own == 0, own == 1]


def test_a_head_group_of_unequal_tasks_is_refused(bert: Path) -> None:
    classifiers: dict[str, Classifier] = {
        "a": TextClassifier(2, str(bert)),
        "b": TextClassifier(3, str(bert)),
    }
    with pytest.raises(MisconfigurationException, match=r"'b' has 3 classes.*'pair' have 2"):
        MultitaskClassifier(classifiers, {"a": "pair", "b": "pair"})


def test_every_batch_of_every_loader_comes_once_in_a_random_order() -> None:
    rows = [list(range(10)), list(range(100, 104)), list(range(200, 207))]
    loaders: list[DataLoader[Any]] = [
        DataLoader(part, batch_size=2, shuffle=True)  # type: ignore[arg-type]
        for part in rows
    ]
    together = Interleaved(loaders)
    assert len(together) == 5 + 2 + 4
    orders = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches = list(together)
        for number, part in enumerate(rows):
            seen = [row for owner, batch in batches if owner == number for row in batch.tolist()]  # type: ignore[attr-defined]
            assert sorted(seen) == part
        orders.append([owner for owner, _ in batches])
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_the_rows_and_steps_of_training_are_those_of_the_finetunes(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, data, settings = parts(configuration(tmp_path, bert, epochs=2))
    seen: list[tuple[int, int, tuple[int, ...]]] = []
    rates: list[float] = []
    step = MultitaskClassifier.training_step

    def noted(module: MultitaskClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        number, rows = batch
        for tokens in rows["input_ids"].tolist():
            seen.append((module.current_epoch, number, tuple(tokens)))
        rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
        return step(module, batch, batch_idx)

    monkeypatch.setattr(MultitaskClassifier, "training_step", noted)
    multitask_model.train_multitask(options, data, settings)
    for epoch in (0, 1):
        for number, part in enumerate(data.values()):
            expected = Counter(tuple(row) for row in part._encoded["train"]["input_ids"])
            found = Counter(row for *where, row in seen if where == [epoch, number])
            assert found == expected and found.total() == 96
    # 36 steps: three of warm-up, then down to zero
    assert len(rates) == 2 * 3 * 6
    peak = options.learning_rate
    assert rates[:4] == pytest.approx([0, peak / 3, peak * 2 / 3, peak])
    assert rates[-1] == pytest.approx(peak / 33)


def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, data, settings = parts(configuration(tmp_path, bert, epochs=3))
    whole = multitask_model.train_multitask(options, data, settings)
    assert whole.now and whole.checkpoint.parent.parent == tmp_path / "out/multitask"
    expected = {name: value.clone() for name, value in load_weights(whole.checkpoint).items()}
    assert sorted(path.name for path in whole.checkpoint.parent.iterdir()) == [
        "multitask.ckpt",
        "result.json",
        "settings.json",
    ]

    whole.checkpoint.unlink()
    trained_in: list[int] = []
    step = MultitaskClassifier.training_step

    def counted(module: MultitaskClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        trained_in.append(module.current_epoch)
        if len(trained_in) == 18 + 18 + 5:  # three tasks of six batches an epoch
            raise Crash
        return step(module, batch, batch_idx)

    monkeypatch.setattr(MultitaskClassifier, "training_step", counted)
    with pytest.raises(Crash):
        multitask_model.train_multitask(options, data, settings)
    (newest,) = whole.checkpoint.parent.glob("resume/*.ckpt")
    assert newest.name == "epoch=1.ckpt"

    trained_in.clear()
    torch.manual_seed(123)  # whatever the state of the generator is
    again = multitask_model.train_multitask(
        options, *parts(configuration(tmp_path, bert, epochs=3))[1:]
    )
    assert trained_in == [2] * 18
    found = load_weights(again.checkpoint)
    assert again.now and again.checkpoint == whole.checkpoint
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name

    kept = multitask_model.train_multitask(options, data, settings)
    assert not kept.now and kept.seconds == again.seconds


def test_multitask_beside_the_individual_models(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = configuration(tmp_path, bert)
    (alone,) = multitask.main(arguments)
    assert alone.method == "multitask" and list(alone.scores) == list(WORDS)
    assert min(alone.scores.values()) > 0.9
    out = tmp_path / "out/multitask"
    results = json.loads((out / "results.json").read_text())
    assert results["relative"] is None and results["individual_scores"] is None
    printed = capsys.readouterr().out
    assert "no fine-tune of colour, size, kind with these settings" in printed

    outcomes = merge.main([*arguments, "--methods", "{average: {method: average}}"])
    monkeypatch.setattr(train_tasks, "fit", None)  # the second run keeps its training
    individual, again = multitask.main(arguments)
    assert again == alone
    assert individual.method == "individual" and individual.scores == outcomes[0].scores
    results = json.loads((out / "results.json").read_text())
    assert results["test_scores"] == alone.scores
    quotients = [alone.scores[name] / individual.scores[name] for name in WORDS]
    assert results["relative"] == pytest.approx(sum(quotients) / 3)
    assert not results["trained_in_this_run"] and results["seconds"]["training"] > 0
    assert results["rows"]["kind"]["train"] == 96 and "methods" not in results["options"]
    assert (out / "results.md").read_text().startswith("| method | settings | colour | size | kind")
    assert (out / "results.csv").read_text().count("\n") == 3
    assert "peak memory" in capsys.readouterr().out


def test_multitask_on_images(tmp_path: Path, dinov2: Path) -> None:
    (row,) = multitask.main(write_configuration(tmp_path, dinov2, epochs=12))
    assert list(row.scores) == ["colour", "ground"]
    assert min(row.scores.values()) > 0.9
    results = json.loads((tmp_path / "out/multitask/results.json").read_text())
    assert results["options"]["modality"] == "image"
