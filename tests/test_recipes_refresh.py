"""recipes/refresh.py on tiny models: what it takes from merge.py, its table, its rivals."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import merge
import pytest
import refresh
import refresh_rivals
import torch
import train_tasks
from bench import Bench
from cells import Cells, Merge
from test_recipes import GRID, WORDS, Crash, bert, configuration
from test_refresh import SOLVING

from mats_lightning import MergeModule, RefreshPlan
from mats_lightning.checkpoints import load_weights
from mats_lightning.report import average

__all__ = ["bert"]  # a fixture

KFAC = "MaTS kfac"
METHODS = {name: GRID[name] for name in ("average", KFAC)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


def arguments(tmp_path: Path, bert: Path, *more: str) -> list[str]:
    given = configuration(tmp_path, bert, methods=METHODS)
    return [
        *given,
        "--method",
        KFAC,
        "--plan.rows=40",
        "--plan.rounds",
        "2",
        "--plan.heads=[]",
        *(f"--plan.{name}={value}" for name, value in SOLVING.items()),
        *more,
    ]


def test_a_refresh_of_what_merge_has_chosen(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = merge.main(configuration(tmp_path, bert, methods=METHODS))
    best = outcomes[2].chosen
    monkeypatch.setattr(train_tasks, "fit", None)  # its fine-tunes are kept
    merged: list[tuple[int, ...]] = []
    module = Bench.module

    def noted(bench: Bench, merge: Merge) -> MergeModule:
        merged.append(merge.counts)
        return module(bench, merge)

    monkeypatch.setattr(Bench, "module", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Cells, "keep", None)  # and so is what it has measured
        lines = refresh.main(arguments(tmp_path, bert))
    assert merged == [(best.iterations,)]
    assert f"{KFAC}: chosen of 4: {best.settings}" in capsys.readouterr().out
    assert lines[0].row == outcomes[0].row  # the individual models
    assert lines[1].row == outcomes[2].row and lines[1].seconds == 0
    out = tmp_path / "out/refresh"
    results = json.loads((out / "results.json").read_text())
    taken = [done for done in results["rounds"][1:] if done["step"] > 0]
    assert [line.row.method for line in lines[2:]] == [
        f"refresh, round {done['number']}" for done in taken
    ]
    assert results["rounds"][0]["scores"] == best.scores
    assert results["plan"]["rows"] == 40 and results["plan"]["rounds"] == 2
    assert results["table"][1]["test_average"] == average(outcomes[2].row)
    assert (out / "results.md").read_text().count("\n") == 2 + len(lines)
    assert (out / "seconds.png").stat().st_size > 0

    calls: list[Any] = []
    monkeypatch.setattr("mats_lightning.measuring.collect_statistics", calls.append)
    again = refresh.main(arguments(tmp_path, bert))  # all rounds are kept
    assert not calls
    assert [line.row.scores for line in again] == [line.row.scores for line in lines]

    def crash(*_: Any, **__: Any) -> None:
        raise Crash

    monkeypatch.setattr("mats_lightning.measuring.collect_statistics", crash)
    with pytest.raises(Crash):  # the rounds are forgotten
        refresh.main(arguments(tmp_path, bert, "--again"))


def test_heads_and_a_round_that_is_taken_back(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begins: list[dict[str, torch.Tensor]] = []
    begin = refresh_rivals.TimedClassifier.on_train_start

    def noted(module: Any) -> None:
        for one in module.classifiers.values():
            begins.append({name: value.clone() for name, value in one.state_dict().items()})
        begin(module)

    monkeypatch.setattr(refresh_rivals.TimedClassifier, "on_train_start", noted)
    more = ["--plan.heads=[1, 20]", "--plan.step=1e6", "--plan.tries=1", "--rivals"]
    lines = refresh.main(arguments(tmp_path, bert, *more))
    results = json.loads((tmp_path / "out/refresh/results.json").read_text())
    heads, step = results["rounds"]
    assert step["step"] == 0.0 and list(step["tried"]) == ["1000000.0"]
    names = [line.row.method for line in lines]
    assert names[2:4] == ["heads alone", "trained heads alone, no merge"] and len(names) == 6
    spent = [
        sum(done["seconds"].values()) - done["seconds"]["validation"] for done in (heads, step)
    ]
    assert lines[2].seconds == pytest.approx(spent[0])
    assert set(heads["heads"]) == {"kind"}  # the others share a head, which is merged
    # the rival begins at the merge, under the heads that the tasks were trained with
    (folder,) = (tmp_path / "out/refresh").glob("rounds-*")
    assert load_weights(folder / "heads-0.safetensors")
    state = dict(zip(WORDS, begins, strict=True))["kind"]
    (file,) = (tmp_path / "out/tasks").glob("kind-*/kind.ckpt")
    assert torch.equal(state["head.weight"], load_weights(file)["head.weight"])


def test_fine_tunes_that_are_trained_again_have_a_choice_and_rounds_of_their_own(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = configuration(tmp_path, bert, methods=METHODS)
    before = merge.main(given)
    refresh.main(arguments(tmp_path, bert))
    shutil.rmtree(tmp_path / "out/tasks")
    # the same settings, and other weights
    monkeypatch.setattr(train_tasks.L, "seed_everything", lambda *_, **__: torch.manual_seed(7))
    lines = refresh.main(arguments(tmp_path, bert))
    after = merge.main(given)
    assert lines[0].row == after[0].row and lines[1].row == after[2].row
    assert after[2].chosen.settings != before[2].chosen.settings
    assert len(list((tmp_path / "out/refresh").glob("rounds-*"))) == 2


def test_rivals_train_on_the_rows_of_the_refresh(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, tuple[int, ...]]] = []
    rates: list[float] = []
    step = refresh_rivals.MultitaskClassifier.training_step

    def noted(module: Any, batch: Any, batch_idx: int) -> Any:
        number, rows = batch
        for tokens in rows["input_ids"].tolist():
            seen.append((type(module).__name__, number, tuple(tokens)))
        if isinstance(module, refresh_rivals.TimedClassifier):
            rates.append(module.trainer.optimizers[0].param_groups[0]["lr"])
        return step(module, batch, batch_idx)

    begins: list[dict[str, Any]] = []
    begin = refresh_rivals.TimedClassifier.on_train_start

    def noted_start(module: Any) -> None:
        states = [one.state_dict() for one in module.classifiers.values()]
        begins.extend({name: value.clone() for name, value in one.items()} for one in states)
        begin(module)

    monkeypatch.setattr(refresh_rivals.TimedClassifier, "on_train_start", noted_start)
    monkeypatch.setattr(refresh_rivals.MultitaskClassifier, "training_step", noted)
    more = ("--plan.step=0.05", "--rivals", "--rival_rates=[1e-9, 1e-2]")
    lines = refresh.main(arguments(tmp_path, bert, *more))
    together, timed = lines[-2:]
    assert " steps at 0.01, " in together.row.settings  # the other one learns nothing
    assert together.row.method == "trained together on 40 rows"
    assert timed.row.method == "trained from the merge on 40 rows"
    assert any(line.row.method == "refresh, round 1" for line in lines)  # other weights follow
    (folder,) = (tmp_path / "out/refresh").glob("rounds-*")
    merged = load_weights(folder / "round-0.safetensors")
    assert len(begins) == 2 * len(WORDS)  # at each rate
    for state in begins:
        assert all(torch.equal(state[name], merged[name]) for name in merged)
    assert list(together.row.scores) == list(timed.row.scores) == list(WORDS)
    rows: dict[str, set[Any]] = {"MultitaskClassifier": set(), "TimedClassifier": set()}
    for kind, number, tokens in seen:
        rows[kind].add((number, tokens))
    assert rows["MultitaskClassifier"] >= rows["TimedClassifier"] != set()
    for number in range(3):
        assert len([None for n, _ in rows["MultitaskClassifier"] if n == number]) <= 40
    assert rates[0] == 0 and max(rates) <= 1e-2
    spent = [line.seconds or 0 for line in lines if line.row.method.startswith("refresh")]
    assert timed.seconds is not None and timed.seconds < max(spent, default=0) + 30


def test_arguments_of_both_kinds(tmp_path: Path, bert: Path) -> None:
    given = arguments(tmp_path, bert, "--seed", "3", "--plan.kept", "[embeddings]", "--rivals")
    given += ["--rival_rates", "[1e-5, 1e-3]"]
    own, options = refresh.parse(given)
    assert own.plan == RefreshPlan(rounds=2, rows=40, kept=("embeddings",), heads=(), **SOLVING)
    assert (own.method, own.rivals, options.seed) == (KFAC, True, 3)
    assert own.rival_rates == [1e-5, 1e-3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--plan.mix", "2"], "mix=2.0; it lies between 0 and 1"),
        (["--plan.weather", "fine"], "weather"),
        (["--method", "magic"], "'magic' is none of average, MaTS kfac"),
        (
            ["--methods", "{start: {method: pretrained}}", "--method", "start"],
            "'start' merges nothing",
        ),
        (["--weather", "fine"], "weather"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, bert: Path, wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        refresh.main(arguments(tmp_path, bert, *wrong))
    assert message in capsys.readouterr().err


def test_help_tells_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refresh.main(["--help"])
    printed = capsys.readouterr().out
    assert "--plan.rounds" in printed and "--train_rows" in printed
