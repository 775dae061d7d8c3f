"""The exported folder is loaded again by the libraries that users load it with."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5Model,
)

from mats_lightning import MergeModule, Task, collect_statistics
from mats_lightning.card import MergeCard
from mats_lightning.checkpoints import load_weights
from mats_lightning.export import export_adapter, export_huggingface

CONFIG = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=10,
)
CARD = MergeCard(
    method="mats",
    options={
        "objective": "kfac",
        "iterations": 20,
        "damping": 1e-3,
        "weights": (1, 2.5),
        "x0": None,
    },
    tasks=[
        {"name": "trec", "checkpoint": "trec.ckpt", "metric": "accuracy", "examples": 2000},
        {"name": "sms spam", "checkpoint": "sms.ckpt", "metric": "f1|macro"},
    ],
    base_model="sentence-transformers/all-MiniLM-L6-v2",
    versions={"mats_lightning": "0.1.0", "torch": "2.13.0"},
    scores={"trec": 0.9412},
)


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    return BertModel(CONFIG)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[UNK]", "[PAD]", "who", "is", "merging"]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", model_max_length=10
    )


@pytest.fixture
def heads() -> dict[str, dict[str, Tensor]]:
    stacked = torch.randn(2, 3, 8)
    return {  # transposed, a view, and with gradients: as heads come
        "trec": {"weight": stacked[0], "bias": torch.zeros(3)},
        "sms spam": {"weight": torch.randn(8, 2).T, "bias": torch.ones(2, requires_grad=True)},
        "tied": {"a": stacked[1], "b": stacked[1]},
    }


def assert_same(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors = found.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name


def blocks(folder: Path, language: str) -> str:
    readme = (folder / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"```{language}\n(.*?)```", readme, flags=re.DOTALL)
    return str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_for_bit(
    tmp_path: Path, model: BertModel, heads: dict[str, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    folder = export_huggingface(tmp_path / "out" / "merged", model, None, heads, CARD)
    assert folder == tmp_path / "out" / "merged"
    assert_same(AutoModel.from_pretrained(folder), model)
    assert load_weights(folder).keys() == model.state_dict().keys()
    for task, tensors in heads.items():
        found = load_file(folder / "heads" / f"{task}.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor)
    assert [entry.name for entry in folder.parent.iterdir()] == ["merged"]


def test_tokenizer_comes_along(
    tmp_path: Path, model: BertModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    folder = export_huggingface(tmp_path / "merged", model, tokenizer, {}, CARD)
    text = "who is merging what"
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids
    assert not (folder / "heads").exists()


def test_snippet_of_the_card_runs_as_printed(
    tmp_path: Path,
    model: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    heads: dict[str, dict[str, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = export_huggingface(tmp_path / "merged", model, tokenizer, heads, CARD)
    code = blocks(folder, "python")
    assert "# weight (3, 8), bias (3,)" in code
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code, names)
    assert_same(names["model"], model)
    assert torch.equal(names["head"]["weight"], heads["trec"]["weight"])
    assert names["tokenizer"]("who").input_ids == [2]


def test_snippet_loads_a_model_with_a_head_by_its_own_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BertForSequenceClassification(CONFIG)
    folder = export_huggingface(tmp_path / "merged", model, None, {}, CARD)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(blocks(folder, "python"), names)
    assert type(names["model"]) is BertForSequenceClassification
    assert_same(names["model"], model)


def test_card_says_how_the_model_was_merged(tmp_path: Path, model: BertModel) -> None:
    folder = export_huggingface(tmp_path / "merged", model, None, {}, CARD)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "library_name": "transformers",
        "tags": ["merge", "mats_lightning"],
    }
    assert yaml.safe_load(blocks(folder, "yaml")) == {
        "merge_method": "mats",
        "base_model": "sentence-transformers/all-MiniLM-L6-v2",
        "models": [{"model": "trec.ckpt"}, {"model": "sms.ckpt"}],
        "parameters": {
            "objective": "kfac",
            "iterations": 20,
            "damping": 1e-3,
            "weights": [1, 2.5],
            "x0": None,
        },
    }
    assert "one a task, merged into this one by mats_lightning without\ntheir data. Ex" in card.text
    assert "| trec | trec.ckpt | 2000 | accuracy | 0.941 |\n" in card.text
    assert "| sms spam | sms.ckpt |  | f1\\|macro |  |\n" in card.text
    assert "Made with mats_lightning 0.1.0, torch 2.13.0." in card.text


def test_card_says_that_a_refresh_needed_rows(tmp_path: Path, model: BertModel) -> None:
    refreshed = replace(CARD, refreshed=True)
    folder = export_huggingface(tmp_path / "merged", model, None, {}, refreshed)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "their data, and refreshed with some rows of theirs at the merged weights." in text


@pytest.mark.parametrize(
    "base_model, shown",
    [("/home/someone/models/minilm", "minilm"), ("runs/minilm", "minilm"), (None, None)],
)
def test_paths_of_this_machine_stay_here(
    tmp_path: Path,
    model: BertModel,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    base_model: str | None,
    shown: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "runs" / "minilm"  # "runs/minilm" could be a hub id, were it not here
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    folder = export_huggingface(
        "merged",
        AutoModel.from_pretrained(source),
        AutoTokenizer.from_pretrained(source),
        {},
        replace(CARD, base_model=base_model),
    )
    assert yaml.safe_load(blocks(folder, "yaml")).get("base_model") == shown
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict()
    for file in (file for file in folder.rglob("*") if file.is_file()):
        content = file.read_bytes()
        assert b"someone" not in content
        assert str(tmp_path).encode() not in content, file.name


def test_folder_that_is_not_empty(tmp_path: Path, model: BertModel) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"is not empty: .* pass overwrite=True"):
        export_huggingface(tmp_path, model, None, {}, CARD)
    with pytest.raises(FileExistsError, match=r"something else than a model or an adapter \(no"):
        export_huggingface(tmp_path, model, None, {}, CARD, overwrite=True)
    with pytest.raises(FileExistsError, match=r"notes\.txt is a file"):
        export_huggingface(tmp_path / "notes.txt", model, None, {}, CARD, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("mine", ["train.py", "data/labels.csv", "data/config.json", "last.ckpt"])
def test_what_no_export_wrote_is_not_removed(tmp_path: Path, model: BertModel, mine: str) -> None:
    """A project's folder can have a config.json, too."""
    heads = {"log": {"weight": torch.ones(2)}}
    export_huggingface(tmp_path / "merged", model, None, heads, CARD)
    file = tmp_path / "merged" / mine
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(FileExistsError, match=rf"holds {mine}, which is no part of an export"):
        export_huggingface(tmp_path / "merged", model, None, {}, CARD, overwrite=True)
    assert file.read_text() == "mine"
    file.unlink()
    export_huggingface(tmp_path / "merged", model, None, {}, CARD, overwrite=True)


