"""The recipes with adapters, on the tiny model and tasks of test_recipes.py."""

import json
from pathlib import Path
from typing import Any

import merge
import pytest
import torch
import train_tasks
import yaml
from classifier import Classifier
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from merge_options import Options, parse_options
from paper_settings import read_setting
from peft import PeftModel
from safetensors import safe_open
from test_recipes import Crash, bert, configuration, one_task, own_cache, write_task
from text_model import TextClassifier
from transformers import AutoModel

from mats_lightning import load_statistics
from mats_lightning.checkpoints import load_weights

__all__ = ["bert", "own_cache"]  # fixtures

PAPER = Path(merge.__file__).parent / "paper"
TASKS = ("colour", "size")


def arguments(folder: Path, bert: Path, adapter: str, **changes: Any) -> list[str]:
    tasks = [
        {"name": name, "hub": {"dataset": str(write_task(folder / "data" / name, name))}}
        for name in TASKS
    ]
    options: dict[str, Any] = {"tasks": tasks, "adapter": adapter, "epochs": 4, **changes}
    return configuration(folder, bert, **options)


def methods_of(name: str, ranks: tuple[int, int] = (2, 4)) -> dict[str, Any]:
    """Those of the paper's setting, their ranks fit for a tiny adapter, one point of each grid."""
    methods: dict[str, Any] = yaml.safe_load((PAPER / name).read_text())["methods"]
    for method in methods.values():
        options, grid = method.setdefault("options", {}), method.pop("grid", {})
        options |= {option: values[-1] for option, values in grid.items()}
        if "lora_rank" in options:
            options["lora_rank"] = ranks[options["lora_rank"] > 8]
        if "iterations" in options:
            options["iterations"] = min(options["iterations"], 3)
    return methods


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", ["text_ia3", "text_lora", "convolutions"])
def test_the_paper_s_settings_are_options(name: str, fast: bool) -> None:
    _, setting = read_setting(name, fast)
    options = Options(**{"tasks": ["trec", "sms"], "methods": {}, **setting.options})
    named = setting.options.get("tasks")  # else those of merge.yaml
    assert (named is None) == (name != "convolutions" and not fast)
    assert len(named or options.task_list) == 2 and len(setting.seeds) == 1
    assert (options.adapter is not None) == name.startswith("text")
    assert setting.methods.keys() == methods_of(f"{name}.yaml").keys()
    for label, method in setting.methods.items():
        if "closed form" in label:  # which may lie farther away than the default radius
            assert method.options["radius"] is None
    if options.adapter is not None:
        callback = train_tasks.statistics_callback(options)
        assert callback.options.adapted_weights == (options.adapter == "lora")
        assert ("kfac" in callback.options.kinds) == (options.adapter == "lora")


@pytest.mark.parametrize(
    ("adapter", "options", "learning_rate"),
    [("ia3", {}, 5e-2), ("lora", {"r": 2, "lora_alpha": 4}, 2e-2)],
)
def test_the_whole_comparison_of_adapters(
    tmp_path: Path, bert: Path, adapter: str, options: dict[str, Any], learning_rate: float
) -> None:
    methods = methods_of(f"text_{adapter}.yaml")
    outcomes = merge.main(
        arguments(
            tmp_path,
            bert,
            adapter,
            adapter_options=options,
            learning_rate=learning_rate,
            methods=methods,
        )
    )
    rows = {outcome.label: outcome for outcome in outcomes}
    assert list(rows) == ["individual", *methods]
    assert min(rows["individual"].scores.values()) > 0.9
    for label in methods:
        if label.startswith("MaTS"):
            blocks = rows[label].blocks
            assert blocks and all(".base_layer" in name for name in blocks) == ("products" in label)

    for task in TASKS:
        (folder,) = (tmp_path / "out/tasks").glob(f"{task}-*")
        files = {task, f"{task}.mats.safetensors", "result.json", "settings.json"}
        assert {path.name for path in folder.iterdir()} == files
        assert set(load_statistics(folder / task).diagonal_fisher) == {
            *load_weights(folder / task, "backbone."),
            *("head.weight", "head.bias"),
        }
    exported = json.loads((tmp_path / "out/results.json").read_text())["exported"]
    assert exported in methods
    merged = tmp_path / "out/merged"
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(bert), merged)
    stored = {name: value for name, value in model.state_dict().items() if ".default" in name}
    for name, value in load_weights(merged).items():
        assert torch.equal(stored[name], value)
    with safe_open(merged / "heads/size.safetensors", framework="pt") as head:
        assert set(head.keys()) == {"head.weight", "head.bias"}
    assert f"merge_method: {methods[exported]['method']}" in (merged / "README.md").read_text()


