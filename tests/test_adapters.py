"""Adapters in a MergeModule: merged as products, of unlike form, exported, and (IA)^3."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import (
    HEAD,
    IDS,
    Classifier,
    adapted,
    base,
    batch,
    change_config,
    ia3,
    loss,
    saved,
    tasks,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from mats_lightning import MergeModule, Task, collect_statistics, merging
from mats_lightning.checkpoints import load_weights
from mats_lightning.lora import load_lora, lora_products
from mats_lightning.low_rank import refactor
from mats_lightning.sidecar import save_statistics, sidecar_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
ROWS: Any = DataLoader([0])  # type: ignore[arg-type]


def unloaded(*models: Any) -> list[dict[str, Tensor]]:
    """Whole models, the adapters added to their weights by peft."""
    return [model.merge_and_unload().state_dict() for model in models]


def logits(model: Any) -> Tensor:
    found: Tensor = model.eval().backbone(IDS).logits
    return found


# -- what peft saves beside the factors --------------------------------------------------------

LOST = "biases of adapted layers"  # by peft 0.18.0
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {  # in the file, the last of these names
    "DoRA": ("bert", {"use_dora": True}, "lora_magnitude_vector"),
    "all biases": ("gpt2", {"bias": "all"}, "ln_f.bias"),
    LOST: ("bert", {"bias": "lora_only"}, "query.base_layer.bias"),
    "biases of factors": ("bert", {"lora_bias": True}, "lora_B.bias"),
    "embedding": ("bert", {"target_modules": ["word_embeddings"]}, "lora_embedding_A"),
    "embedding that is saved whole": (
        "llama",
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens.base_layer.weight",
    ),
}


def variant(kind: str, seed: int, **options: Any) -> Any:
    if kind != "llama":
        return adapted(kind, seed, **options)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, **options))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("name", VARIANTS)
def test_adapters_of_all_kinds_are_merged_and_exported(tmp_path: Path, name: str) -> None:
    kind, options, key = VARIANTS[name]
    pair, states = [], []
    for seed in (1, 2):
        model = variant(kind, seed, **options)
        model.save_pretrained(str(tmp_path / f"{seed}"))
        states.append(load_file(tmp_path / f"{seed}" / "adapter_model.safetensors"))
        module = Classifier()
        module.backbone = variant(kind, 3, **options)
        head = HEAD if kind == "bert" else ()
        checkpoint = tmp_path / f"{seed}"
        pair.append(Task(f"{seed}", module, checkpoint, ROWS, head=head, prefix="backbone."))
    if name == LOST and not any(stored.endswith(key) for stored in states[0]):
        with pytest.raises(
            ValueError, match=r"'backbone\..*base_layer.bias' is not in it .* newer"
        ):
            MergeModule(pair, "average").merge(progress=False)
        return
    assert any(stored.endswith(key) for stored in states[0])
    merge = MergeModule(pair, "average")
    merge.merge(progress=False)
    merge.export(tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert written.keys() == {n for n in states[0] if "classifier" not in n}
    for stored, tensor in written.items():
        torch.testing.assert_close(tensor, (states[0][stored] + states[1][stored]) / 2)
    below: Any = variant(kind, 3, **options).unload()
    loaded: Any = PeftModel.from_pretrained(below, str(tmp_path / "out")).eval()
    merged: Any = merge.model("1")
    if kind == "bert":
        head_of: Any = merged.backbone.base_model.model.classifier.modules_to_save["default"]
        loaded.base_model.model.classifier.load_state_dict(head_of.state_dict())
    torch.testing.assert_close(loaded(IDS).logits, logits(merged))


def test_biases_that_peft_saves_under_several_names_are_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, "bert", 1, bias="all")
    with pytest.raises(
        ValueError, match=r"holds '.*classifier.* with bias='all' peft saves .*unload"
    ):
        load_weights(path)


def test_biases_that_peft_has_not_saved_are_missed(tmp_path: Path) -> None:
    for path in saved(tmp_path, "bert", 1, bias="lora_only"):
        file = path / "adapter_model.safetensors"
        state = load_file(file)
        save_file({n: t for n, t in state.items() if not n.endswith("base_layer.bias")}, file)
        module = Classifier()
        module.backbone = variant("bert", 3, bias="lora_only")
        task = Task("1", module, path, ROWS, head=HEAD, prefix="backbone.")
        with pytest.raises(ValueError, match=r"task '1': .*query.base_layer.bias' is not in it"):
            MergeModule([task], "average").merge(progress=False)


def test_trained_rows_of_an_embedding_are_refused(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, "bert", 1, trainable_token_indices=[1, 2])
    with pytest.raises(ValueError, match=r"trainable_tokens_delta': rows of .* Fold .*unload"):
        load_weights(path)


# -- products ----------------------------------------------------------------------------------


def test_the_average_of_products_is_that_of_whole_models(tmp_path: Path) -> None:
    """Rank 4 holds the sum of two products of rank 2; each task has its own classifier."""
    module = MergeModule(tasks(tmp_path), "average", {"lora_rank": 4})
    states = unloaded(adapted("bert", 1), adapted("bert", 2))
    for number, name in enumerate(module.tasks):
        whole = base("bert")
        mean = {n: (states[0][n] + states[1][n]) / 2 for n in states[0]}
        mean |= {n: t for n, t in states[number].items() if n.startswith("classifier")}
        whole.load_state_dict(mean)
        found = logits(module.model(name))
        torch.testing.assert_close(found, whole(IDS).logits, rtol=1e-4, atol=1e-5)
    assert set(module.lost.values()) and max(module.lost.values()) < 1e-6


def test_products_are_merged_and_refactored_with_the_statistics(tmp_path: Path) -> None:
    pair = tasks(tmp_path)
    options: dict[str, Any] = {"iterations": [2, 5], "lora_rank": 3, "weights": {"bert1": 2.0}}
    options["weights"]["bert2"] = 0.5
    module = MergeModule(pair, "mats", options)
    adapters = [load_lora(task.checkpoint, "backbone.") for task in pair]
    statistics = [task.load_statistics() for task in pair]
    merged: Any = merging.mats(
        lora_products(adapters), statistics, iterations=[2, 5], weights=[2.0, 0.5]
    )
    for count in (2, 5):
        module.use(count)
        expected, lost = refactor(
            merged[count].state_dict, 3, adapters[0], statistics, weights=[2.0, 0.5]
        )
        state = module.model("bert1").state_dict()
        for name in expected.weights:
            if ".lora_" in name:
                assert torch.equal(state[name], expected.weights[name]), name
        assert module.lost == lost and max(lost.values()) > 1e-3
    assert all(name.endswith("base_layer.weight") for name in module.blocks)


def test_the_length_of_merged_products(tmp_path: Path) -> None:
    """A product has no start but zero."""
    pair = tasks(tmp_path)
    options: dict[str, Any] = {"lora_rank": 8, "iterations": 2}
    added = {}
    for scale in (1.0, 1.5):
        module = MergeModule(pair, "mats", {**options, "scale": scale})
        module.merge(progress=False)
        layers = dict(module.model("bert1").named_modules())
        name, layer = next((n, x) for n, x in layers.items() if hasattr(x, "lora_A"))
        found: Any = layer
        added[scale] = found.get_delta_weight("default")
        assert name and added[scale].abs().max() > 1e-4
    torch.testing.assert_close(added[1.5], 1.5 * added[1.0], rtol=1e-3, atol=1e-6)


def test_statistics_of_the_factors_alone_are_none_of_products(tmp_path: Path) -> None:
    pair = tasks(tmp_path)
    for seed, task in enumerate(pair, start=1):
        batches = [batch("bert")]
        task.statistics = collect_statistics(
            Classifier(seed), batches, loss_fn=loss, progress=False
        )
    module = MergeModule(pair, "mats", {"lora_rank": 2})
    with pytest.raises(ValueError, match=r"cover none .* and adapted_weights=True, since lora"):
        module.merge(progress=False)


class Experts(nn.Module):
    """Fused weights of four experts, as in mixtures: peft adapts them as one parameter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(4, 6, 8, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ni,eio->neo", x, self.up).mean(1)


class Mixture(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["experts.up"])
        below: Any = nn.ModuleDict({"experts": Experts()})
        self.backbone = get_peft_model(below, config)

    def test_step(self, batch: Any) -> None: ...


@pytest.mark.parametrize("method", ["average", "individual"])
def test_adapters_of_experts_keep_their_scaling(tmp_path: Path, method: str) -> None:
    """Their A has r rows for each expert, and alpha is divided by r all the same."""
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))

    def output(module: Any) -> Tensor:
        found: Tensor = module.backbone.base_model.model["experts"](x)
        return found

    torch.manual_seed(2)
    own = Mixture()
    for parameter in own.backbone.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    own.backbone.save_pretrained(str(tmp_path))
    pair = [Task(name, Mixture(), tmp_path, ROWS, head=(), prefix="backbone.") for name in "ab"]
    module = MergeModule(pair, method)
    module.merge(progress=False)
    torch.testing.assert_close(output(module.model("a")), output(own))
    assert not torch.allclose(output(own), output(Mixture()), atol=0.1)


