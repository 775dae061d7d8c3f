"""LoRA: adapters as peft saves them, merged factor by factor and as products, and loaded again."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from mats_lightning import (
    MergeModule,
    RefreshPlan,
    Statistics,
    Task,
    collect_statistics,
    merging,
    refresh,
)
from mats_lightning.checkpoints import load_weights
from mats_lightning.lora import Lora, load_lora, lora_products, save_lora
from mats_lightning.low_rank import _damped_low_rank, low_rank, refactor
from mats_lightning.sidecar import save_statistics, sidecar_path

State = Mapping[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
LAYERS = {"bert": ["query", "dense"], "gpt2": ["c_attn", "c_proj"]}  # of unequal sizes
IDS = torch.randint(1, 20, (6, 5), generator=torch.Generator().manual_seed(0))


def base(kind: str) -> PreTrainedModel:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "bert":
            options: Any = {"num_labels": 3}
            config = BertConfig(
                vocab_size=20,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=12,
                max_position_embeddings=10,
                **options,
            )
            return BertForSequenceClassification(config).eval()
        gpt2 = GPT2Config(
            vocab_size=20,
            n_embd=8,
            n_layer=1,
            n_head=2,
            n_positions=10,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(gpt2).eval()


def adapted(kind: str, seed: int, **options: Any) -> PeftModel:
    """A LoRA that is not where it starts, on layers of the attention and the feed-forward part."""
    config = LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 6,
            "target_modules": LAYERS[kind],
            "exclude_modules": ["pooler.dense"] if kind == "bert" else None,
            "task_type": "SEQ_CLS" if kind == "bert" else "CAUSAL_LM",
            **options,
        }
    )
    model: Any = get_peft_model(base(kind), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.5, generator=generator)
    return model.eval()


def batch(kind: str) -> dict[str, Tensor]:
    labels = torch.arange(6) % 3 if kind == "bert" else IDS
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}


@cache
def statistics_of(kind: str, seed: int) -> Statistics:
    return collect_statistics(
        adapted(kind, seed), [batch(kind)], adapted_weights=True, progress=False
    )


def saved(folder: Path, kind: str, *seeds: int, **options: Any) -> list[Path]:
    paths = [folder / f"{kind}{seed}" for seed in seeds]
    for path, seed in zip(paths, seeds, strict=True):
        adapted(kind, seed, **options).save_pretrained(str(path))
    return paths


def assert_equal(found: State, expected: State) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- reading -----------------------------------------------------------------------------------


def ia3() -> Any:
    return get_peft_model(
        base("bert"),
        IA3Config(
            target_modules=["query", "output.dense"],
            feedforward_modules=["output.dense"],
            task_type="SEQ_CLS",
        ),
    )


@pytest.mark.parametrize("kind", ["bert", "gpt2", "ia3"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_an_adapters_weights_have_the_names_of_the_model(
    tmp_path: Path, kind: str, prefix: str
) -> None:
    model = ia3() if kind == "ia3" else adapted(kind, 1)
    model.save_pretrained(str(tmp_path / "a"))
    expected = {prefix + n: t for n, t in model.state_dict().items() if "default" in n.split(".")}
    assert len(expected) > 2
    assert_equal(load_weights(tmp_path / "a", prefix), expected)
    assert_equal(load_weights(tmp_path / "a" / "adapter_model.safetensors", prefix), expected)


def test_an_adapter_without_its_configuration(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "bert", 1)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is no JSON .*copy it again"):
        load_weights(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json beside .*Copy it"):
        load_weights(folder)
    with pytest.raises(FileNotFoundError, match=r"no adapter in .*expected adapter_model\.safe"):
        load_lora(tmp_path)


def test_another_kind_of_adapter(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "bert", 1)
    change_config(folder, peft_type="VERA")
    with pytest.raises(ValueError, match="an adapter of kind VERA: LORA and IA3 are read"):
        load_weights(folder)
    ia3().save_pretrained(tmp_path / "ia3")
    with pytest.raises(ValueError, match="is of kind IA3: only LORA has products"):
        load_lora(tmp_path / "ia3")


# -- factor by factor --------------------------------------------------------------------------


class Classifier(pl.LightningModule):
    def __init__(self, seed: int = 9) -> None:
        super().__init__()
        self.backbone: Any = adapted("bert", seed)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        logits = self.backbone(**batch).logits
        self.log("accuracy", (logits.argmax(-1) == batch["labels"]).float().mean())


HEAD = ("backbone.base_model.model.classifier",)


def loss(module: Any, batch: dict[str, Tensor]) -> Any:
    return module.backbone(**batch).loss


def tasks(folder: Path) -> list[Task]:
    """Adapters in folders, their statistics beside the folders; the modules have other weights."""
    found = []
    rows = [{k: v[i] for k, v in batch("bert").items()} for i in range(6)]
    for seed, path in zip((1, 2), saved(folder, "bert", 1, 2), strict=True):
        statistics = collect_statistics(
            Classifier(seed),
            [batch("bert")],
            loss_fn=loss,
            adapted_weights=True,
            progress=False,
        )
        save_statistics(statistics, sidecar_path(path))
        data: Any = DataLoader(rows, batch_size=6)  # type: ignore[arg-type]
        found.append(Task(path.name, Classifier(), path, data, head=HEAD, prefix="backbone."))
    return found


@pytest.mark.parametrize(
    ("method", "options"),
    [("average", {}), ("fisher", {}), ("regmean", {}), ("mats", {"iterations": 3})],
)
def test_factors_are_merged_from_adapter_folders(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    module = MergeModule(tasks(tmp_path), method, options)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.test(module, verbose=False)

    paths = [tmp_path / "bert1", tmp_path / "bert2"]
    states = [load_weights(path, "backbone.") for path in paths]
    shared = [name for name in states[0] if ".lora_" in name]
    arguments = dict(options)
    if method != "average":
        arguments["statistics"] = [task.load_statistics() for task in module.tasks.values()]
    thetas = [{name: state[name] for name in shared} for state in states]
    result = getattr(merging, method)(thetas, **arguments)
    merged = result.state_dict if method == "mats" else result
    untouched = {n: t for n, t in Classifier().state_dict().items() if "default" not in n}
    for name, state in zip(module.tasks, states, strict=True):
        own = {n: state[n] for n in state if n not in shared}
        assert {n.rpartition(".")[2] for n in own} == {"weight", "bias"}
        model: Any = module.model(name)
        assert_equal(model.state_dict(), {**untouched, **own, **merged})
        # the merged adapter, and this task's head, as peft saves and loads it
        model.backbone.save_pretrained(tmp_path / "merged" / name)
        again = PeftModel.from_pretrained(base("bert"), tmp_path / "merged" / name).eval()
        assert torch.equal(again(IDS).logits, model.eval().backbone(IDS).logits)


def test_export_of_a_whole_checkpoint_under_peft_is_refused(tmp_path: Path) -> None:
    pair = tasks(tmp_path)
    for task in pair:
        task.checkpoint, task.prefix = tmp_path / f"{task.name}.ckpt", ""
        torch.save({"state_dict": task.module.state_dict()}, task.checkpoint)
    module = MergeModule(pair, "average")
    message = r"task 'bert1': 'backbone' of Classifier is peft's .*model\('bert1'\).*save_pretrai"
    with pytest.raises(ValueError, match=message):
        module.export(tmp_path / "whole")


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    """By the digest of the weights below, which the statistics cover too."""
    pair = tasks(tmp_path)
    layer = "backbone.base_model.model.bert.encoder.layer.0.attention.self.query.base_layer"
    nn.init.zeros_(pair[1].module.get_parameter(f"{layer}.weight"))
    with pytest.raises(ValueError, match=r"task 'bert2' .* belong to other weights: .*query\.base"):
        MergeModule(pair, "mats").merge(progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 3}, "was trained with r=2, its module has 3: build the module"),
        ({"rank_pattern": {"query": 3}}, r"was trained with rank_pattern=\{\}, its module has"),
        ({"target_modules": ["value"]}, r".*lora_A\.default\.weight' is in the .* alone"),
        ({"lora_alpha": 4}, "was trained with lora_alpha=6, its module has 4: build the module"),
        ({"use_rslora": True}, "was trained with use_rslora=False, its module has True"),
    ],
)
def test_a_module_with_another_adapter(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (task, _) = tasks(tmp_path)
    task.module.backbone = adapted("bert", 3, **options)
    with pytest.raises(ValueError, match=rf"task 'bert1': .*{message}"):
        MergeModule([task], "average").merge(progress=False)


# -- products ----------------------------------------------------------------------------------

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"query": 3}, "alpha_pattern": {"output.dense": 5, "nothing": 9}},
    "pattern of gpt2": {"alpha_pattern": {"^transformer.h.0.attn.c_attn": 5}},
    "started anew": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_what_peft_adds(tmp_path: Path, kind: str, form: str) -> None:
    (folder,) = saved(tmp_path, kind, 1, **FORMS[form])
    adapter = load_lora(folder, "net.")
    (products,) = lora_products([adapter])
    before = base(kind).state_dict()
    after = adapted(kind, 1, **FORMS[form]).merge_and_unload().state_dict()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    added = {
        n: n.removeprefix("net.base_model.model.").replace(".base_layer", "") for n in products
    }
    assert set(added.values()) == {n for n in changed if "classifier" not in n}
    assert len(added) == len(adapter.layers) >= 3
    for name, plain in added.items():
        torch.testing.assert_close(products[name], after[plain] - before[plain])
    assert {n.rpartition(".")[2] for n in adapter.head} == (
        {"weight", "bias"} if kind == "bert" else set()
    )


def test_products_are_read_lazily_and_computed_in_float32(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "gpt2", 1)
    adapter = load_lora(folder)
    half = replace(adapter, weights={n: t.bfloat16() for n, t in adapter.weights.items()})
    (products,) = lora_products([half])
    name = next(iter(products))
    assert name in products and "other" not in products
    assert products[name].dtype == torch.float32
    a, b = (half.weights[name.replace("base_layer", f"lora_{f}.default")].float() for f in "AB")
    assert torch.equal(products[name], (3.0 * (b @ a)).T)


@pytest.mark.parametrize("kind", LAYERS)
def test_products_are_merged_with_the_curvature_below(tmp_path: Path, kind: str) -> None:
    """Converged, it is the dense solution of sum G_i D A_i = sum G_i D_i A_i."""
    adapters = [load_lora(path) for path in saved(tmp_path, kind, 1, 2)]
    products = [{n: t.double() for n, t in p.items()} for p in lora_products(adapters)]
    statistics = [statistics_of(kind, seed) for seed in (1, 2)]
    options: dict[str, Any] = {"normalize": False, "damping": 1e-3, "tolerance": 1e-12}
    result = merging.mats(products, statistics, iterations=2000, **options)
    assert not result.uncovered
    for name in products[0]:
        total: Any = 0.0
        b: Any = 0.0
        for p, s in zip(products, statistics, strict=True):
            a, g = (m.double() for m in s.kfac[name.removesuffix(".weight")])
            c = torch.kron(g, a)
            c += 1e-3 * c.diagonal().mean() * torch.eye(len(c))
            delta = p[name].T if kind == "gpt2" else p[name]
            total, b = total + c, b + c @ delta.flatten()
        expected = torch.linalg.solve(total, b)
        found = result.state_dict[name].T if kind == "gpt2" else result.state_dict[name]
        error = (found.flatten() - expected).norm() / expected.norm()
        assert float(error) < 1e-5, name
    assert set(merging.regmean(products, statistics, uncovered="error")) == set(products[0])


class Validated(Classifier):
    validation_step = Classifier.test_step


@pytest.mark.parametrize("form", [{"lora_alpha": 3}, {"use_rslora": True}, {"r": 3}], ids=str)
@pytest.mark.parametrize("rank", [2, 4])
def test_teachers_are_the_tasks_own_models_whatever_was_merged(
    tmp_path: Path, form: dict[str, Any], rank: int
) -> None:
    """Heads are fitted to what each adapter predicts in its own form, not in that of the merge."""
    rows = [{k: v[i] for k, v in batch("bert").items()} for i in range(6)]
    data: Any = DataLoader(rows, batch_size=6)  # type: ignore[arg-type]
    pair, forms = [], {1: {}, 2: form}
    for seed, options in forms.items():
        (path,) = saved(tmp_path, "bert", seed, **options)
        module = Validated()
        module.backbone = adapted("bert", 9, **options)
        pair.append(Task(path.name, module, path, data, head=HEAD, prefix="backbone."))
    of_teachers: list[Tensor] = []

    def logits(model: Any, batch: dict[str, Tensor]) -> Any:
        found = model.backbone(IDS).logits
        if not torch.is_grad_enabled():
            of_teachers.append(found)
        return found

    refresh(
        MergeModule(pair, "average", {"lora_rank": rank}),
        RefreshPlan(rounds=0, heads=(1,), judge="score"),  # losses run without gradient too
        trainer=pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ),
        logits_fn=logits,
        loaders={task.name: [batch("bert")] for task in pair},
        progress=False,
    )
    wanted = [adapted("bert", seed, **options)(IDS).logits for seed, options in forms.items()]
    calls = len(of_teachers) // 2
    assert calls
    for found, expected in zip(of_teachers, [w for w in wanted for _ in range(calls)], strict=True):
        torch.testing.assert_close(found, expected)


# -- back to factors ---------------------------------------------------------------------------


def merged_products(folder: Path, kind: str) -> tuple[list[Lora], dict[str, Tensor]]:
    adapters = [load_lora(path) for path in saved(folder, kind, 1, 2, 3)]
    return adapters, {n: t.double() for n, t in merging.average(lora_products(adapters)).items()}


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def norm_of(
    statistics: list[Statistics], module: str, weights: list[float], damping: float
) -> tuple[Tensor, Tensor]:
    """The roots of C and G, as `refactor` documents them."""
    roots = []
    for i in (0, 1):
        factors = [s.kfac[module][i].double() for s in statistics]
        total = sum(w * f / f.diagonal().mean() for w, f in zip(weights, factors, strict=True))
        assert isinstance(total, Tensor)
        roots.append(root(total + damping * total.diagonal().mean() * torch.eye(len(total))))
    return roots[0], roots[1]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weighted", [True, False])
def test_full_rank_gives_the_products_again(tmp_path: Path, kind: str, weighted: bool) -> None:
    adapters, merged = merged_products(tmp_path, kind)
    statistics = [statistics_of(kind, seed) for seed in (1, 2, 3)] if weighted else []
    rank = 32  # more than any layer has
    found, lost = refactor(merged, rank, adapters[1], statistics)
    (again,) = lora_products([found])
    assert set(again) == set(merged)
    for name, delta in merged.items():
        assert again[name].dtype == torch.float64
        assert float((again[name] - delta).norm() / delta.norm()) < 1e-10, name
    assert lost == dict.fromkeys(found.layers, 0.0)
    assert {len(found.weights[f"{layer}.lora_A.default.weight"]) for layer in found.layers} == {32}
    assert_equal(found.head, adapters[1].head)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("weights", [None, [1.0, 0.25, 3.0]])
def test_the_weighted_norm_is_minimal(
    tmp_path: Path, kind: str, weights: list[float] | None
) -> None:
    """The singular values of G^1/2 D C^1/2 say how small it can be, and the plain SVD is worse."""
    adapters, merged = merged_products(tmp_path, kind)
    statistics = [statistics_of(kind, seed) for seed in (1, 2, 3)]
    found, lost = refactor(merged, 2, adapters[0], statistics, weights=weights, damping=1e-3)
    plain, lost_plain = refactor(merged, 2, adapters[0])
    products, plain_products = lora_products([found, plain])
    for layer in found.layers:
        name = f"{layer}.base_layer.weight"
        c, g = norm_of(statistics, name.removesuffix(".weight"), weights or [1.0] * 3, 1e-3)

        def norm(delta: Tensor, c: Tensor = c, g: Tensor = g) -> float:
            return float((g @ (delta.T if kind == "gpt2" else delta) @ c).norm())

        error, delta = norm(products[name] - merged[name]), merged[name]
        whitened = g @ (delta.T if kind == "gpt2" else delta) @ c
        smallest = float(torch.linalg.svdvals(whitened)[2:].norm())
        assert error == pytest.approx(smallest, rel=1e-6)
        assert lost[layer] == pytest.approx(error / norm(delta), rel=1e-6)
        assert norm(plain_products[name] - delta) > 1.01 * error
        ordinary = float((plain_products[name] - delta).norm() / delta.norm())
        assert lost_plain[layer] == pytest.approx(ordinary, rel=1e-6)
        assert float((products[name] - delta).norm() / delta.norm()) > ordinary


def test_a_gram_matrix_alone_weighs_the_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(5, 4, generator=generator).double()
    inputs = torch.randn(30, 4, generator=generator).double() * torch.tensor([3.0, 1.0, 1.0, 0.1])
    statistics = Statistics(
        {"A/x.base_layer": inputs.T @ inputs},
        30,
        {"x.base_layer": 30},
        {"x.base_layer": "x.base_layer"},
    )
    like = Lora({"peft_type": "LORA", "lora_alpha": 1}, {})
    found, lost = refactor({"x.base_layer.weight": delta}, 2, like, [statistics])
    (product,) = lora_products([found])
    outputs = inputs @ delta.T  # what the layer adds, on these rows
    error = (inputs @ product["x.base_layer.weight"].T - outputs).norm()
    smallest = torch.linalg.svdvals(outputs)[2:].norm()
    torch.testing.assert_close(error, smallest, rtol=1e-4, atol=0.0)
    assert lost["x"] == pytest.approx(float(smallest / outputs.norm()), rel=1e-4)


def test_factors_cut_into_blocks_are_block_diagonal() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(6, 4, generator=generator).double()
    roots = [torch.randn(2, d, 9, generator=generator).double() for d in (2, 3)]
    cut = [m @ m.mT for m in roots]  # A of two blocks, and G
    whole = [torch.block_diag(*m) for m in cut]
    like = Lora({"peft_type": "LORA", "lora_alpha": 1}, {})
    found = []
    for (a, g), info in ((cut, {"blocks": {"x.base_layer": [2, 2]}}), (whole, {})):
        tensors = {"A/x.base_layer": a, "G/x.base_layer": g}
        inputs = {"x.base_layer": "x.base_layer"}
        statistics = Statistics(tensors, 1, {"x.base_layer": 1}, inputs, info)
        found.append(refactor({"x.base_layer.weight": delta}, 2, like, [statistics]))
    assert_equal(found[0][0].weights, found[1][0].weights)
    assert found[0][1] == found[1][1]


def test_nothing_merged_gives_nothing() -> None:
    b, a, lost = low_rank(torch.zeros(3, 4).double(), 2)
    assert not b.any() and not a.any() and lost == 0.0


# -- saving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("prefix", ["", "net."])
@pytest.mark.parametrize("form", ["plain", "rank-stabilised", "patterns"])
def test_peft_loads_what_is_saved(tmp_path: Path, kind: str, prefix: str, form: str) -> None:
    """The same output as the model with the merged products added to its weights."""
    paths = saved(tmp_path, kind, 1, 2, **FORMS[form])
    adapters = [load_lora(path, prefix) for path in paths]
    merged = merging.average(lora_products(adapters))
    adapter, _ = refactor(merged, 6, adapters[0])  # two tasks of rank 2 or 3
    for task in adapters:
        folder = save_lora(tmp_path / "merged", adapter.with_head(task))
        loaded = PeftModel.from_pretrained(base(kind), folder).eval()

        whole = base(kind)
        state = whole.state_dict()
        for name, delta in merged.items():
            inside = name.removeprefix(f"{prefix}base_model.model.").replace(".base_layer", "")
            state[inside] += delta
        for name, tensor in task.head.items():
            inside = name.removeprefix(f"{prefix}base_model.model.")
            state[inside.replace(".modules_to_save.default", "")] = tensor
        whole.load_state_dict(state)
        torch.testing.assert_close(loaded(IDS).logits, whole(IDS).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(loaded(IDS).logits, base(kind)(IDS).logits, atol=1e-2)
        # and once more
        again = load_lora(folder, prefix)
        assert_equal(again.weights, adapter.with_head(task).weights)
        assert {file.name for file in tmp_path.iterdir()} == {f"{kind}1", f"{kind}2", "merged"}
        shutil.rmtree(folder)


def test_a_merge_of_the_same_rank_is_a_checkpoint_of_the_same_tasks(tmp_path: Path) -> None:
    pair = tasks(tmp_path)
    adapters = [load_lora(task.checkpoint, "backbone.") for task in pair]
    merged = merging.average(lora_products(adapters))
    adapter, _ = refactor(merged, 2, adapters[1], [task.load_statistics() for task in pair])
    folder = save_lora(tmp_path / "merged", adapter)
    task = Task("merged", Classifier(), folder, pair[0].data, head=HEAD, prefix="backbone.")
    model: Any = MergeModule([task], "individual").model("merged")
    loaded = PeftModel.from_pretrained(base("bert"), folder).eval()
    assert torch.equal(model.eval().backbone(IDS).logits, loaded(IDS).logits)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "bert", 1)
    with pytest.raises(FileExistsError, match="is not empty: export to another folder"):
        save_lora(folder, load_lora(folder))


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"layer_replication": [[0, 1], [0, 1]]},
    ],
    ids=str,
)
def test_variants_are_refused_by_name(tmp_path: Path, options: dict[str, Any]) -> None:
    (folder,) = saved(tmp_path, "bert", 1)
    change_config(folder, **options)
    option, value = next(iter(options.items()))
    with pytest.raises(ValueError) as refused:
        load_lora(folder)
    assert f"the adapter in {folder} has {option}={value!r}: it is more than" in str(refused.value)
    assert "merge_and_unload" in str(refused.value)


def test_a_dora_of_peft_is_refused(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "bert", 1, use_dora=True)
    with pytest.raises(ValueError, match="has use_dora=True"):
        load_lora(folder)
    change_config(folder, use_dora=False)
    with pytest.raises(ValueError, match=r"holds '.*lora_magnitude_vector.*', which is neither"):
        load_lora(folder)


def test_embeddings_are_refused(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "bert", 1, target_modules=["query", "word_embeddings"])
    with pytest.raises(
        ValueError, match=r"'.*word_embeddings\.lora_embedding_A.*', which is neith"
    ):
        load_lora(folder)


def test_factors_of_no_linear_layer_are_refused(tmp_path: Path) -> None:
    (folder,) = saved(tmp_path, "bert", 1)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "query.lora_A" in n)
    save_file(tensors | {name: torch.ones(3, 8)}, file)
    with pytest.raises(ValueError, match=r"'.*query' have the shapes \(3, 8\) and \(8, 2\); expec"):
        load_lora(folder)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_factor_without_the_other_is_refused(tmp_path: Path, factor: str) -> None:
    (folder,) = saved(tmp_path, "bert", 1)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[next(n for n in tensors if f"query.{factor}" in n)]
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"holds '.*query\.lora_.*' without the other factor of"):
        load_lora(folder)


def test_a_head_takes_the_prefix_of_its_new_adapter(tmp_path: Path) -> None:
    first, second = saved(tmp_path, "bert", 1, 2)
    found = load_lora(first, "net.").with_head(load_lora(second, "backbone."))
    assert_equal(found.head, load_lora(second, "net.").head)


def test_adapters_on_different_layers_are_refused(tmp_path: Path) -> None:
    first, second = saved(tmp_path / "a", "bert", 1, 2)
    (other,) = saved(tmp_path / "b", "bert", 3, target_modules=["query"])
    adapters = [load_lora(path) for path in (first, second, other)]
    message = r"dense' is adapted by adapter 0 and not by adapter 2 \(3 such layers\): merge adap"
    with pytest.raises(ValueError, match=message):
        lora_products(adapters)
    with pytest.raises(ValueError, match="is adapted by adapter 1 and not by adapter 0"):
        lora_products([adapters[2], adapters[1]])
    turned = replace(adapters[1], config={**adapters[1].config, "fan_in_fan_out": True})
    with pytest.raises(ValueError, match="adapters 0 and 1 differ in fan_in_fan_out"):
        lora_products([adapters[0], turned])
    with pytest.raises(ValueError, match="adapter 0 holds no LoRA factors"):
        lora_products([replace(adapters[0], weights=adapters[0].head)])


def test_factors_that_rounding_made_indefinite_are_damped_more() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(3, 3, dtype=torch.float64)
    c = torch.diag(torch.tensor([3.0, 0.0, -1.2e-5], dtype=torch.float64))  # of mean 1
    g = torch.eye(3, dtype=torch.float64)
    damped = [c + damping * c.diagonal().mean() * g for damping in (1e-5, 1e-4)]
    found = _damped_low_rank(matrix, 2, c, None, 1e-6)
    wanted = low_rank(matrix, 2, damped[1])  # a tenth of it is not enough
    for x, y in zip(found[:2], wanted[:2], strict=True):
        torch.testing.assert_close(x, y)
    with pytest.raises(ValueError, match="not positive definite"):
        low_rank(matrix, 2, damped[0])
    with pytest.raises(ValueError, match="not positive definite"):
        _damped_low_rank(matrix, 2, c - g, None, 1e-6)


def test_what_refactor_refuses(tmp_path: Path) -> None:
    adapters, merged = merged_products(tmp_path, "bert")
    statistics = statistics_of("bert", 1)
    with pytest.raises(ValueError, match="rank=0: an adapter has 1 at least"):
        refactor(merged, 0, adapters[0])
    with pytest.raises(ValueError, match="damping=-1: it cannot be negative"):
        refactor(merged, 2, adapters[0], damping=-1)
    with pytest.raises(ValueError, match=r"'x' is no product of factors: expected '<layer>\.base"):
        refactor(merged | {"x": torch.ones(2, 2)}, 2, adapters[0])
    other = {f"net.{name}": tensor for name, tensor in merged.items()}
    with pytest.raises(
        ValueError, match=r"'net\..*' is of no layer that `like` adapts \('base_mod"
    ):
        refactor(other, 2, adapters[0])
    with pytest.raises(ValueError, match="no product to make into factors"):
        refactor({}, 2, adapters[0])
    without = collect_statistics(
        adapted("bert", 1), [batch("bert")], statistics=["kfac"], progress=False
    )
    with pytest.raises(ValueError, match=r"dense\.base_layer' has neither .*adapted_weights"):
        refactor(merged, 2, adapters[0], [without])
    some = {key: t for key, t in statistics.tensors.items() if "query.base" not in key}
    inputs = {m: g for m, g in statistics.inputs.items() if "query.base" not in m}
    part = replace(statistics, tensors=some, inputs=inputs)
    with pytest.raises(ValueError, match=r"query\.base_layer' has neither K-FAC .*plain SVD"):
        refactor(merged, 2, adapters[0], [part])
    turned = replace(adapters[0], config={**adapters[0].config, "fan_in_fan_out": True})
    with pytest.raises(ValueError, match=r"refactoring '.*': .*fan_in_fan_out=True in the adapter"):
        refactor({n: t.T for n, t in merged.items() if "query" in n}, 2, turned, [statistics])
    with pytest.raises(
        ValueError, match=r"refactoring '.*': .*not positive definite: raise the da"
    ):
        refactor(merged, 2, adapters[0], [statistics], damping=0)
