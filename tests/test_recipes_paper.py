"""recipes/paper.py on a tiny model: what is measured, kept, chosen, resumed and reported."""

import csv
import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import merge
import paper
import paper_seeds
import paper_settings
import pytest
import torch
import train_tasks
import yaml
from bench import Opened
from cells import Cell, Cells, Merge
from compare import check_fit, merges_of
from finetunes import starts
from merge_options import MethodOptions
from paper_intermediate import TransferTable
from paper_lines import AblationTable, StartTable
from paper_long import FIXED, read_long
from paper_records import Record, merge_seconds
from paper_seeds import Seed, Suite, collected_path
from paper_settings import read_setting
from test_recipes import GRID, WORDS, Crash, bert, configuration, write_task
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from train_tasks import task_module

from mats_lightning import MergeModule, Task, collect_statistics, load_statistics

__all__ = ["bert"]  # a fixture

METHODS: dict[str, Any] = {
    "pretrained": {"method": "pretrained"},
    "average": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic", "grid": {"scale": [0.1, 0.4, 2.0]}},
    "MaTS kfac": {
        "method": "mats",
        "options": {"objective": "kfac"},
        "grid": {"normalize": [False, True], "iterations": [1, 3]},
    },
}
STARTS: dict[str, Any] = {
    "labels": ["pretrained", "average", "task arithmetic"],
    "objectives": ["gram", "kfac"],
    "solvers": {"plain": {"iterations": [1, 4], "options": {"preconditioner": None}}},
}
ABLATIONS: dict[str, Any] = {
    "baselines": {"kfac": {"method": "mats", "options": {"iterations": 2}}},
    "changes": [
        {"baseline": "kfac", "label": "normalize off", "options": {"normalize": False}},
        {
            "baseline": "kfac",
            "label": "40 rows, sampled",
            "statistics": {
                "rows": 40,
                "statistics": ["kfac", "block_fisher"],
                "fisher": "sampled",
            },
        },
    ],
}

