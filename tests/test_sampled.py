"""The sampled Fisher: how labels are drawn, and its statistics in a pass and in a fit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from models import MLP, Batch, D, Transformer, texts, vectors
from oracle import assert_close, expected
from test_callback import (
    UNEVEN,
    WAYS,
    Adam,
    Crash,
    Module,
    StatefulLoader,
    assert_same,
    fit,
    half_precision,
    in_single,
    largest_distance,
    oracle,
)
from test_capture import assert_equals, hooks, to
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning import (
    MaTSStatsCallback,
    Statistics,
    collect_statistics,
    load_statistics,
    sampled,
    save_statistics,
)
from mats_lightning.sampled import IGNORED, draw_labels, sampled_loss


class Tagger(nn.Module):
    """Logits at each token; a label of IGNORED has no loss."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, D), nn.Linear(D, D)
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, 4)

    def logits(self, batch: Batch) -> Tensor:
        x = torch.tanh(self.layer(self.words(batch["input_ids"])))
        x = x + x.cumsum(1)  # positions see each other
        logits: Tensor = self.head(self.norm(x))
        return logits

    def forward(self, batch: Batch) -> Tensor:
        logits = self.logits(batch).mT
        losses = F.cross_entropy(logits, batch["labels"], ignore_index=IGNORED, reduction="none")
        return losses.sum(1)


MODELS: dict[str, tuple[Callable[[], Any], list[Batch]]] = {
    "mlp": (MLP, vectors(UNEVEN)),
    "transformer": (Transformer, texts(UNEVEN)),
    "tagger": (Tagger, texts(UNEVEN)),
}


def unlabelled(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def logits_of(model: Any, batch: Batch) -> Tensor:
    logits: Tensor = model.logits(unlabelled(batch))
    return logits


def module_logits(module: Any, batch: Batch) -> Tensor:
    return logits_of(module.model, batch)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Every tensor of labels that is drawn."""
    labels: list[Tensor] = []

    def recording(*args: Any) -> Tensor:
        labels.append(draw_labels(*args))
        return labels[-1]

    monkeypatch.setattr(sampled, "draw_labels", recording)
    yield labels


def labelled(batches: list[Batch], labels: list[Tensor], draws: int = 1) -> list[Batch]:
    """The batches with the labels that were drawn for them."""
    repeated = [batch for batch in batches for _ in range(draws)]
    return [b | {"labels": y} for b, y in zip(repeated, labels, strict=True)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- labels and their loss ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_labels_have_the_probabilities_of_the_model(dtype: torch.dtype) -> None:
    """The largest difference of 4 frequencies is within 4.5 standard errors (fixed seed)."""
    logits = torch.tensor([1.0, -2.0, 0.5, -float("inf")]).to(dtype)
    p, count = logits.double().softmax(0), 40_000
    labels = draw_labels(logits.expand(count, 4), None, generator())
    frequencies = torch.bincount(labels, minlength=4) / count
    assert labels.dtype == torch.int64
    assert frequencies[3] == 0
    errors = (frequencies - p)[:3].abs() / (p * (1 - p) / count).sqrt()[:3]
    assert errors.max() < 4.5, errors


def test_a_certain_label_is_always_drawn() -> None:
    logits = torch.full((3, 50), -200.0)
    logits[0, 0] = logits[1, 20] = logits[2, 49] = 0
    for seed in range(200):
        assert draw_labels(logits, None, generator(seed)).tolist() == [0, 20, 49]


@pytest.mark.parametrize(("number", "label"), [(0.0, 1), (1 - 2**-53, 2)])
def test_the_outermost_numbers_draw_no_impossible_class(
    number: float, label: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.tensor([[-float("inf"), 0.3, 0.1, -float("inf")]])
    monkeypatch.setattr(
        torch, "rand", lambda n, dtype, generator: torch.full((n,), number, dtype=dtype)
    )
    assert draw_labels(logits, None, generator()).tolist() == [label]


def test_labels_depend_on_the_seed_and_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on how rows are batched, how far they are padded, or how many are worked on at a time."""
    logits = torch.randn(10, 4, 5, generator=generator(1))
    keep = torch.arange(4) < torch.randint(1, 5, (10, 1), generator=generator(2))
    whole = draw_labels(logits, keep, generator())
    assert torch.equal(whole == IGNORED, ~keep)
    assert ((whole >= 0) & (whole < 5))[keep].all()
    source = generator()
    parts = [
        draw_labels(logits[:3], keep[:3], source),
        draw_labels(F.pad(logits[3:], (0, 0, 0, 2)), F.pad(keep[3:], (0, 2)), source),
    ]
    assert torch.equal(torch.cat([parts[0], parts[1][:, :4]]), whole)
    assert (parts[1][:, 4:] == IGNORED).all()
    assert not torch.equal(draw_labels(logits, keep, generator(3)), whole)
    monkeypatch.setattr(sampled, "CHUNK", 16)
    assert torch.equal(draw_labels(logits, keep, generator()), whole)


def test_no_position_at_all_has_no_label() -> None:
    labels = draw_labels(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.bool), generator())
    assert (labels == IGNORED).all()
    assert sampled_loss(torch.zeros(2, 3, 4), labels) == 0