def test_only_the_adapter_and_the_head_are_trained(bert: Path) -> None:
    torch.manual_seed(3)
    models = []
    for classes in (2, 5):  # the adapter's random start does not depend on the head
        torch.manual_seed(0)
        models.append(TextClassifier(classes, backbone=str(bert), adapter="lora"))
    for name, value in models[0].named_parameters():
        trained = ".lora_" in name or name.startswith("head.")
        assert value.requires_grad == trained, name
        if not name.startswith("head."):
            assert torch.equal(value, models[1].get_parameter(name)), name
    assert models[0].backbone.peft_config["default"].base_model_name_or_path == str(bert)


def test_a_task_of_an_adapter_has_its_own_head_and_the_pretrained_model(
    tmp_path: Path, bert: Path
) -> None:
    options, task, data = one_task(arguments(tmp_path, bert, "ia3", learning_rate=5e-2))
    trained = train_tasks.train_task(options, task, data)
    found = train_tasks.as_task(options, task, data, trained.checkpoint)
    start = train_tasks.task_module(options, task, data).state_dict()
    state = found.module.state_dict()
    changed = {name for name in state if not torch.equal(state[name], start[name])}
    assert changed == {"head.weight", "head.bias"}
    vectors = {name for name in start if ".ia3_l." in name}
    assert vectors and set(found.weights) == vectors | changed
    assert any(not torch.equal(found.weights[name], start[name]) for name in vectors)


def test_a_kill_while_the_adapter_is_saved_loses_nothing(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = one_task(arguments(tmp_path, bert, "ia3", epochs=1))

    def crash(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(train_tasks, "write_json", lambda path, value: None)
        patch.setattr("adapters.os.replace", crash)
        with pytest.raises(Crash):
            train_tasks.train_task(*chosen)
    steps: list[int] = []
    monkeypatch.setattr(Classifier, "training_step", lambda *_: steps.append(0))
    second = train_tasks.train_task(*chosen)
    assert second.now and not steps  # resumed after its last epoch
    assert not train_tasks.train_task(*chosen).now
    assert load_statistics(second.checkpoint).examples == 96


def test_settings_of_an_adapter_are_those_of_the_fine_tune(tmp_path: Path, bert: Path) -> None:
    """And a fine-tune of the whole model has no settings of adapters: earlier ones are kept."""
    folders = set()
    for changes in (
        {"adapter": "ia3"},
        {"adapter": "lora"},
        {"adapter": "lora", "adapter_options": {"r": 4}},
        {"adapter": None},
    ):
        options, task, data = one_task(arguments(tmp_path, bert, **changes))
        module = train_tasks.task_module(options, task, data)
        settings = train_tasks.task_settings(options, task, data, module)
        assert ("adapter" in settings) == (changes["adapter"] is not None)
        folders.add(train_tasks.task_folder(options, task, settings))
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--adapter", "vera"], "adapter: 'vera' is none of ia3, lora"),
        (["--adapter_options", "{r: 4}"], "adapter_options without an adapter: choose ia3 or lora"),
        (
            ["--adapter", "ia3", "--tasks", "[trec, {name: sms, head_group: a}]"],
            "tasks: 'sms' has the head_group 'a', and heads beside an adapter are not merged",
        ),
    ],
)
def test_options_that_do_not_fit_an_adapter_are_refused(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(given)
    assert message in capsys.readouterr().err


def test_options_that_peft_refuses_are_named(bert: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"peft makes no LoraConfig for .*'rank'"):
        TextClassifier(2, str(bert), adapter="lora", adapter_options={"rank": 4})
    with pytest.raises(MisconfigurationException, match=r"no IA3Config for .*nothing"):
        TextClassifier(2, str(bert), adapter="ia3", adapter_options={"target_modules": ["nothing"]})
    with pytest.raises(MisconfigurationException, match="adapter: 'vera' is none of ia3, lora"):
        TextClassifier(2, str(bert), adapter="vera")
