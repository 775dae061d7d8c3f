"""Tasks whose modules have tied parameters: one parameter with several names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mats_lightning import MergeModule, Task, collect_statistics, merging
from mats_lightning.checkpoints import load_weights
from mats_lightning.measuring import measure, next_weights
from mats_lightning.tied import tied_names, with_tied

NAMES = ("words.weight", "output.weight")


def rows(seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 7, (32,), generator=generator) for _ in range(2)]
    return DataLoader(TensorDataset(*ids), batch_size=8)


class Language(pl.LightningModule):
    """The output layer is the embedding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.words, self.layer = nn.Embedding(7, 6), nn.Linear(6, 6)
            self.output = nn.Linear(6, 7, bias=False)
        self.output.weight = self.words.weight

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.output(self.layer(self.words(batch[0])).tanh()), batch[1])


def languages(folder: Path, only: str | None = None) -> list[Task]:
    """Two tasks; `only` is the name of the tied parameter that their files hold, or both."""
    tasks = []
    for seed in (1, 2):
        module = Language(seed)
        state = {n: t.clone() for n, t in module.state_dict().items()}
        for name in NAMES:
            if only not in (None, name):
                del state[name]
        save_file(state, folder / f"{seed}.safetensors")
        statistics = collect_statistics(module, rows(seed), progress=False)
        tasks.append(
            Task(
                str(seed),
                Language(),
                folder / f"{seed}.safetensors",
                rows(9),
                head=(),
                statistics=statistics,
            )
        )
    return tasks


def mean_words(tasks: list[Task]) -> Tensor:
    return sum((t.weights["words.weight"] for t in tasks), torch.zeros(7, 6)) / len(tasks)


# -- files that hold one of the names ----------------------------------------------------------


@pytest.mark.parametrize("only", NAMES)
def test_a_file_may_hold_any_one_name_of_a_tied_parameter(tmp_path: Path, only: str) -> None:
    tasks = languages(tmp_path, only)
    whole = Language(1).state_dict()
    assert set(tasks[0].weights) == set(whole)
    assert len(tasks[0].weights) == len(whole)
    for name in NAMES:
        assert name in tasks[0].weights
        assert torch.equal(tasks[0].weights[name], whole[name])
    module = MergeModule(tasks, "mats", {"iterations": 2})
    module.merge(progress=False)
    assert set(module.shared_state()) == set(whole)


@pytest.mark.parametrize("only", NAMES)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("task_arithmetic", {"scale": 0.5}),
        ("pretrained", {}),
        ("mats", {"init": "pretrained", "iterations": 1}),
    ],
)
def test_so_may_the_start(tmp_path: Path, only: str, method: str, options: dict[str, Any]) -> None:
    start = Language(0).state_dict()
    states = []
    for given in (start, {n: t for n, t in start.items() if n not in NAMES or n == only}):
        module = MergeModule(languages(tmp_path), method, options, pretrained=given)
        module.merge(progress=False)
        states.append(module.state_of("1"))
    assert set(states[0]) == set(states[1])
    for name, tensor in states[0].items():
        assert torch.equal(states[1][name], tensor), name


def test_so_may_the_init_of_mats(tmp_path: Path) -> None:
    init = {n: t for n, t in Language(0).state_dict().items() if n != "output.weight"}
    options = {"objective": "diagonal_fisher", "init": init, "iterations": 0}
    module = MergeModule(languages(tmp_path), "mats", options)
    module.merge(progress=False)
    assert torch.equal(module.shared_state()["output.weight"], init["words.weight"])


def test_so_may_the_checkpoints_of_a_round_over_files(tmp_path: Path) -> None:
    languages(tmp_path, "words.weight")
    module, merged = Language(0), tmp_path / "merged.safetensors"
    save_file({n: t.clone() for n, t in module.state_dict().items()}, merged)
    sidecar, checkpoints = tmp_path / "a.mats.safetensors", [tmp_path / "1.safetensors"]
    measure(merged, module, rows(1), sidecar, statistics=("diagonal_fisher",), progress=False)
    options: dict[str, Any] = {"objective": "diagonal_fisher", "iterations": 1}
    found = next_weights(merged, [sidecar], tmp_path / "next.safetensors", checkpoints, **options)
    values = [found.state_dict[name] for name in NAMES]
    assert torch.equal(*values)
    assert not torch.equal(values[0], module.words.weight)


def test_what_is_missing_and_not_tied_is_an_error(tmp_path: Path) -> None:
    (task, _) = languages(tmp_path, "words.weight")
    state = {n: t for n, t in Language(1).state_dict().items() if n == "words.weight"}
    save_file(state, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match=r"'layer\.bias' is in the module alone \(2 such names\)"):
        _ = task.weights