def test_logits_that_are_not_numbers_have_a_loss_that_is_none() -> None:
    logits = torch.full((2, 3), float("nan"))
    assert sampled_loss(logits, draw_labels(logits, None, generator())).isnan()


def test_the_loss_is_a_sum_over_what_has_a_label() -> None:
    logits = torch.randn(2, 3, 4, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([[1, IGNORED, 0], [IGNORED, IGNORED, 3]])
    log_p = logits.log_softmax(-1)
    wanted = -(log_p[0, 0, 1] + log_p[0, 2, 0] + log_p[1, 2, 3])
    torch.testing.assert_close(sampled_loss(logits, labels), wanted)
    assert sampled_loss(logits.bfloat16(), labels).dtype == torch.float32


# -- a pass over data --------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_equal_brute_force(name: str, draws: int, drawn: list[Tensor]) -> None:
    make, batches = MODELS[name]
    torch.manual_seed(0)
    model = make().double()
    before = torch.get_rng_state()
    found = collect_statistics(
        model,
        [unlabelled(batch) for batch in batches],
        fisher="sampled",
        logits_fn=logits_of,
        draws=draws,
        progress=False,
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert hooks(model) == 0 and model.training
    assert all(p.grad is None for p in model.parameters())
    wanted = expected(model, labelled(batches, drawn, draws))
    assert_equals(found, wanted, 1e-9, [])
    assert found.examples == draws * sum(UNEVEN)
    if name == "tagger":  # padding has no label
        masks = [batch["attention_mask"].bool() for batch in batches for _ in range(draws)]
        assert all(torch.equal(y != IGNORED, m) for y, m in zip(drawn, masks, strict=True))


def enumerated(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of (gradient of -log p(y))^2 of a linear layer's weight, over y ~ p.

    p (N, C), x (N, D) -> (N, C, D) both.
    """
    y = torch.eye(p.shape[1], dtype=p.dtype)
    squares = torch.einsum("nyc,nd->nycd", (p[:, None] - y).square(), x.square())
    mean = torch.einsum("ny,nycd->ncd", p, squares)
    return mean, torch.einsum("ny,nycd->ncd", p, squares.square()) - mean.square()


def test_the_mean_over_labels_is_the_closed_form() -> None:
    """Softmax of a linear layer: G = mean of diag(p) - p p^T, and F = mean of p (1 - p) x^2.

    The sampled Fisher comes within 4.5 standard errors of it (fixed seed); the empirical one, of
    labels that the model thinks likely, is far off.
    """
    torch.manual_seed(0)
    model = nn.Linear(D, 3).double()
    x = vectors((60,))[0]["x"]
    p = model(x).softmax(-1).detach()
    mean, variance = enumerated(p, x)
    torch.testing.assert_close(mean, (p * (1 - p))[:, :, None] * x.square()[:, None])
    output = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    draws = 300
    found = collect_statistics(
        model,
        [x],
        fisher="sampled",
        logits_fn=lambda model, batch: model(batch),
        draws=draws,
        progress=False,
    )
    error = variance.sum(0).sqrt() / len(x) / draws**0.5
    assert ((found.diagonal_fisher["weight"] - mean.mean(0)) / error).abs().max() < 4.5
    assert (error < 0.03 * mean.mean(0)).all()
    g = found.kfac[""][1]
    torch.testing.assert_close(g, output.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(g, found.block_fisher["bias"])
    empirical = collect_statistics(
        model,
        [(x, p.argmax(-1))],
        loss_fn=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        progress=False,
    )
    assert ((empirical.diagonal_fisher["weight"] - mean.mean(0)) / error).abs().min() > 10


def test_batches_may_be_cut_in_any_way() -> None:
    model, (whole,) = Tagger().double(), texts((10,))
    parts = [{k: v[rows] for k, v in whole.items()} for rows in (slice(3), slice(3, 10))]
    options: dict[str, Any] = {"fisher": "sampled", "logits_fn": logits_of, "draws": 2}
    found = [
        collect_statistics(model, data, progress=False, **options) for data in ([whole], parts)
    ]
    assert_close(found[0].tensors, found[1].tensors, 1e-12)
    other = collect_statistics(model, [whole], progress=False, seed=1, **options)
    assert not torch.equal(other.tensors["G/head"], found[0].tensors["G/head"])


def test_labels_may_be_drawn_at_positions_of_their_own(drawn: list[Tensor]) -> None:
    """Of a language model, say, whose last position predicts nothing and whose prompt is given."""

    def shifted(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return model.logits(batch)[:, :-1], batch["attention_mask"][:, 1:]

    model, batches = Tagger().double(), texts()
    found = collect_statistics(model, batches, fisher="sampled", logits_fn=shifted, progress=False)
    padded = [F.pad(labels, (0, 1), value=IGNORED) for labels in drawn]
    assert_equals(found, expected(model, labelled(batches, padded)), 1e-9, [])


def test_rows_count_towards_max_examples() -> None:
    found = collect_statistics(
        MLP(), in_single(vectors()), fisher="sampled", logits_fn=logits_of, draws=3,
        max_examples=5, progress=False,
    )  # fmt: skip
    assert found.examples == 3 * 8


def test_the_sidecar_says_that_labels_were_drawn(tmp_path: Path) -> None:
    found = collect_statistics(
        MLP(), in_single(vectors()), fisher="sampled", logits_fn=logits_of, seed=7, draws=2,
        progress=False,
    )  # fmt: skip
    save_statistics(found, tmp_path / "x.mats.safetensors")
    info = load_statistics(tmp_path / "x.mats.safetensors").info
    assert (info["fisher"], info["seeds"], info["draws"]) == ("sampled", [7], [2])
    assert info["loss_reduction"] == "sum" and info["mode"] == "eval"


def test_sampled_and_empirical_do_not_add() -> None:
    first, second = (Statistics({}, 1, info={"fisher": f}) for f in ("sampled", "empirical"))
    with pytest.raises(
        ValueError, match="of two kinds: fisher is sampled in one and empirical in the"
    ):
        first + second
    parts = [
        Statistics({}, 2, info={"fisher": "sampled", "seeds": [seed], "draws": [1]})
        for seed in (0, 1, 0)
    ]
    total = parts[0] + parts[1] + parts[2]
    assert total.info == {"fisher": "sampled", "seeds": [0, 1], "draws": [1]}


class Boring(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, 3)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such Fisher": ({"fisher": "true"}, "fisher='true'; choose from empirical, sampled"),
    "logits of the empirical": ({"logits_fn": logits_of}, "fisher='empirical' takes the labels"),
    "a loss": (
        {"fisher": "sampled", "loss_fn": lambda model, batch: 0},
        "leave loss_fn and loss_reduction out",
    ),
    "a reduction": (
        {"fisher": "sampled", "loss_reduction": "mean"},
        "leave loss_fn and loss_reduction out",
    ),
    "no draw": ({"fisher": "sampled", "logits_fn": logits_of, "draws": 0}, "draws=0; it must be 1"),
    "one logit a row": (
        {"fisher": "sampled", "logits_fn": lambda model, batch: logits_of(model, batch)[:, 0]},
        r"logits_fn gives \(4,\) for a batch of 4 examples; it must give a tensor \(4, classes\)",
    ),
    "another length": (
        {"fisher": "sampled", "logits_fn": lambda model, batch: logits_of(model, batch)[:3]},
        r"logits_fn gives \(3, 3\) for a batch of 4 examples",
    ),
    "one class": (
        {"fisher": "sampled", "logits_fn": lambda model, batch: logits_of(model, batch)[:, :1]},
        r"gives \(4, 1\), and one class alone always has probability 1: .* torch\.stack",
    ),
    "an output": (
        {"fisher": "sampled", "logits_fn": lambda model, batch: {"logits": 0}},
        "logits_fn gives dict for a batch of 4 examples",
    ),
    "detached": (
        {"fisher": "sampled", "logits_fn": lambda model, batch: logits_of(model, batch).detach()},
        "the logits of logits_fn have no gradient",
    ),
    "a mask of another shape": (
        {
            "fisher": "sampled",
            "logits_fn": lambda model, batch: logits_of(model, batch)[:, None].expand(4, 5, 3),
            "mask_fn": lambda batch: torch.ones(4, 6),
        },
        r"the logits have shape \(4, 5, 3\) and the mask \(4, 6\): let logits_fn give",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    options, message = REFUSED[name]
    model = MLP().double()
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, vectors(), progress=False, **options)
    assert hooks(model) == 0


def test_a_lightning_module_has_to_say_what_its_logits_are() -> None:
    message = r"a LightningModule does not say which these are: pass logits_fn=lambda module, batch"
    with pytest.raises(ValueError, match=message):
        collect_statistics(Boring(), vectors(), fisher="sampled")
    with pytest.raises(MisconfigurationException, match=message):
        MaTSStatsCallback(fisher="sampled")


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_reentrant_checkpointing_is_refused(fisher: Any) -> None:
    model = Transformer("reentrant").double()
    options: dict[str, Any] = {
        "empirical": {"loss_fn": lambda model, batch: model(batch).mean()},
        "sampled": {"logits_fn": logits_of},
    }[fisher]
    with pytest.raises(ValueError, match="use use_reentrant=False"):
        collect_statistics(model, texts(), fisher=fisher, progress=False, **options)
    found = [
        collect_statistics(model, texts(), fisher=fisher, progress=False, **options)
        for model.checkpointing in ("non-reentrant", None)
    ]
    assert_close(found[0].tensors, found[1].tensors, 1e-12)


# -- within a fit ------------------------------------------------------------------------------


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_a_fit_equal_brute_force(
    name: str, draws: int, drawn: list[Tensor], tmp_path: Path
) -> None:
    make, batches = MODELS[name]
    if name == "tagger":
        batches = [b | {"labels": b["input_ids"] % 4} for b in batches]
    module = Module(make())
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=module_logits, draws=draws)
    fit(module, batches, tmp_path, callback, precision="64-true", **WAYS["both"])
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    wanted = oracle(module.double(), labelled(batches, drawn, draws))
    assert_equals(found, wanted, 1e-9, [])
    info = found.info
    assert (info["fisher"], info["seeds"], info["draws"]) == ("sampled", [0], [draws])
    assert info["loss_reduction"] == "sum" and info["mode"] == "train"


def test_each_batch_and_seed_has_labels_of_its_own(drawn: list[Tensor], tmp_path: Path) -> None:
    batches = in_single(vectors((16,))) * 2
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        callback = MaTSStatsCallback(2, fisher="sampled", logits_fn=module_logits, seed=seed)
        fit(Module(MLP()), batches, tmp_path, callback, max_epochs=2)
    once, again, other = drawn[:4], drawn[4:8], drawn[8:]
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert len({tuple(labels.tolist()) for labels in once + other}) == 8


@pytest.mark.parametrize("draws", [1, 3])
def test_rows_count_towards_max_examples_in_a_fit(draws: int, tmp_path: Path) -> None:
    callback = MaTSStatsCallback(
        fisher="sampled", logits_fn=module_logits, draws=draws, max_examples=7
    )
    fit(Module(MLP()), in_single(vectors((4, 4, 4, 4))), tmp_path, callback)
    assert callback.statistics.examples == draws * 8


def test_statistics_with_a_gradient_scaler(drawn: list[Tensor], tmp_path: Path) -> None:
    module, batches = Module(MLP()), in_single(vectors(UNEVEN))
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=module_logits)
    fit(module, batches, tmp_path, callback, plugins=[half_precision()], **WAYS["both"])
    wanted = oracle(module, labelled(batches, drawn))
    assert largest_distance(callback.statistics, wanted) < 0.005


def test_small_gradients_do_not_vanish_in_16_bits(drawn: list[Tensor], tmp_path: Path) -> None:
    """Their own loss is scaled as the training loss is."""

    def small(module: Any, batch: Batch) -> Tensor:
        return 1e-6 * module_logits(module, batch).float()

    module, batches = Module(MLP()), in_single(vectors(UNEVEN))
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=small)
    fit(module, batches, tmp_path, callback, plugins=[half_precision(2.0**16)])
    wanted = expected(
        lambda batch: F.cross_entropy(small(module, batch), batch["labels"], reduction="none"),
        labelled(batches, drawn),
        root=module,
    )
    assert largest_distance(callback.statistics, wanted) < 0.005


def test_an_overflowing_batch_is_left_out_and_counted(drawn: list[Tensor], tmp_path: Path) -> None:
    def logits(module: Any, batch: Batch) -> Tensor:
        return module_logits(module, batch) * (1e6 if batch["way"] == "loud" else 1)

    ways = ("", "loud", "", "", "")
    batches = [b | {"way": way} for b, way in zip(in_single(vectors(UNEVEN)), ways, strict=True)]
    module, callback = Module(MLP()), MaTSStatsCallback(fisher="sampled", logits_fn=logits)
    fit(module, batches, tmp_path, callback, plugins=[half_precision(2.0**16)])
    found = load_statistics(next(tmp_path.rglob("*.ckpt")))
    assert found.info["skipped_batches"] == 1
    quiet = [b for b in labelled(batches, drawn) if b["way"] != "loud"]
    assert largest_distance(found, oracle(module, quiet)) < 0.005


def test_statistics_in_bfloat16(drawn: list[Tensor], tmp_path: Path) -> None:
    dtypes: list[torch.dtype] = []

    def logits(module: Any, batch: Batch) -> Tensor:
        given = module_logits(module, batch)
        dtypes.append(given.dtype)
        return given

    module, batches = Module(MLP()), in_single(vectors(UNEVEN))
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=logits)
    fit(module, batches, tmp_path, callback, precision="bf16-mixed")
    assert dtypes == [torch.bfloat16] * len(UNEVEN)
    wanted = oracle(module, labelled(batches, drawn))
    assert largest_distance(callback.statistics, wanted) < 0.03


class Normalised(MLP):
    """Batch normalisation, dropout, and a buffer that each forward pass replaces."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm, self.dropout = nn.BatchNorm1d(5), nn.Dropout(0.3)
        self.register_buffer("calls", torch.zeros(()))

    def logits(self, batch: Batch) -> Tensor:
        self.calls = self.calls + 1
        logits: Tensor = self.second(self.dropout(self.batch_norm(self.first(batch["x"]))))
        return logits


@pytest.mark.parametrize(
    "make",
    [Normalised, lambda: Transformer(dropout=0.2), lambda: Transformer("non-reentrant", 0.2)],
    ids=["batch norm", "transformer", "non-reentrant"],
)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.filterwarnings("ignore:.*batch normalisation in training mode")
def test_training_is_bit_identical(
    make: Callable[[], nn.Module], precision: Any, tmp_path: Path
) -> None:
    modules = []
    sampling = MaTSStatsCallback(2, fisher="sampled", logits_fn=module_logits, draws=2)
    for callbacks in ([], [sampling]):
        torch.manual_seed(0)
        module = Adam(make())
        options: dict[str, Any] = WAYS["both"] | {"gradient_clip_val": 0.5, "precision": precision}
        batches = in_single(vectors(UNEVEN)) if isinstance(module.model, MLP) else texts(UNEVEN)
        fit(module, batches, tmp_path, *callbacks, max_epochs=3, **options)
        modules.append(module)
    without, with_ = modules
    assert sampling.statistics.examples == 2 * 2 * sum(UNEVEN)
    assert with_.losses == without.losses and len(set(without.losses)) == 15
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_.state_dict()[name], tensor), name


def test_reentrant_checkpointing_is_refused_in_a_fit(tmp_path: Path) -> None:
    module = Module(Transformer("reentrant"))
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=module_logits)
    with pytest.raises(ValueError, match="use use_reentrant=False"):
        fit(module, texts(), tmp_path, callback)
    assert hooks(module) == 0


def test_a_batch_in_which_nothing_is_captured_is_named(tmp_path: Path) -> None:
    def elsewhere(module: Any, batch: Batch) -> Tensor:
        return module.model.activation.scale * batch["x"]

    model: Any = MLP()
    model.activation.scale = nn.Parameter(torch.ones(()))
    module = Module(model)
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=elsewhere)
    with pytest.warns(UserWarning, match="no gradient came to a covered layer in a batch of epoch"):
        fit(module, in_single(vectors()), tmp_path, callback)
    assert callback.statistics.examples == 0


