"""What README.md shows runs as it stands, and prints what stands below it."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import lightning as L
import pytest
import torch
from datasets import Dataset
from test_recipes import bert
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mats_lightning import MergeModule
from mats_lightning.rounds import Round

__all__ = ["bert"]  # a fixture

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


def blocks(heading: str) -> list[str]:
    """The Python blocks below a heading, up to the next one."""
    found: list[str] = []
    kind, here = "", False
    lines: list[str] = []
    for line in README.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if here and kind == "```python":
                found.append("\n".join(lines))
            kind, lines = "" if kind else line, []
        elif kind:
            lines.append(line)
        elif line.startswith("#"):
            here = line == heading
    return found


class Words(L.LightningDataModule):
    """Rows of numbers in place of a tokenizer's; the class is that of the second one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def loader(self, seed: int) -> Any:
        ids = torch.randint(6, 36, (48, 7), generator=torch.Generator().manual_seed(seed))
        rows = [
            {
                "input_ids": row,
                "attention_mask": torch.ones_like(row),
                "labels": row[1] % self.classes,
            }
            for row in ids
        ]
        return DataLoader(rows, batch_size=8, shuffle=seed == 0)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self.loader(0)

    def val_dataloader(self) -> Any:
        return self.loader(1)

    def test_dataloader(self) -> Any:
        return self.loader(2)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.filterwarnings("ignore:.*you defined a `validation_step`")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
def test_the_text_classifier_is_trained_merged_loaded_and_refreshed(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    names: dict[str, Any] = {
        "trec_data": Words(6),
        "sms_data": Words(2),
        "tokenizer": tokenizer,
    }

    def run(block: str) -> None:
        text = block.replace("sentence-transformers/all-MiniLM-L6-v2", str(bert))
        exec(compile(text, str(README), "exec"), names)

    run(blocks("## Statistics from your own training")[0])
    merging = blocks("## Merging your own models")
    for block in merging[:4]:  # merge, load, relative to the individual models, a scale
        run(block)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()
    module, head = names["module"], names["head"]
    assert isinstance(module, MergeModule) and module.scores == {}
    state = module.state_of("trec")
    merged = {n: t for n, t in state.items() if n.startswith("head.")}
    assert head.keys() == merged.keys()
    for name, tensor in names["encoder"].state_dict().items():
        torch.testing.assert_close(tensor, state[f"backbone.{name}"])
    run(blocks("### A refresh: a few hundred rows a task, after the merge")[0])
    rounds = names["rounds"]
    assert [type(done) for done in rounds] == [Round, Round] and set(module.scores) == {
        "trec",
        "sms",
    }


class Wrapped(L.LightningModule):
    """A model with its classifier, as transformers has it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


def test_statistics_of_a_model_of_the_hub(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    texts = [f"{colour} the a" for colour in ("red", "blue", "green", "dark")] * 5
    names: dict[str, Any] = {
        "rows": Dataset.from_dict({"text": texts, "labels": [0, 1] * 10}),
        "tokenizer": AutoTokenizer.from_pretrained(bert),
        "model": model,
        "module": Wrapped(model),
        "data": Words(2),
    }
    collecting, hub = blocks("## Statistics from your own training")[1:]
    exec(compile(collecting, str(README), "exec"), names)
    assert names["statistics"].examples == 20
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: "my_model")
    exec(compile(hub, str(README), "exec"), names)
    merge = MergeModule([names["task"]], "fisher")
    merge.merge(progress=False)
    for name, tensor in merge.state_of("trec").items():
        torch.testing.assert_close(tensor, model.state_dict()[name.removeprefix("model.")])