def test_adapters_that_were_frozen_stay_so(tmp_path: Path) -> None:
    pair = tasks(tmp_path)
    for task in pair:
        task.module.requires_grad_(False)
    MergeModule(pair, "average", {"lora_rank": 4}).merge(progress=False)
    assert not any(p.requires_grad for task in pair for p in task.module.parameters())


def test_each_merge_brings_its_own_rank(tmp_path: Path) -> None:
    """Other merges of the same tasks find their modules as they need them."""
    pair = tasks(tmp_path)
    products = MergeModule(pair, "task_arithmetic", {"scale": 0.5, "lora_rank": 4})
    before = logits(MergeModule(pair, "average").model("bert2"))
    alone = MergeModule(pair, "individual")
    alone.merge()
    own = logits(pair[1].module)
    for _ in range(2):
        products.use(0)
        there = logits(pair[1].module)  # the same weights, with the sum of both products halved
        torch.testing.assert_close(there, logits(products.model("bert2")))
        alone.use(0)
        assert torch.equal(logits(pair[1].module), own)
        assert not torch.allclose(there, own, atol=1e-3)
    assert torch.equal(logits(MergeModule(pair, "average").model("bert2")), before)
    model: Any = products.model("bert1")
    model.backbone.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base("bert"), tmp_path / "again").eval()
    assert torch.equal(again(IDS).logits, logits(model))