@pytest.mark.parametrize("options", [{"max_epochs": 3}, {"max_epochs": 3, "max_steps": 15}])
def test_a_resumed_run_has_the_statistics_of_an_uninterrupted_one(
    options: dict[str, Any], tmp_path: Path
) -> None:
    def run(folder: str, *callbacks: L.Callback, ckpt_path: Path | None = None) -> None:
        torch.manual_seed(0)
        module = Module(MLP(), lr=0.1)
        callback = MaTSStatsCallback(2, fisher="sampled", logits_fn=module_logits)
        every = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        data = StatefulLoader(in_single(vectors(UNEVEN)))
        fit(module, data, tmp_path, callback, every, *callbacks, ckpt_path=ckpt_path, **options)

    run("whole")
    with pytest.raises(RuntimeError, match="crash"):
        run("crashed", Crash(12))
    run("resumed", ckpt_path=tmp_path / "crashed" / "step=12.ckpt")
    wanted, found = (load_statistics(tmp_path / f / "step=15.ckpt") for f in ("whole", "resumed"))
    assert_same(found, wanted)
    assert found.info == wanted.info


def test_resuming_with_another_fisher_is_refused(tmp_path: Path) -> None:
    fit(Module(MLP()), in_single(vectors()), tmp_path, MaTSStatsCallback())
    path = next(tmp_path.rglob("*.ckpt"))
    callback = MaTSStatsCallback(fisher="sampled", logits_fn=module_logits)
    with pytest.raises(MisconfigurationException, match="resume with the same choice"):
        fit(
            Module(MLP()),
            in_single(vectors()),
            tmp_path,
            callback,
            ckpt_path=path,
            max_epochs=2,
        )


def test_single_precision_is_close() -> None:
    """The scale of the loss is undone: nothing else would be of this size."""
    model = Tagger()
    batches = [to(batch, torch.float32) for batch in texts()]
    options: dict[str, Any] = {"fisher": "sampled", "logits_fn": logits_of, "progress": False}
    single = collect_statistics(model, batches, **options)
    double = collect_statistics(model.double(), batches, **options)
    assert_close(single.diagonal_fisher, double.diagonal_fisher, 1e-5)
