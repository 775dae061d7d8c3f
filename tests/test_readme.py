"""The complete example in README.md runs as it stands, and prints what stands below it."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def scores(text: str) -> dict[str, float]:
    return {name: float(score) for name, score in re.findall(r"^(\w+) (\d\.\d+)$", text, re.M)}


def test_the_complete_example_prints_what_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = (
        README.read_text(encoding="utf-8").split("## A complete example\n")[1].split("\n## ")[0]
    )
    example, printed = re.findall(r"^```(?:python)?\n(.+?)^```$", section, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(example, str(README), "exec"), {"__name__": "example"})
    found, said = scores(capsys.readouterr().out), scores(printed)
    assert list(found) == list(said) == ["individual", "average", "mats"]
    assert found == pytest.approx(said, abs=0.03)
    assert found["average"] < found["mats"] < found["individual"]
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {
        f"{t}.ckpt{s}" for t in ("first", "second") for s in ("", ".mats.safetensors")
    }