def test_what_a_merge_made_of_the_modules_is_not_what_the_adapters_are(tmp_path: Path) -> None:
    """Its modules have the rank and scaling of one adapter: others have to be told apart still."""
    pair = unlike(tmp_path, lora_alpha=3)
    MergeModule(pair, "average", {"lora_rank": 4}).merge(progress=False)
    with pytest.raises(ValueError, match="'bert1' and 'bert2' have lora_alpha=6 and 3"):
        MergeModule(pair, "average").merge(progress=False)
    anew = [replace(task, statistics=None) for task in pair]  # over modules in the merge's form
    for task, seed in zip(anew, (1, 2), strict=True):
        own = logits(MergeModule(anew, "individual").model(task.name))
        options = {"lora_alpha": 3} if seed == 2 else {}
        torch.testing.assert_close(own, adapted("bert", seed, **options)(IDS).logits)
    change_config(Path(pair[0].checkpoint), lora_alpha=5)
    with pytest.raises(ValueError, match=r"'bert1': .*trained with lora_alpha=5, its module has 6"):
        MergeModule([replace(pair[0])], "average").merge(progress=False)


def test_averaged_names_are_those_of_the_products(tmp_path: Path) -> None:
    options: dict[str, Any] = {"lora_rank": 4, "iterations": 1}
    pair = tasks(tmp_path)
    module = MergeModule(pair, "mats", options | {"averaged": ["query.base_layer"]})
    kinds = {name: block.statistic for name, block in module.blocks.items()}
    assert {n for n, kind in kinds.items() if kind == "identity"} == {
        name for name in kinds if "query" in name
    }
    for given in ("lora_A", "classifier"):  # neither is among what is merged
        with pytest.raises(ValueError, match=rf"averaged: no parameter has '{given}' in its name"):
            MergeModule(pair, "mats", options | {"averaged": given}).merge(progress=False)


