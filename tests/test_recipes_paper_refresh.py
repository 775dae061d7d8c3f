"""The refreshes among recipes/paper.py's tables, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import paper
import paper_refresh
import pytest
import torch
from classifier import logits
from paper_seeds import Seed
from paper_settings import read_setting
from steps import Steps
from test_recipes import WORDS, Crash, bert
from test_recipes_paper import METHODS, own_cache, rows_of, run, seed_of, setting
from test_refresh import SOLVING

from mats_lightning import MergeModule, RefreshPlan, Task, refresh

__all__ = ["bert", "own_cache"]  # fixtures

KFAC = "MaTS kfac"
MIXED = {"mix": 0.5, "damping": 0.1, "step": 0.01, **SOLVING}
REFRESH: dict[str, Any] = {
    "plans": {
        "heads": {"rounds": 0, "labels": "data", "heads": [1, 5], "rows": 40},
        "12 rows": {"rounds": 0, "heads": [5], "rows": 12},
    },
    "merges": [KFAC, "average"],
    "methods": ["pretrained"],
    "first_seed": {
        "mix": {"rows": 40, "heads": [], **MIXED},
        "heads, mix": {"rows": 40, "heads": [1, 5], **MIXED},
        "far": {"rounds": 2, "rows": 40, "step": 1e6, "tries": 1, "heads": [], **SOLVING},
    },
    "rivals": {"plan": "heads", "learning_rates": [1e-9, 2e-2]},
}


@pytest.fixture(autouse=True)
def full_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is expected of a run is what it does, whatever of it was there before."""
    close = Steps.__exit__

    def checked(steps: Steps, *exception: object) -> None:
        close(steps, *exception)
        (row,) = steps._bar.tasks
        assert exception[0] is not None or row.completed == row.total

    monkeypatch.setattr(Steps, "__exit__", checked)


def accuracies(module: MergeModule, data: dict[str, Any], stage: str) -> dict[str, float]:
    found = {}
    for name, rows in data.items():
        loader = rows.test_dataloader() if stage == "test" else rows.val_dataloader()
        model: Any = module.model(name).eval()
        with torch.no_grad():
            right = [(model(b).argmax(-1) == b["labels"]).float() for b in loader]
        found[name] = float(torch.cat(right).mean())
    return found


def refreshed_by_hand(
    path: Path, method: str, options: dict[str, Any], plan: RefreshPlan, seed: int, stage: str
) -> dict[str, float]:
    own = seed_of(path, seed)
    data: dict[str, Any] = {task.name: rows for task, rows in own.suite.data.items()}
    tasks = [
        Task(
            name,
            own.suite.start(name).module,
            own.suite.about(name)[0] / f"{name}.ckpt",
            data[name],
            head_group=own.suite.by_name[name].head_group,
        )
        for name in WORDS
    ]
    module = MergeModule(
        tasks, method, options, pretrained=own.starts[0], pretrained_heads=own.starts[1]
    )
    refresh(module, plan, logits_fn=logits)
    return accuracies(module, data, stage)