def test_two_values_of_one_parameter_are_an_error(tmp_path: Path) -> None:
    (task, _) = languages(tmp_path)
    state = {n: t.clone() for n, t in Language(1).state_dict().items()}
    state["output.weight"] += 1
    save_file(state, tmp_path / "1.safetensors")
    message = r"task '1': .*'words\.weight' and 'output\.weight' are one parameter .*different"
    with pytest.raises(ValueError, match=message):
        _ = task.weights


class T5(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.T5Config(
            vocab_size=30, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2
        )
        self.model = transformers.T5ForConditionalGeneration(config)


class GPT2(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.GPT2Config(
            vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2
        )
        self.model = transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [T5, GPT2])
def test_hugging_face_folders_are_checkpoints_and_starts(
    tmp_path: Path, make: Callable[[], Any]
) -> None:
    """They hold one name of each tied parameter."""
    states: list[Mapping[str, Tensor]] = []
    for name in ("0", "1", "start"):
        module = make()
        module.model.save_pretrained(tmp_path / name)
        states.append({n: t.clone() for n, t in module.state_dict().items()})
    data: Any = []
    tasks = [Task(n, make(), tmp_path / n, data, head=(), prefix="model.") for n in ("0", "1")]
    start = load_weights(tmp_path / "start", "model.")
    assert tied_names(tasks[0].module)
    assert set(start) < set(states[2])
    module = MergeModule(tasks, "task_arithmetic", {"scale": 0.5}, pretrained=start)
    module.merge(progress=False)
    merged = module.state_of("0")
    assert set(merged) == set(states[0])
    for name, tensor in merged.items():
        expected = (states[0][name] + states[1][name]) / 2
        torch.testing.assert_close(tensor, expected)


def test_weights_without_anything_tied_stay_as_they_are() -> None:
    weights = {"a": torch.ones(1)}
    assert with_tied(weights, {}, "x") is weights
    assert with_tied(weights, {"c": "b"}, "x") is weights


# -- one parameter is merged once --------------------------------------------------------------

AVERAGING: dict[str, dict[str, Any]] = {
    "mats": {"objective": "diagonal_fisher"},
    "iso_c": {"scale": 1.0},
    "tsv_m": {"scale": 1.0},
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", AVERAGING)
def test_averaged_means_the_parameter_by_any_of_its_names(
    tmp_path: Path, method: str, name: str
) -> None:
    tasks = languages(tmp_path)
    options = {**AVERAGING[method], "averaged": [f"^{name}"]}
    module = MergeModule(tasks, method, options, pretrained=Language().state_dict())
    module.merge(progress=False)
    for found in (
        *(module.shared_state()[n] for n in NAMES),
        module.model("1").get_parameter("words.weight"),
    ):
        torch.testing.assert_close(found, mean_words(tasks))


@pytest.mark.parametrize("name", NAMES)
def test_averaged_and_kept_of_the_functions_too(name: str) -> None:
    models = [Language(seed) for seed in (1, 2)]
    thetas = [model.state_dict() for model in models]
    statistics = [collect_statistics(model, rows(3), progress=False) for model in models]
    averaged = merging.mats(thetas, statistics, objective="diagonal_fisher", averaged=name)
    options: dict[str, Any] = {"objective": "diagonal_fisher", "kept": name}
    kept = merging.refresh_step(thetas[0], statistics, thetas, **options)
    for alias in NAMES:
        mean = (thetas[0][alias] + thetas[1][alias]) / 2
        torch.testing.assert_close(averaged.state_dict[alias], mean)
        assert torch.equal(kept.state_dict[alias], thetas[0][alias])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dare", {"drop_rate": 0.5, "scale": 1.0, "seed": 0}),
        ("ties", {"density": 0.2, "scale": 1.0}),
        ("average", {}),
    ],
)
def test_a_parameter_is_merged_once_under_its_first_name(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    """So it gets one value, and counts once in a density over the whole model."""
    tasks, start = languages(tmp_path), Language().state_dict()
    module = MergeModule(tasks, method, options, pretrained=start)
    module.merge(progress=False)
    once = [name for name in start if name != "output.weight"]
    thetas = [{name: task.weights[name] for name in once} for task in tasks]
    given = options if method == "average" else options | {"pretrained": start}
    expected = getattr(merging, method)(thetas, **given)
    expected["output.weight"] = expected["words.weight"]
    found = module.shared_state()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert torch.equal(module.model("2").state_dict()[name], tensor), name


def test_a_parameter_that_one_task_alone_ties_is_an_error(tmp_path: Path) -> None:
    tasks = languages(tmp_path)
    untied = Language()
    untied.output.weight = nn.Parameter(untied.words.weight.detach().clone())
    tasks[1].module = untied
    message = "tasks '1' and '2' tie their parameters in different ways: 'output.weight'"
    with pytest.raises(ValueError, match=message):
        MergeModule(tasks, "average").merge(progress=False)