def unlike(folder: Path, **options: Any) -> list[Task]:
    """Two adapters, the second of another form."""
    found = []
    for seed, changes in ((1, {}), (2, options)):
        (path,) = saved(folder, "bert", seed, **changes)
        module = Classifier()
        module.backbone = adapted("bert", 9, **changes)
        found.append(Task(path.name, module, path, ROWS, head=HEAD, prefix="backbone."))
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_alpha": 3}, "lora_alpha=6 and 3"),
        ({"use_rslora": True}, "use_rslora=None and True"),
        ({"r": 3}, "r=2 and 3"),
        ({"alpha_pattern": {"query": 1}}, "alpha_pattern=None and {'query': 1}"),
    ],
)
def test_factors_of_another_scaling_are_not_merged(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    pair = unlike(tmp_path, **options)
    expected = rf"adapters of tasks 'bert1' and 'bert2' have {message}: .*give lora_rank"
    with pytest.raises(ValueError, match=expected):
        MergeModule(pair, "average").merge(progress=False)
    MergeModule(pair, "individual").merge()  # which merges nothing
    module = MergeModule(pair, "average", {"lora_rank": 5})
    states = unloaded(adapted("bert", 1), adapted("bert", 2, **options))
    whole = base("bert")
    mean = {n: (states[0][n] + states[1][n]) / 2 for n in states[0]}
    mean |= {n: t for n, t in states[1].items() if n.startswith("classifier")}
    whole.load_state_dict(mean)
    found = logits(module.model("bert2"))
    torch.testing.assert_close(found, whole(IDS).logits, rtol=1e-4, atol=1e-5)


def test_what_has_no_products_is_refused(tmp_path: Path) -> None:
    (task, _) = pair = unlike(tmp_path)
    task.head = ()
    with pytest.raises(ValueError, match=r"'bert1': .*classifier\..* is none: name it in Task\(h"):
        MergeModule([task], "average", {"lora_rank": 2}).merge(progress=False)
    with pytest.raises(ValueError, match="individual has no option 'lora_rank'; it has none"):
        MergeModule(pair, "individual", {"lora_rank": 2})
    with pytest.raises(ValueError, match="lora_rank=0: an adapter has 1 at least"):
        MergeModule(pair, "average", {"lora_rank": 0})
    task.checkpoint, task.prefix = tmp_path / "whole.ckpt", ""
    torch.save({"state_dict": task.module.state_dict()}, task.checkpoint)
    task.__dict__.pop("weights", None)
    with pytest.raises(ValueError, match=r"'bert1': .*whole\.ckpt is no LoRA adapter: expected"):
        MergeModule([task], "average", {"lora_rank": 2}).merge(progress=False)


# -- export ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 3, "scale": 1.2}], ids=["factors", "products"]
)
def test_the_merged_adapter_is_exported(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = {"bert1": 2.0, "bert2": 1.0}
    module = MergeModule(tasks(tmp_path), "mats", {"iterations": 3, "weights": weights, **options})
    module.scores = {"bert1": 0.5, "bert2": 0.25}
    folder = module.export(tmp_path / "merged")
    for name in module.tasks:
        model = PeftModel.from_pretrained(base("bert"), folder).eval()
        head = load_file(folder / "heads" / f"{name}.safetensors")
        inside = {n.removeprefix(f"{HEAD[0]}.modules_to_save.default."): t for n, t in head.items()}
        model.get_submodule("base_model.model.classifier").load_state_dict(inside)
        assert torch.equal(model(IDS).logits, logits(module.model(name)))
    card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
    assert card.data.to_dict()["library_name"] == "peft"
    assert "| bert2 | bert2 | 6 | accuracy | 0.250 |" in card.content
    assert "  weights:\n    bert1: 2.0\n    bert2: 1.0\n" in card.content
    for said in ("lora_rank: 3", "scale: 1.2"):
        assert (said in card.content) == bool(options)
    assert "PeftModel.from_pretrained(model, folder)" in card.content
    assert {file.stat().st_mode & 0o777 for file in folder.rglob("*.*")} == {
        (folder / "README.md").stat().st_mode & 0o777
    }
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        module.export(folder)
    assert module.export(folder, overwrite=True) == folder


def test_the_head_of_a_group_is_exported_as_it_was_merged(tmp_path: Path) -> None:
    pair = tasks(tmp_path)
    for task in pair:
        task.head_group = "one"
        change_config(Path(task.checkpoint), base_model_name_or_path="/home/someone/models/minilm")
    folder = MergeModule(pair, "average").export(tmp_path / "merged")
    heads = [load_file(folder / "heads" / f"{task.name}.safetensors") for task in pair]
    name = f"{HEAD[0]}.modules_to_save.default.weight"
    mean = (pair[0].weights[name] + pair[1].weights[name]) / 2
    for head in heads:
        torch.testing.assert_close(head[name], mean)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert "# the minilm that it was trained on" in readme and "someone" not in readme


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "SEQ_CLS", None])
def test_the_type_of_a_task_is_exported_where_it_asks_for_no_head(
    tmp_path: Path, kind: str | None
) -> None:
    """AutoPeftModel needs it."""
    pair = tasks(tmp_path)
    for task in pair:
        change_config(Path(task.checkpoint), task_type=kind)
    folder = MergeModule(pair, "average").export(tmp_path / "merged")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == (kind if kind == "CAUSAL_LM" else None)


