"""Heads outside of an adapter's folder: each task's own, merged around, fitted, kept, exported."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_lora import IDS, adapted, base, batch
from test_lora import tasks as tasks_with_heads_inside
from test_module import make_trainer
from test_refresh import Killed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mats_lightning import MergeModule, RefreshPlan, Task, collect_statistics, refresh, task_rounds
from mats_lightning.checkpoints import load_weights
from mats_lightning.heads import HeadFit, fit_head
from mats_lightning.rounds import Round
from mats_lightning.sidecar import save_statistics, sidecar_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
HEAD = {"head.weight", "head.bias"}
VECTORS = {"objective": ["block_fisher"], "damping": 0.1, "iterations": 1, "normalize": False}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {  # the adapter, options of mats
    "factors": ("lora", {"iterations": 3}),
    "products": ("lora", {"iterations": 3, "lora_rank": 3}),
    "vectors": ("ia3", VECTORS),
}
CONFIGS: dict[str, Any] = {
    "lora": lambda: LoraConfig(r=2, lora_alpha=6, target_modules=["query", "value"]),
    "ia3": lambda: IA3Config(
        target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]
    ),
}


class OutsideHead(pl.LightningModule):
    """An adapted encoder, and a head that no adapter's folder has; neither is where it starts."""

    def __init__(self, adapter: str, seed: int) -> None:
        super().__init__()
        encoder: Any = base("bert").bert
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.backbone: Any = get_peft_model(encoder, CONFIGS[adapter]())
            self.head = nn.Linear(8, 3)
            for parameter in self.parameters():
                if parameter.requires_grad:
                    parameter.data += torch.randn(parameter.shape) / 2

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found: Tensor = self.head(self.backbone(**inputs).last_hidden_state[:, 0])
        return found

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch), batch["labels"])

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("likelihood", -self.training_step(batch))

    test_step = validation_step


def made(folder: Path, adapter: str) -> list[Task]:
    """As the README has it: the trained modules, folders without the heads, statistics of all."""
    found = []
    rows = [{k: v[i] for k, v in batch("bert").items()} for i in range(6)]
    for seed in (1, 2):
        path = folder / f"{adapter}{seed}"
        module = OutsideHead(adapter, seed)
        if not path.exists():
            module.backbone.save_pretrained(str(path))
            statistics = collect_statistics(
                module, [batch("bert")], adapted_weights=adapter == "lora", progress=False
            )
            save_statistics(statistics, sidecar_path(path))
        data: Any = DataLoader(rows, batch_size=6)  # type: ignore[arg-type]
        found.append(Task(f"{seed}", module, path, data, "likelihood", prefix="backbone."))
    return found


def merge_of(folder: Path, kind: str) -> MergeModule:
    adapter, options = MERGES[kind]
    return MergeModule(made(folder, adapter), "mats", options)


def trained_head(kind: str, task: str) -> dict[str, Tensor]:
    state = OutsideHead(MERGES[kind][0], int(task)).state_dict()
    return {name: state[name] for name in HEAD}


def refreshed(module: MergeModule, folder: Path | None = None, **plan: Any) -> list[Round]:
    return refresh(
        module,
        RefreshPlan(**{"heads": (2, 5), "labels": "data", "learning_rate": 1e-2, **plan}),
        trainer=make_trainer(),
        folder=folder,
        loaders={task: [batch("bert")] for task in module.tasks},
        progress=False,
    )


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in HEAD)


@pytest.mark.parametrize("kind", MERGES)
def test_the_head_is_the_tasks_own_as_it_was_when_the_task_was_made(
    tmp_path: Path, kind: str
) -> None:
    module = merge_of(tmp_path, kind)
    for task in module.tasks.values():
        nn.init.zeros_(task.module.get_parameter("head.weight"))
    module.merge(progress=False)
    alone = MergeModule(list(module.tasks.values()), "individual")
    for name, task in module.tasks.items():
        head = trained_head(kind, name)
        assert_same(module.own_heads()[name], head)
        for state in (task.weights, module.state_of(name), module.model(name).state_dict()):
            assert same(state, head)
        assert_same(
            {n: t for n, t in task.weights.items() if n not in HEAD},
            load_weights(task.checkpoint, "backbone."),
        )
        own = OutsideHead(MERGES[kind][0], int(name)).state_dict()
        assert_same(alone.model(name).state_dict(), own)
    assert not HEAD & set(module.shared_state())


@pytest.mark.parametrize("kind", MERGES)
def test_heads_alone_are_fitted_exported_and_given_back(tmp_path: Path, kind: str) -> None:
    module = merge_of(tmp_path, kind)
    module.merge(progress=False)
    merged = module.shared_state()
    (done,) = refreshed(module, rounds=0)
    assert done.judged < done.tried["0"]  # losses
    assert_same(module.shared_state(), merged)
    folder = module.export(tmp_path / "out")
    inside = {name for name in load_file(folder / "adapter_model.safetensors") if "head" in name}
    assert not inside
    for name, task in module.tasks.items():
        head = module.own_heads()[name]
        assert bool(done.heads[name]) != same(head, trained_head(kind, name))
        assert_same(load_file(folder / "heads" / f"{name}.safetensors"), head)
        model: Any = module.model(name)
        assert same(model.state_dict(), head) and same(task.module.state_dict(), head)
        encoder: Any = base("bert").bert
        loaded = PeftModel.from_pretrained(encoder, folder).eval()
        hidden = loaded(IDS).last_hidden_state
        torch.testing.assert_close(hidden, model.eval().backbone(IDS).last_hidden_state)
    assert any(done.heads.values())
    # the fits have not changed the start of another merge
    again = MergeModule(list(module.tasks.values()), "mats", MERGES[kind][1])
    (second,) = refreshed(again, rounds=0)
    assert (second.tried, second.heads) == (done.tried, done.heads)
    alone = MergeModule(list(module.tasks.values()), "individual")
    assert all(same(alone.model(n).state_dict(), trained_head(kind, n)) for n in alone.tasks)