TRANSFER: dict[str, Any] = {
    "targets": ["colour", "size"],
    "donors": ["size", "kind"],
    "few_rows": 16,
    "few_epochs": 2,
    "donor_weights": [0.2, 0.6],
    "methods": {"average": {"method": "average"}, "RegMean": {"method": "regmean"}},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def setting(folder: Path, bert: Path, **parts: Any) -> Path:
    """A file with three tiny tasks, and the tables that are given."""
    options = {
        "tasks": [
            {"name": name, "hub": {"dataset": str(write_task(folder / "data" / name, name))}}
            for name in WORDS
        ],
        "model": str(bert),
        "output_dir": str(folder / "out"),
        "epochs": 3,
        "learning_rate": 2e-2,
        "batch_size": 16,
        "train_rows": 96,
        "accelerator": "cpu",
    }
    path = folder / "tiny.yaml"
    made = {"options": options, "seeds": [0], **parts}
    path.write_text(yaml.safe_dump(made, sort_keys=False))
    return path


def run(path: Path, *arguments: str) -> list[Any]:
    return paper.main(["--setting", str(path), *arguments])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "out/results/tiny.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: list[dict[str, str]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def seed_of(path: Path, seed: int = 0) -> Seed:
    return Seed(read_setting(str(path))[1], seed)


def by_hand(
    path: Path, method: str, options: dict[str, Any], stage: str, seed: int = 0
) -> dict[str, float]:
    """Accuracies of a merge of the fine-tunes on disk, in a loop of our own."""
    own = seed_of(path, seed)
    folders = [own.suite.about(name)[0] for name in WORDS]
    tasks = [
        Task(name, own.suite.start(name).module, folder / f"{name}.ckpt", data)
        for (name, data), folder in zip(
            ((task.name, data) for task, data in own.suite.data.items()), folders, strict=True
        )
    ]
    module = MergeModule(tasks, method, options, pretrained=own.starts[0])
    found = {}
    for task in tasks:
        data: Any = task.data
        data.setup()
        loader = data.test_dataloader() if stage == "test" else data.val_dataloader()
        model: Any = module.model(task.name).eval()
        with torch.no_grad():
            right = [(model(b).argmax(-1) == b["labels"]).float() for b in loader]
        found[task.name] = float(torch.cat(right).mean())
    return found


def test_methods_are_chosen_on_validation_and_reported_over_seeds(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = setting(tmp_path, bert, seeds=[0, 1], methods=METHODS, multitask=True)
    found = run(path)
    assert all(record.cell is not None for record in found)
    rows = rows_of(tmp_path)
    assert len(rows) == len(found) == (1 + 1 + 2 + 4 + 5 + 1) + 6
    for row in rows:
        assert float(row["average"]) == pytest.approx(mean(float(row[name]) for name in WORDS))
    for seed in ("0", "1"):
        own = [row for row in rows if row["seed"] == seed]
        tested = {row["label"]: row for row in own if row["split"] == "test"}
        assert list(tested) == ["individual", *METHODS, "multitask"]
        assert float(tested["individual"]["average"]) > 0.9
        for label in ("task arithmetic", "MaTS kfac"):
            tried = [r for r in rows if r["label"] == label and r["split"] == "validation"]
            assert {r["seed"] for r in tried} == {"0"}  # which chooses for both
            best = max(tried, key=lambda row: float(row["average"]))
            point = ("settings", "iterations")
            assert [tested[label][name] for name in point] == [best[name] for name in point]
        for row in tested.values():
            quotients = [float(row[n]) / float(tested["individual"][n]) for n in WORDS]
            assert float(row["relative"]) == pytest.approx(mean(quotients))

    scale = {"scale": 0.4}
    row = next(r for r in rows if r["settings"] == "scale 0.4" and r["split"] == "validation")
    expected = by_hand(path, "task_arithmetic", scale, "validation")
    assert {name: float(row[name]) for name in WORDS} == pytest.approx(expected)
    row = next(r for r in rows if r["label"] == "average" and r["split"] == "test")
    expected = by_hand(path, "average", {}, "test")
    assert {name: float(row[name]) for name in WORDS} == pytest.approx(expected)
    row = next(r for r in rows if (r["seed"], r["label"]) == ("1", "MaTS kfac"))
    options = {"objective": "kfac", "iterations": int(row["iterations"])}
    options["normalize"] = row["settings"] == "normalize True"
    expected = by_hand(path, "mats", options, "test", seed=1)
    assert {name: float(row[name]) for name in WORDS} == pytest.approx(expected)

    text = (tmp_path / "out/results/tiny.md").read_text()
    averages = [
        float(r["average"]) for r in rows if (r["label"], r["split"]) == ("average", "test")
    ]
    shown = f"{mean(averages):.3f} ({min(averages):.3f} to {max(averages):.3f})"
    (line,) = [line for line in text.splitlines() if line.startswith("| average |")][:1]
    assert line.split(" | ")[-2] == shown
    assert "missing" not in text and "## Methods, seed 1" in text
    for name in ("cost", "tasks"):
        assert (tmp_path / f"out/results/tiny-{name}.png").stat().st_size > 0
    assert not (tmp_path / "out/results/tiny-iterations.png").exists()


def test_a_killed_run_measures_only_what_is_missing(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = setting(tmp_path, bert, methods=METHODS, starts=STARTS)
    whole = {(r.table, r.label, r.words, r.split): r.cell.scores for r in run(path)}
    cells = tmp_path / "out/cells"
    total = len(list(cells.iterdir()))
    shutil.rmtree(cells)

    keep = Cells.keep
    kept: list[Any] = []

    def until_a_kill(self: Cells, key: Any, found: Any) -> None:
        if len(kept) == 9:
            raise Crash
        kept.append(key)
        keep(self, key, found)

    with monkeypatch.context() as patch:
        patch.setattr(Cells, "keep", until_a_kill)
        with pytest.raises(Crash):
            run(path)
    assert len(list(cells.iterdir())) == 9

    def counted(self: Cells, key: Any, found: Any) -> None:
        kept.append(key)
        keep(self, key, found)

    monkeypatch.setattr(Cells, "keep", counted)
    monkeypatch.setattr(train_tasks, "fit", None)
    again = {(r.table, r.label, r.words, r.split): r.cell.scores for r in run(path)}
    assert again == whole
    assert len(kept) == total == len({json.dumps(key) for key in kept})

    monkeypatch.setattr(Opened, "module", None)  # neither merged nor evaluated
    third = {(r.table, r.label, r.words, r.split): r.cell.scores for r in run(path)}
    assert third == whole and len(kept) == total
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Cells, "keep", counted)
    run(path, "--tables", "starts", "--again")
    assert len(kept) == total + 2 * 3 * 2  # objectives, starts, counts
    kept.clear()
    run(path, "--again")  # what is chosen among the methods is forgotten last
    assert len(kept) == total


def test_known_lines_are_taken_over(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a setting that was measured elsewhere, only what is missing is measured."""
    path = setting(tmp_path, bert, methods=METHODS, starts=STARTS, seeds=[0, 1])
    whole = {record.name: record.cell for record in run(path)}
    rows = rows_of(tmp_path)
    assert len(whole) == len(rows)
    known = tmp_path / "known.csv"

    def name_of(row: dict[str, str]) -> tuple[str, ...]:
        return tuple(row[part] for part in FIXED[:-1])

    tested = [r for r in rows if r["label"] == "MaTS kfac" and r["split"] == "test"]
    lost = next(row for row in tested if row["seed"] == "1")
    tested[0]["kind"] = "0.125"  # not what would be measured
    lost["status"] = "missing"
    write_rows(rows, known)
    shutil.rmtree(tmp_path / "out")

    def no_merge(*_: Any) -> None:
        raise AssertionError("measured")

    with monkeypatch.context() as patch:
        patch.setattr(Opened, "module", no_merge)
        found = run(path, "--known", str(known), "--report_only")
        assert [record.name for record in found if record.cell is None] == [name_of(lost)]
        assert not (tmp_path / "out/tasks").exists()
        run(path, "--known", str(known), "--seeds", "0")  # where nothing is missing
        assert not (tmp_path / "out/tasks").exists()
    again = {record.name: record.cell for record in run(path, "--known", str(known))}
    assert again.keys() == whole.keys()
    seeds = [json.loads(p.read_text())["seed"] for p in Path("out/tasks").glob("*/settings.json")]
    assert set(seeds) == {1}
    for name, cell in whole.items():
        if name == name_of(lost):  # of fine-tunes that were trained anew, to the same weights
            assert again[name].scores == cell.scores and again[name].residuals
        else:
            changed = {"kind": 0.125} if name == name_of(tested[0]) else {}
            assert again[name] == replace(cell, scores=cell.scores | changed, residuals={}), name

    write_rows([*rows, rows[0]], known)
    with pytest.raises(ValueError, match="two lines are of 0, methods, individual, 0, test"):
        read_long(known, list(WORDS))
    with pytest.raises(ValueError, match=r"expected the columns .* found .*'size'"):
        read_long(known, ["colour", "kind"])
    with pytest.raises(SystemExit):
        run(path, "--known", str(tmp_path / "other.csv"))
    assert "other.csv does not exist" in capsys.readouterr().err


def test_known_lines_of_intermediate_tasks_are_taken_over(tmp_path: Path, bert: Path) -> None:
    """Those of a target whose training with few rows comes in the same run, too."""
    path = setting(tmp_path, bert, intermediate={**TRANSFER, "targets": ["colour"]})
    whole = {record.name: record.cell for record in run(path)}
    rows = rows_of(tmp_path)
    lost = [row for row in rows if row["case"] == "target colour, donor size"]
    for row in rows:
        row["colour"] = "0.125"  # not what would be measured
    for row in lost:
        row["status"] = "missing"
    write_rows(rows, tmp_path / "known.csv")
    shutil.rmtree(tmp_path / "out")
    again = {record.name: record.cell for record in run(path, "--known", "known.csv")}
    assert again.keys() == whole.keys() and len(lost) == 2 * 3
    for name, cell in again.items():
        expected = whole[name].scores if "target colour, donor size" in name else {"colour": 0.125}
        assert cell.scores == expected, name


def test_what_is_missing_is_shown(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_tasks, "fit", None)
    path = setting(tmp_path, bert, seeds=[0, 1], methods=METHODS, starts=STARTS, cost={})
    found = run(path, "--report_only")
    assert {record.cell for record in found} == {None}
    rows = rows_of(tmp_path)
    assert {row["status"] for row in rows} == {"missing"} and {row["average"] for row in rows} == {
        ""
    }
    assert {row["table"] for row in rows} == {"methods", "starts", "cost"}
    text = (tmp_path / "out/results/tiny.md").read_text()
    assert "0 of" in text and "not chosen yet" in text
    assert "| start | 1 iterations | 4 iterations |" in text
    assert "| task arithmetic | missing | missing |" in text
    assert not list((tmp_path / "out/results").glob("*.png"))


def test_one_seed_of_two_is_said(tmp_path: Path, bert: Path) -> None:
    methods = {"average": {"method": "average"}}
    path = setting(tmp_path, bert, seeds=[0, 1], methods=methods)
    found = run(path, "--seeds", "1")
    assert {record.seed for record in found if record.cell is not None} == {1}
    text = (tmp_path / "out/results/tiny.md").read_text()
    assert "2 of 5 cells are measured" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| average |")][:1]
    assert line.count("1 missing") == len(WORDS) + 2


def test_methods_that_cannot_merge_these_models_are_refused_before_training(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_tasks, "fit", None)
    wrong = {"method": "mats", "options": {"averaged": ["no such name"], "iterations": 1}}
    path = setting(tmp_path, bert, methods={"wrong": wrong})
    with pytest.raises(SystemExit, match=r"methods: 'wrong': .*no such name"):
        run(path)
    path = setting(tmp_path, bert, ablations={"baselines": {"wrong": wrong}, "changes": []})
    with pytest.raises(SystemExit, match="methods: 'ablations: wrong'"):
        run(path)
    run(path, "--report_only")


def test_a_later_seed_needs_what_the_first_one_chose(tmp_path: Path, bert: Path) -> None:
    scales = {"method": "task_arithmetic", "grid": {"scale": [0.1, 0.4]}}
    path = setting(tmp_path, bert, seeds=[3, 1], methods={"task arithmetic": scales})
    with pytest.raises(ValueError, match=r"seed 1 tests what seed 3 chose .*: run seed 3"):
        run(path, "--seeds", "1")


def test_starts_and_ablations(tmp_path: Path, bert: Path) -> None:
    path = setting(tmp_path, bert, methods=METHODS, starts=STARTS, ablations=ABLATIONS)
    found = run(path, "--tables", "starts", "ablations")  # which choose their own starts
    lines = {(r.label, r.words): r.cell for r in found if r.table in ("starts", "ablations")}
    assert all(lines.values()) and len(lines) == 2 * 3 * 2 + 3
    measured = {(r.label, r.split) for r in found if r.table == "methods" and r.cell}
    assert measured == {("task arithmetic", "validation")}  # the others are one point

    options = {"objective": "gram", "preconditioner": None, "iterations": 4}
    tried = [r for r in found if r.label == "task arithmetic" and r.split == "validation"]
    best = max(tried, key=lambda record: record.cell.average)
    scale = float(best.settings.removeprefix("scale "))
    seed = seed_of(path)
    start = MergeModule(
        [
            Task(
                name,
                seed.suite.start(name).module,
                seed.suite.about(name)[0] / f"{name}.ckpt",
                seed.suite.data[seed.suite.by_name[name]],
            )
            for name in WORDS
        ],
        "task_arithmetic",
        {"scale": scale},
        pretrained=seed.starts[0],
    ).state_of("colour")
    init = {name: value for name, value in start.items() if not name.startswith("head.")}
    for changes in ({"init": init}, {"init": "pretrained"}):
        label = "task arithmetic" if changes["init"] is init else "pretrained"
        cell = lines["gram, plain", f"start {label}, iterations 4"]
        expected = by_hand(path, "mats", {**options, **changes}, "validation")
        assert cell.scores == pytest.approx(expected)

    assert (tmp_path / "out/results/tiny-iterations.png").stat().st_size > 0
    (sidecar,) = (tmp_path / "out/tasks").glob("kind-*/kind.ckpt.statistics-*")
    statistics = load_statistics(sidecar)
    assert statistics.examples == 40
    assert (statistics.info["fisher"], statistics.info["mode"]) == ("sampled", "eval")
    assert statistics.info["kinds"] == ["kfac", "block_fisher"]
    tables_of = paper.tables_of(read_setting(str(path))[1], seed, seed)
    tables_of["methods"].forget()
    assert sidecar.exists()
    tables_of["ablations"].forget()
    assert not sidecar.exists()
    residuals = {words: cell.residual for (label, words), cell in lines.items() if label == "kfac"}
    assert len(set(residuals.values())) == 3
    text = (tmp_path / "out/results/tiny.md").read_text()
    base, changed = (
        lines["kfac", words].average for words in ("iterations 2", "normalize off, iterations 2")
    )
    residual = f"{residuals['normalize off, iterations 2']:.1e}"
    assert f"| kfac | normalize off | {changed:.3f} | {changed - base:+.3f} | {residual} |" in text


def test_collected_statistics_are_of_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cells of the merges by them are."""
    checkpoint = Path("trec.ckpt")
    now = collected_path(checkpoint, {"rows": 40})
    assert collected_path(checkpoint, {"rows": 40}) == now
    monkeypatch.setattr(paper_seeds, "versions", lambda: {"mats_lightning": "0"})
    assert collected_path(checkpoint, {"rows": 40}) != now


def test_a_method_of_one_point_needs_no_validation_rows(tmp_path: Path, bert: Path) -> None:
    one = {"RegMean": {"method": "regmean"}}
    starts = {**STARTS, "labels": ["RegMean"]}
    path = setting(tmp_path, bert, methods=one, starts=starts, cost={})
    own = seed_of(path)
    tables = paper.tables_of(read_setting(str(path))[1], own, own)
    for name in ("starts", "cost"):
        assert all(record.keep is not None for record in tables[name].records()), name


def test_statistics_of_more_rows_than_there_are(tmp_path: Path, bert: Path) -> None:
    changes = [{"baseline": "kfac", "label": "many", "statistics": {"rows": 97}}]
    path = setting(tmp_path, bert, ablations={**ABLATIONS, "changes": changes})
    with pytest.raises(ValueError, match="statistics of 97 rows: colour was trained on 96"):
        run(path)


def test_the_cost_of_training_is_that_of_all_its_steps(tmp_path: Path, bert: Path) -> None:
    """All texts have eight tokens and all batches sixteen rows, so that scaling is exact."""
    methods = {"average": METHODS["average"], "RegMean": {"method": "regmean"}}
    plans = {
        "heads": {"rounds": 0, "heads": [1], "labels": "data"},
        "rounds": {"heads": [], "rows": 32, "epochs": 1, "labels": "data", "judge": "score"},
    }
    refresh = {"merges": ["RegMean"], "plans": plans}
    path = setting(tmp_path, bert, methods=methods, refresh=refresh, cost={"batches": 2})
    found = {r.label: r.cell for r in run(path) if r.table == "cost"}
    seed = seed_of(path)
    with FlopCounterMode(display=False) as counter:
        for task, data in seed.suite.data.items():
            data.setup()
            module = task_module(seed.options, task, data)
            for batch in data.train_dataloader():
                nn.functional.cross_entropy(module(batch), batch["labels"]).backward()
    flops = 3 * counter.get_total_flops()  # epochs
    assert found["fine-tuning"].flops == pytest.approx(flops)
    # drawn from all tasks' batches, whose heads have two or three classes
    assert found["multitask training"].flops == pytest.approx(flops, rel=1e-3)
    assert 1.1 * flops < found["fine-tuning with statistics"].flops < 2 * flops
    assert found["merge: average"].flops == 0 < found["merge: RegMean"].flops
    # 32 of 96 rows for one epoch, not three, and no heads; before and after all validation rows
    sizes = {
        split: sum(len(batch["labels"]) for data in seed.suite.data.values() for batch in of(data))
        for split, of in (
            ("validation", lambda d: d.val_dataloader()),
            ("test", lambda d: d.test_dataloader()),
        )
    }
    validated = found["one evaluation"].flops * sizes["validation"] / sizes["test"]
    assert found["refresh: RegMean"].flops == pytest.approx(flops / 9 + 2 * validated, rel=0.1)
    assert "refresh: average" not in found
    assert all(cell.seconds > 0 for cell in found.values())
    assert (
        "| fine-tuning | scaled from 2 batches a task |" in Path("out/results/tiny.md").read_text()
    )


def test_intermediate_tasks(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int | None] = []
    let_go = Suite.let_go

    def noted(suite: Suite) -> None:
        released.append(suite.options.train_rows)
        let_go(suite)

    monkeypatch.setattr(Suite, "let_go", noted)
    found = run(setting(tmp_path, bert, intermediate=TRANSFER))
    assert released == [16, 96]
    cases = list(dict.fromkeys(record.case for record in found))
    assert cases == [
        "target colour",
        "target colour, donor size",
        "target colour, donor kind",
        "target size",
        "target size, donor kind",
    ]
    for record in found:
        target = record.case.split(", ")[0].removeprefix("target ")
        assert record.cell is not None and list(record.cell.scores) == [target]
    tried = [r for r in found if r.case == cases[1] and r.label == "average"]
    validated, chosen = tried[:2], tried[2]
    assert [r.settings for r in validated] == [
        "weights colour 0.8 size 0.2",
        "weights colour 0.4 size 0.6",
    ]
    assert chosen.settings == max(validated, key=lambda r: r.cell.average).settings
    folders = sorted(path.name.split("-")[0] for path in Path("out/tasks").iterdir())
    assert folders == ["colour", "colour", "kind", "size", "size"]
    trained = [json.loads(p.read_text())["train_rows"] for p in Path("out/tasks").glob("*/set*")]
    assert sorted(trained) == [16, 16, 96, 96, 96]

    # the target alone, and its average with a donor, by hand
    seed = seed_of(tmp_path / "tiny.yaml")
    data = seed.suite.data[seed.suite.by_name["colour"]]
    data.setup()
    few, full = {}, {}
    for file in Path("out/tasks").glob("colour-*/settings.json"):
        if json.loads(file.read_text())["train_rows"] == 16:
            few = torch.load(file.with_name("colour.ckpt"))["state_dict"]
    (donor,) = (
        file.with_name("size.ckpt")
        for file in Path("out/tasks").glob("size-*/settings.json")
        if json.loads(file.read_text())["train_rows"] == 96
    )
    full = torch.load(donor)["state_dict"]
    averaged = {
        name: value if name.startswith("head.") else 0.8 * value + 0.2 * full[name]
        for name, value in few.items()
    }
    for state, record, loader in (
        (few, found[0], data.test_dataloader()),
        (averaged, validated[0], data.val_dataloader()),
    ):
        module = seed.suite.start("colour").module.eval()
        module.load_state_dict(state)
        with torch.no_grad():
            right = [(module(b).argmax(-1) == b["labels"]).float() for b in loader]
        assert record.cell.scores["colour"] == pytest.approx(float(torch.cat(right).mean()))
    text = Path("out/results/tiny.md").read_text()
    assert "| target | donor | alone | average | RegMean | alone, all rows |" in text


def test_only_what_is_asked_for_is_read(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    read: list[Any] = []
    rows_digest = paper_seeds.rows_digest

    def noted_module(options: Any, task: Any, data: Any) -> Any:
        loaded.append(task.name)
        return task_module(options, task, data)

    def noted_rows(data: Any) -> str:
        read.append(data)
        return rows_digest(data)

    monkeypatch.setattr(paper_seeds, "task_module", noted_module)
    monkeypatch.setattr(paper_seeds, "rows_digest", noted_rows)
    part = {**TRANSFER, "targets": ["colour"], "donors": ["size"]}
    found = read_setting(str(setting(tmp_path, bert, intermediate=part)))[1]
    for task in found.options["tasks"][:2]:
        task["head_group"] = "pair"
    seed = Seed(found, 0)
    assert found.intermediate is not None and not loaded
    table = TransferTable(found.intermediate, seed)
    assert len(list(table.records())) == 2 + 2 * 3
    assert loaded == ["colour", "colour", "size"] and len(read) == 3  # few rows, all, the donor
    loaded.clear()
    weights, heads = seed.starts
    assert loaded == ["colour", "size"]
    every = starts([seed.suite.start(name) for name in WORDS])
    torch.testing.assert_close((weights, heads), every, rtol=0, atol=0)


# -- the store under merge.py --------------------------------------------------------------------


def test_a_stopped_comparison_goes_on_and_a_finished_one_prints_again(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = configuration(tmp_path, bert)
    first = merge.main(arguments)
    merged: list[str] = []
    module_of = Opened.module

    def counted(self: Opened, count: int | None = None) -> MergeModule:
        if self._module is None:
            merged.append(self._label)
        return module_of(self, count)

    monkeypatch.setattr(Opened, "module", counted)
    monkeypatch.setattr(train_tasks, "fit", None)
    again = merge.main(arguments)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert merged == [results["exported"]]  # which is merged again to be exported
    assert [o.row for o in again] == [o.row for o in first]
    assert [o.blocks for o in again] == [o.blocks for o in first]
    chosen = next(o for o in first if o.label == results["exported"])
    card = (tmp_path / "out/merged/README.md").read_text()
    assert all(f"{score:.3f}" in card for score in chosen.scores.values())

    cells = sorted((tmp_path / "out/cells").iterdir())
    gone = [p for p in cells if json.loads(p.read_text())["key"]["method"] == "regmean"]
    assert len(gone) == 3
    gone[0].unlink()
    merged.clear()
    assert [o.row for o in merge.main(arguments)] == [o.row for o in first]
    assert set(merged) == {"RegMean", results["exported"]}

    # a part of the grid: the curves are cut to it, and its seconds are not known
    gram = GRID["MaTS gram"] | {"grid": {"iterations": [2]}}
    part = merge.main([*arguments, "--methods", json.dumps({"MaTS gram": gram})])[1]
    whole = next(outcome for outcome in first if outcome.label == "MaTS gram")
    assert part.merge_seconds is None and whole.merge_seconds is not None
    assert part.blocks.keys() == whole.blocks.keys() != set()
    for name, curve in part.blocks.items():
        assert curve == whole.blocks[name][:3]

    merged.clear()
    there = sorted((tmp_path / "out/cells").iterdir())
    before = [path.read_bytes() for path in there]
    merge.main([*arguments, "--again", "--methods", "{average: {method: average}}"])
    assert merged == ["individual", "average"]
    assert sorted((tmp_path / "out/cells").iterdir()) == there
    after = [path.read_bytes() for path in there]
    assert sum(old != new for old, new in zip(before, after, strict=True)) <= 3
    merged.clear()
    merge.main([*arguments, "--test_rows", "20", "--methods", "{average: {method: average}}"])
    assert merged == ["individual", "average"]  # other rows
    assert set(GRID) == {outcome.label for outcome in first[1:]}


def test_a_key_says_all_of_the_start() -> None:
    """And nothing more than it did where there was nothing more to say."""
    regmean = Merge("regmean", {"off_diagonal": 0.9})
    merge = Merge("mats", {"objective": "gram"}, (1, 5), regmean)
    start = {"method": "regmean", "options": {"off_diagonal": 0.9}}
    assert merge.key(5, "validation") == {
        "method": "mats",
        "options": {"objective": "gram"},
        "start": start,
        "iterations": 5,
        "split": "validation",
    }
    starts = [
        Merge("mats", {}, (2,)),
        Merge("mats", {}, (4,)),
        Merge("mats", {}, (4,), regmean),
        Merge("mats", {}, (4,), statistics={"rows": 5}),
    ]
    keys = [json.dumps(replace(merge, start=start).key(5, "test")) for start in starts]
    assert len(set(keys)) == len(starts)


def test_cells_are_of_one_training(tmp_path: Path) -> None:
    """And cells of trainings without an id stay those of these trainings."""
    folder, key = tmp_path / "tasks/trec-01234567", {"method": "average"}
    cells = Cells(tmp_path / "cells", [folder], {"rows": ["0"]})
    cells.keep(key, Cell({}, 1.0))
    assert cells.about["fine-tunes"] == ["trec-01234567"]
    train_tasks.write_json(folder / "result.json", {"seconds": 1.0})
    assert cells.at(key) == Cell({}, 1.0)
    for training in ("a", "b"):
        train_tasks.write_json(folder / "result.json", {"seconds": 1.0, "id": training})
        assert cells.at(key) is None
        cells.keep(key, Cell({}, 1.0))
    assert len(list((tmp_path / "cells").iterdir())) == 3


def test_seconds_of_the_whole_grid_are_shown() -> None:
    """What was chosen may have been merged again, to its own iterations alone, to be tested."""

    def record(split: str, iterations: int, seconds: float, merged_to: int) -> Record:
        cell = Cell({"trec": 0.5}, 1.0, seconds, merged_to)
        about: dict[str, Any] = {"seed": 0, "table": "methods", "label": "MaTS"}
        return Record(**about, iterations=iterations, split=split, cell=cell)

    grid = [record("validation", 2, 7.0, 20), record("validation", 20, 7.0, 20)]
    tested = record("test", 2, 3.0, 2)
    assert merge_seconds(tested, [*grid, tested]) == 7
    assert merge_seconds(tested, [*grid[:1], tested]) is None  # another grid's
    trained = record("test", 0, 9.0, 0)
    assert merge_seconds(trained, [trained]) == 9


def test_results_of_a_named_setting_are_beside_its_cells(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_settings, "FOLDER", tmp_path)
    setting(tmp_path, bert, methods={"average": {"method": "average"}})
    published = Path(paper.__file__).with_name("results")
    before = sorted(published.glob("*"))
    paper.main(["--setting", "tiny", "--report_only", "--output_dir", str(tmp_path / "mine")])
    assert (tmp_path / "mine/results/tiny.csv").is_file()
    assert sorted(published.glob("*")) == before
    paper.main(["--setting", "tiny", "--report_only", "--results", str(tmp_path / "there")])
    assert (tmp_path / "there/tiny.csv").is_file() and not (tmp_path / "out/results").exists()


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_full", "vision_full", "intermediate"])
@pytest.mark.parametrize("fast", [False, True])
def test_the_settings_can_be_read(name: str, fast: bool) -> None:
    label, found = read_setting(name, fast)
    assert label == name and found.tables
    assert found.options["output_dir"].endswith("-fast") == fast


@pytest.mark.parametrize("name", ["text_full", "vision_full", "intermediate"])
def test_what_the_settings_merge_by_exists(name: str, bert: Path, tmp_path: Path) -> None:
    """Known before the hours that come before it: methods, their options, those of statistics."""
    found = read_setting(name)[1]
    methods = list(found.methods.values())
    methods += found.intermediate.methods.values() if found.intermediate else []
    merges = [one for method in methods for one in merges_of(method)]
    seed = seed_of(setting(tmp_path, bert))
    if found.ablations:
        lines = AblationTable(found.ablations, seed).lines()
        merges += [line.merge for line in lines if line.merge is not None]
    if found.starts:
        lines = StartTable(found, replace(found.starts, labels=["average"]), seed).lines()
        merges += [line.merge for line in lines if line.merge is not None]
    tasks = [seed.suite.start(task) for task in WORDS]
    for wanted in merges:
        options = dict(wanted.options)
        if wanted.method == "mats":
            options["iterations"] = list(wanted.counts)
        MergeModule(tasks, wanted.method, options, pretrained=seed.starts[0])
        arguments = set(wanted.statistics or {}) - {"rows"}
        assert arguments <= set(inspect.signature(collect_statistics).parameters)
    assert merges


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"seeds": []}, [], "one or more different ones"),
        (
            {"methods": {"A": {"method": "average", "grids": {}}}},
            [],
            "'A' has 'grids'; expected method",
        ),
        (
            {"ablations": {**ABLATIONS, "baselines": {"kfac": GRID["RegMean"]}}},
            [],
            "the baseline 'kfac' is one point",
        ),
        ({"starts": STARTS}, [], "starts: 'average' is none of"),
        (
            {"methods": METHODS, "starts": {**STARTS, "options": {"iterations": 3}}},
            [],
            "starts: options: say iterations with its solver",
        ),
        (
            {
                "methods": METHODS,
                "starts": {
                    **STARTS,
                    "solvers": {"cg": {"iterations": [1], "options": {"iterations": 3}}},
                },
            },
            [],
            "starts: options of 'cg': say iterations with its solver",
        ),
        (
            {
                "ablations": {
                    **ABLATIONS,
                    "changes": [
                        {"baseline": "kfac", "label": "longer", "options": {"iterations": 9}}
                    ],
                }
            },
            [],
            "ablations: options of 'longer': say iterations with its solver",
        ),
        (
            {"ablations": {**ABLATIONS, "baselines": {}}},
            [],
            "ablations: 'kfac' is none of",
        ),
        ({"methods": METHODS}, ["--tables", "starts"], "the setting has no starts, it has methods"),
        ({"methods": METHODS}, ["--seeds", "3"], "the setting has no 3, it has 0"),
        ({"surprise": 1}, [], "surprise"),
        ({"intermediate": TRANSFER | {"donors": ["smell"]}}, [], "'smell' is none of colour, size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit):
        run(setting(tmp_path, bert, **changes), *arguments)
    assert message in capsys.readouterr().err


def test_a_setting_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        paper.main(["--setting", "text_fll"])
    assert "choose from convolutions, intermediate, text_full" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_full", "intermediate"])
def test_fast_runs_on_the_packaged_tasks(name: str) -> None:
    found = paper.main(["--setting", name, "--fast"])
    assert found and all(record.cell is not None for record in found)
    folder = Path(read_setting(name, fast=True)[1].options["output_dir"])
    assert folder.name.endswith("-fast") and (folder / "results" / f"{name}.csv").is_file()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"method": "kfac"}, "methods: 'mine': no method is called 'kfac'; choose from average"),
        ({"method": "fisher", "options": {"scales": 2}}, "'mine': fisher has no option 'scales'"),
        ({"method": "ties", "grid": {"scale": [1.0]}}, "'mine': ties needs the option 'density'"),
    ],
)
def test_methods_are_checked_before_anything_is_trained(
    method: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fit({"mine": MethodOptions(**method)}, ["body.weight"], None)