def test_refreshes_over_seeds(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = setting(tmp_path, bert, seeds=[0, 1], methods=METHODS, refresh=REFRESH)
    with pytest.raises(ValueError, match="run seed 0"):
        run(path, "--seeds", "1")
    found = run(path)
    assert all(record.cell is not None for record in found)
    everything = rows_of(tmp_path)
    rows = [row for row in everything if row["table"] == "refresh"]
    # the merges' plans, the first seed's more, its methods, each on two splits after each round;
    # two rivals on the first seed, at two rates on validation and one on test
    assert len(rows) == 2 * (2 * 2 + 2 + 2 + 3 + 1) + 2 * 3 + 2 * (2 * 2)

    def row_of(seed: int, label: str, plan: str, split: str, number: int = 0) -> dict[str, str]:
        about = (str(seed), label, plan, split, str(number))
        names = ("seed", "label", "settings", "split", "iterations")
        (row,) = [row for row in rows if tuple(row[name] for name in names) == about]
        return row

    def scores(row: dict[str, str]) -> dict[str, float]:
        return {name: float(row[name]) for name in WORDS}

    chosen = next(r for r in everything if (r["label"], r["split"]) == (KFAC, "test"))
    options = {
        "objective": "kfac",
        "normalize": chosen["settings"] == "normalize True",
        "iterations": int(chosen["iterations"]),
    }
    plans = {name: RefreshPlan(**plan) for name, plan in REFRESH["plans"].items()}
    mixed = RefreshPlan(**REFRESH["first_seed"]["mix"])
    both = RefreshPlan(**REFRESH["first_seed"]["heads, mix"])
    for label, method, own, plan, name, seed, number in (
        ("pretrained", "pretrained", {}, plans["heads"], "heads", 0, 0),
        ("average", "average", {}, plans["heads"], "heads", 1, 0),
        (KFAC, "mats", options, plans["12 rows"], "12 rows", 1, 0),
        (KFAC, "mats", options, mixed, "mix", 0, 1),
        (KFAC, "mats", options, both, "heads, mix", 0, 1),  # later, and from the same merge
        (KFAC, "mats", options, plans["heads"], "heads", 0, 0),
        (KFAC, "mats", options, replace(both, rounds=0), "heads, mix", 0, 0),  # before the step
    ):
        for split in ("validation", "test"):
            expected = refreshed_by_hand(path, method, own, plan, seed, split)
            assert scores(row_of(seed, label, name, split, number)) == pytest.approx(expected)

    assert scores(row_of(0, KFAC, "mix", "test", 0)) == scores(chosen)
    moved = [
        row_of(0, KFAC, "mix", "test", number)["merge_seconds"]
        for split in ("test",)
        for number in (0, 1)
    ]
    assert float(moved[0] or 0) < float(moved[1])

    # every step was worse: the merge stays, and its rounds have taken their time
    far = [row_of(0, KFAC, "far", "test", number) for number in range(3)]
    assert [scores(row) for row in far] == [scores(chosen)] * 3
    assert float(far[0]["merge_seconds"] or 0) < float(far[1]["merge_seconds"])
    assert far[1]["merge_seconds"] == far[2]["merge_seconds"]
    individual = {r["seed"]: scores(r) for r in everything if r["label"] == "individual"}
    for row in rows:
        if row["split"] == "test":
            known = individual[row["seed"]]
            quotients = [scores(row)[name] / known[name] for name in WORDS]
            assert float(row["relative"]) == pytest.approx(mean(quotients))

    # the rate that is best on validation rows; the lowest leaves everything as it was
    for kind in ("together", "from the merge"):
        label = f"trained {kind} on 40 rows"
        tried = [r for r in rows if (r["label"], r["split"]) == (label, "validation")]
        best = max(tried, key=lambda row: float(row["average"]))["settings"]
        assert kind != "together" or best == "learning rate 0.02"
        assert float(row_of(0, label, best, "test")["merge_seconds"]) > 0
    slow = row_of(0, "trained from the merge on 40 rows", "learning rate 1e-09", "validation")
    validated = [
        r
        for r in everything
        if (r["label"], r["split"], r["table"]) == (KFAC, "validation", "methods")
        and (r["settings"], r["iterations"]) == (chosen["settings"], chosen["iterations"])
    ]
    assert scores(slow) == scores(validated[0])  # the merge, under its own heads

    text = (tmp_path / "out/results/tiny.md").read_text()
    averages = [float(row_of(s, "average", "heads", "test")["average"]) for s in (0, 1)]
    shown = f"{mean(averages):.3f} ({min(averages):.3f} to {max(averages):.3f})"
    (line,) = [line for line in text.splitlines() if line.startswith("| average | heads |")]
    assert line.split(" | ")[-4] == shown and line.split(" | ")[2] == "0"
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {KFAC} | far | 0.")]
    assert len(set(line.strip("| ").split(" | ")[2:])) == 1  # round by round
    assert "missing" not in text
    assert (tmp_path / "out/results/tiny-refresh.png").stat().st_size > 0
    assert not list((tmp_path / "out/refresh").iterdir())

    # at each rate on validation rows, and the best one alone on test rows
    keys = {path: json.loads(path.read_text())["key"] for path in Path("out/cells").iterdir()}
    trained = {path: key["split"] for path, key in keys.items() if "learning_rate" in key}
    assert sorted(trained.values()) == ["test"] * 2 + ["validation"] * 4
    before = {path: path.read_bytes() for path, split in trained.items() if split == "validation"}
    for file, split in trained.items():
        if split == "test":  # what was chosen is trained again, and nothing else
            file.unlink()
    rates: list[float] = []
    train_rival = paper_refresh.train_rival

    def noted(*arguments: Any) -> Any:
        rates.append(arguments[3])
        return train_rival(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(paper_refresh, "train_rival", noted)
        again = run(path, "--tables", "refresh", "--seeds", "0")
    assert [record.name for record in again] == [record.name for record in found]
    assert len(rates) == 2 and rates[0] == 2e-2
    assert all(file.read_bytes() == known for file, known in before.items())
    for old, new in zip(found, again, strict=True):
        assert "from the merge" in old.label or new.cell.scores == old.cell.scores
    found = again

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    for name in ("run_plan", "train_rival"):
        monkeypatch.setattr(paper_refresh, name, crash)
    assert run(path) == found
    other = read_setting(str(path))[1]
    other.options["test_rows"] = 30  # measured on other rows
    assert other.refresh is not None
    fresh = paper_refresh.RefreshTable(other, other.refresh, Seed(other, 0))
    assert all(record.cell is None for record in fresh.records())

    for part in ("learning_rate", "round"):  # what is missing is measured again
        for cell in (tmp_path / "out/cells").iterdir():
            if part in json.loads(cell.read_text())["key"]:
                cell.unlink()
        with pytest.raises(Crash):
            run(path, "--tables", "refresh", "--seeds", "0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plans": {}}, "plans has none"),
        ({"merges": []}, "merges has none"),
        ({"merges": ["magic"]}, "'magic' is none of"),
        ({"methods": ["magic"]}, "'magic' is none of"),
        ({"methods": ["average"]}, "'average' is twice among merges and methods"),
        ({"merges": ["pretrained"], "methods": []}, "'pretrained' merges nothing"),
        ({"plans": {"training": {}}}, "can have its heads fitted alone"),
        ({"first_seed": {"heads": {}}}, "'heads' is among plans and first_seed"),
        ({"rivals": {"plan": "heads", "learning_rates": [0.0]}}, "above 0"),
        ({"rivals": {"plan": "heads", "learning_rates": []}}, "one or more"),
        ({"rivals": {"plan": "mix", "learning_rates": [1e-4]}}, "'mix' is none of heads, 12 rows"),
        ({"plans": {"steps": {"mix": 3.0}}}, "mix=3.0"),
    ],
)
def test_refreshes_that_do_not_fit_are_refused(
    tmp_path: Path, bert: Path, change: dict[str, Any], message: str
) -> None:
    path = setting(tmp_path, bert, methods=METHODS, refresh={**REFRESH, **change})
    with pytest.raises(ValueError, match=message):
        read_setting(str(path))


def test_a_merge_that_is_not_chosen_yet_is_missing(tmp_path: Path, bert: Path) -> None:
    path = setting(tmp_path, bert, methods=METHODS, refresh=REFRESH)
    found = paper.main(["--setting", str(path), "--report_only"])
    refreshes = [record for record in found if record.table == "refresh"]
    assert refreshes and all(record.cell is None for record in refreshes)
    assert "missing" in (tmp_path / "out/results/tiny.md").read_text()
    with pytest.raises(ValueError, match="settings of MaTS kfac are not chosen yet"):
        run(path, "--tables", "refresh")