def teachers_logits(module: MergeModule) -> list[Tensor]:
    """What a refresh of heads alone takes for its targets, a task each."""
    found: list[Tensor] = []

    def logits(model: Any, batch: Any) -> Any:
        given = model(batch)
        if not torch.is_grad_enabled():
            found.append(given)
        return given

    refresh(
        module,
        RefreshPlan(rounds=0, heads=(1,), judge="score"),  # losses run without gradient too
        trainer=make_trainer(),
        logits_fn=logits,
        loaders={task: [batch("bert")] for task in module.tasks},
        progress=False,
    )
    return found


@pytest.mark.parametrize("kind", MERGES)
def test_the_teacher_has_the_trained_head(tmp_path: Path, kind: str) -> None:
    module = merge_of(tmp_path, kind)
    refreshed(module, rounds=0)
    for found, name in zip(teachers_logits(module), module.tasks, strict=True):
        own = OutsideHead(MERGES[kind][0], int(name)).eval()
        torch.testing.assert_close(found, own(batch("bert")))


@pytest.mark.parametrize(("kind", "rounds"), [("factors", 1), ("products", 0), ("vectors", 1)])
def test_an_interrupted_refresh_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, rounds: int
) -> None:
    whole = merge_of(tmp_path, kind)
    wanted = refreshed(whole, tmp_path / "whole", rounds=rounds)
    assert wanted[-1].taken == bool(rounds) and any(wanted[0].heads.values())
    calls: list[None] = []

    def counted(*args: Any, **options: Any) -> HeadFit:
        calls.append(None)
        if len(calls) == 2 + 2 * rounds:  # the last fit
            raise Killed
        return fit_head(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(task_rounds, "fit_head", counted)
        with pytest.raises(Killed):
            refreshed(merge_of(tmp_path, kind), tmp_path / "cut", rounds=rounds)
    again, finished = merge_of(tmp_path, kind), merge_of(tmp_path, kind)
    found = refreshed(again, tmp_path / "cut", rounds=rounds)
    assert [(r.losses, r.step, r.heads) for r in found] == [
        (r.losses, r.step, r.heads) for r in wanted
    ]
    monkeypatch.setattr(task_rounds, "fit_head", None)  # nothing is left to fit
    assert refreshed(finished, tmp_path / "cut", rounds=rounds) == found
    for name in whole.tasks:
        assert_same(again.state_of(name), whole.state_of(name))
        assert_same(finished.state_of(name), whole.state_of(name))


@pytest.mark.parametrize("kind", MERGES)
def test_the_head_of_a_group_is_merged(tmp_path: Path, kind: str) -> None:
    adapter, options = MERGES[kind]
    pair = made(tmp_path, adapter)
    for task in pair:
        task.head_group = "one"
    method = {"lora_rank": 3} if "lora_rank" in options else {}
    folder = MergeModule(pair, "average", method).export(tmp_path / "out")
    heads = [trained_head(kind, task.name) for task in pair]
    for task in pair:
        written = load_file(folder / "heads" / f"{task.name}.safetensors")
        assert set(written) == HEAD
        for name, tensor in written.items():
            torch.testing.assert_close(tensor, (heads[0][name] + heads[1][name]) / 2)


def test_a_head_below_the_adapter_that_its_folder_lacks(tmp_path: Path) -> None:
    """Of the model that peft wraps, and not among modules_to_save."""
    options = {"task_type": None, "target_modules": ["query"], "exclude_modules": None}
    head = "backbone.base_model.model.classifier"
    pair, weights = [], {}
    for seed in (1, 2):
        model = adapted("bert", seed, **options)
        classifier = model.get_submodule("base_model.model.classifier")
        nn.init.normal_(classifier.get_parameter("weight"))
        model.save_pretrained(str(tmp_path / f"{seed}"))
        module = OutsideHead("lora", seed)
        module.backbone = model
        rows: Any = DataLoader([0])  # type: ignore[arg-type]
        task = Task(f"{seed}", module, tmp_path / f"{seed}", rows, head=(head,), prefix="backbone.")
        pair.append(task)
        weights[task.name] = classifier.get_parameter("weight").detach().clone()
    heads = MergeModule(pair, "average").own_heads()
    assert heads.keys() == weights.keys()
    for name, own in heads.items():
        assert set(own) == {f"{head}.weight", f"{head}.bias"}
        assert torch.equal(own[f"{head}.weight"], weights[name])


def test_what_peft_has_below_a_head_is_not_the_head(tmp_path: Path) -> None:
    """The untrained copy beside modules_to_save, and the weight of an adapted layer in a head."""
    for task in tasks_with_heads_inside(tmp_path):
        assert set(task.weights) == set(load_weights(task.checkpoint, "backbone."))
    layer = "backbone.base_model.model.encoder.layer.0.attention.self.query"
    task, bare = made(tmp_path, "lora")
    other = replace(task, head=("head", layer))
    assert other.weights.keys() == task.weights.keys()
    bare.head = ()
    assert not HEAD & set(bare.weights)