# -- (IA)^3 ------------------------------------------------------------------------------------


class Vectors(pl.LightningModule):
    """A model whose (IA)^3 vectors are not where they start; the classifier is frozen."""

    def __init__(self, seed: int = 9) -> None:
        super().__init__()
        self.backbone: Any = ia3()
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad = "ia3_l" in name
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.eval()


def vector_tasks(folder: Path) -> list[Task]:
    found = []
    for seed in (1, 2, 3):
        module, path = Vectors(seed).double(), folder / f"ia3 {seed}"
        module.backbone.save_pretrained(path)
        statistics = collect_statistics(module, [batch("bert")], loss_fn=loss, progress=False)
        save_statistics(statistics, sidecar_path(path))
        evaluated = Vectors().double()
        found.append(Task(path.name, evaluated, path, ROWS, head=HEAD, prefix="backbone."))
    return found


@pytest.mark.parametrize("preconditioner", ["kronecker", None])
def test_vectors_solve_their_block_fishers_equation(
    tmp_path: Path, preconditioner: str | None
) -> None:
    """sum C_i l = sum C_i l_i, solved densely; with the preconditioner in one iteration."""
    triple = vector_tasks(tmp_path)
    options: dict[str, Any] = {
        "objective": ["block_fisher"],
        "damping": 1e-2,
        "normalize": False,
        "preconditioner": preconditioner,
        "preconditioner_damping": 0.0,
        "iterations": 1 if preconditioner else 500,
        "tolerance": 1e-12,
    }
    module = MergeModule(triple, "mats", options)
    found = module.model("ia3 1").state_dict()
    names = [name for name in load_weights(triple[0].checkpoint, "backbone.") if "ia3_l" in name]
    assert len(names) == 3 and set(module.blocks) == set(names)
    for name in names:
        total: Any = 0.0
        b: Any = 0.0
        for task in triple:
            c = task.load_statistics().block_fisher[name].double()
            c = c + 1e-2 * c.diagonal().mean() * torch.eye(len(c))
            vector = load_weights(task.checkpoint, "backbone.")[name].flatten()
            total, b = total + c, b + c @ vector
        expected = torch.linalg.solve(total, b)
        torch.testing.assert_close(found[name].flatten(), expected, rtol=1e-8, atol=1e-10)


def test_regmean_of_vectors_says_what_there_is(tmp_path: Path) -> None:
    message = r"'.*ia3_l\.default' \.\.\.\) has the statistic gram; they have diagonal_fisher and"
    with pytest.raises(ValueError, match=message + r" block_fisher: choose a method for these"):
        MergeModule(vector_tasks(tmp_path), "regmean").merge(progress=False)


def test_lora_rank_of_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'ia3 1': .*is no LoRA adapter"):
        MergeModule(vector_tasks(tmp_path), "average", {"lora_rank": 2}).merge(progress=False)