@pytest.mark.parametrize("folder", [".", ".."])
def test_the_folder_that_the_program_runs_in_stays(
    tmp_path: Path, model: BertModel, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(FileExistsError, match="is what the program runs in"):
        export_huggingface(folder, model, None, {}, CARD, overwrite=True)
    assert Path.cwd().exists()


class Encoder(T5EncoderModel):
    """Of a module that is no part of transformers."""


@pytest.mark.parametrize("tokenizing", [False, True])
@pytest.mark.parametrize("kind", [T5Model, T5ForConditionalGeneration, T5EncoderModel, Encoder])
def test_the_program_loads_the_class_that_was_exported(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    kind: Any,
    tokenizing: bool,
) -> None:
    """T5 with its head is the base model of itself."""
    config = T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    model = kind(config)
    folder = export_huggingface(
        tmp_path / "merged", model, tokenizer if tokenizing else None, {}, CARD
    )
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(blocks(folder, "python"), names)
    assert type(names["model"]) is kind
    assert ("AutoModel" in names) == (kind is T5Model)
    assert_same(names["model"], model)


def test_empty_folder_is_taken(tmp_path: Path, model: BertModel) -> None:
    (tmp_path / "merged").mkdir()
    export_huggingface(tmp_path / "merged", model, None, {}, CARD)
    assert_same(AutoModel.from_pretrained(tmp_path / "merged"), model)


def test_overwrite_leaves_nothing_of_the_earlier_export(
    tmp_path: Path, model: BertModel, heads: dict[str, dict[str, Tensor]]
) -> None:
    export_huggingface(tmp_path / "merged", BertModel(CONFIG), None, heads, CARD)
    export_huggingface(tmp_path / "merged", model, None, {}, CARD, overwrite=True)
    assert_same(AutoModel.from_pretrained(tmp_path / "merged"), model)
    assert not (tmp_path / "merged" / "heads").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


def test_an_export_of_the_other_kind_is_replaced_too(tmp_path: Path, model: BertModel) -> None:
    config = {"peft_type": "IA3"}
    export_adapter(tmp_path / "merged", config, {"a": torch.ones(2)}, {}, None)
    export_huggingface(tmp_path / "merged", model, None, {}, CARD, overwrite=True)
    assert_same(AutoModel.from_pretrained(tmp_path / "merged"), model)
    export_adapter(tmp_path / "merged", config, {"a": torch.ones(2)}, {}, None, overwrite=True)
    assert sorted(entry.name for entry in (tmp_path / "merged").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_failure_leaves_the_earlier_export(
    tmp_path: Path, model: BertModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = BertModel(CONFIG)
    export_huggingface(tmp_path / "merged", earlier, None, {}, CARD)

    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "save_pretrained", half)
    with pytest.raises(KeyboardInterrupt):
        export_huggingface(tmp_path / "merged", model, None, {}, CARD, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        export_huggingface(tmp_path / "other", model, None, {}, CARD)
    assert_same(AutoModel.from_pretrained(tmp_path / "merged"), earlier)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize("between_renames", [False, True])
def test_what_a_kill_left_is_cleared(
    tmp_path: Path, model: BertModel, between_renames: bool
) -> None:
    (tmp_path / ".merged.partial").mkdir()
    (tmp_path / ".merged.partial" / "model.safetensors").write_text("half")
    if between_renames:
        BertModel(CONFIG).save_pretrained(tmp_path / ".merged.old")
    else:
        BertModel(CONFIG).save_pretrained(tmp_path / "merged")
    export_huggingface(tmp_path / "merged", model, None, {}, CARD, overwrite=True)
    assert_same(AutoModel.from_pretrained(tmp_path / "merged"), model)
    assert [entry.name for entry in tmp_path.iterdir()] == ["merged"]


@pytest.mark.parametrize(
    "task", ["", ".", "..", "../x", "a/b", "a\\b", "a\0b", "a\n", "a ", "con:", "x" * 200]
)
def test_task_that_cannot_name_a_file(tmp_path: Path, model: BertModel, task: str) -> None:
    with pytest.raises(ValueError, match=rf"task {re.escape(repr(task))} cannot name"):
        export_huggingface(tmp_path / "merged", model, None, {task: {}}, CARD)
    assert list(tmp_path.iterdir()) == []


def test_tasks_that_differ_in_case_alone(tmp_path: Path, model: BertModel) -> None:
    with pytest.raises(ValueError, match="tasks 'TREC' and 'trec' would share a file"):
        export_huggingface(tmp_path / "merged", model, None, {"TREC": {}, "trec": {}}, CARD)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"options": {"init": torch.ones(1)}}, "option 'init' of the card is or holds a Tensor"),
        ({"options": {"w": [1, {2: 3}]}}, "option 'w' of the card is or holds a dict"),
        ({"scores": {"trek": 1.0}}, "scores of trek, which are not among its tasks: trec, sms"),
    ],
    ids=["tensor", "key", "scores"],
)
def test_card_that_cannot_be_written(
    tmp_path: Path, model: BertModel, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        export_huggingface(tmp_path / "merged", model, None, {}, replace(CARD, **changes))
    assert list(tmp_path.iterdir()) == []


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = BertModel(CONFIG), nn.Linear(8, 2)


def two_tasks(folder: Path) -> list[Task]:
    tasks, rows = [], DataLoader[Any]([0])  # type: ignore[arg-type]
    for name in ("trec", "sms"):
        module = Classifier()
        torch.save({"state_dict": module.state_dict()}, folder / name)
        tasks.append(Task(name, module, folder / name, rows))
    return tasks


def test_a_merge_from_a_state_dict_says_so_on_its_card(tmp_path: Path) -> None:
    def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
        mean: Tensor = model.head(model.backbone(**batch).pooler_output).mean()
        return mean

    tasks, rows = two_tasks(tmp_path), [{"input_ids": torch.tensor([[2, 3, 4], [4, 3, 2]])}]
    for task in tasks:
        task.statistics = collect_statistics(task.module, rows, loss_fn=loss, progress=False)
    start = {n: t for n, t in tasks[0].weights.items() if not n.startswith("head.")}
    module = MergeModule(tasks, "mats", {"init": start})
    module.export(tmp_path / "merged")
    assert "a state dict" in (tmp_path / "merged" / "README.md").read_text()


def test_models_that_are_not_merged_are_no_model_to_export(tmp_path: Path) -> None:
    tasks = two_tasks(tmp_path)
    MergeModule(tasks, "average").export(tmp_path / "average")
    with pytest.raises(ValueError, match=r"'individual' merges nothing.* or take .*model\(task\)"):
        MergeModule(tasks, "individual").export(tmp_path / "individual")
    assert {path.name for path in tmp_path.iterdir()} == {"trec", "sms", "average"}
