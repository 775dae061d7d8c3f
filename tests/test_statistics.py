"""The record and its sum, the forms of per-example gradients, and which layers are covered."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MLP, D, Reused, Sharing, Tied, Transformer, texts, vectors, ways
from oracle import assert_close, expected
from test_capture import assert_equals, captured
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune, weight_norm

from mats_lightning.statistics import KINDS, Statistics, find_coverage
from mats_lightning.statistics.factors import add_input
from mats_lightning.statistics.gradients import (
    ExampleGradients,
    LookupGradients,
    MatrixGradients,
    VectorGradients,
    add_squares_of_sum,
)
from mats_lightning.statistics.layers import RULES

# -- the record ------------------------------------------------------------------------------


def record(**sums: Tensor) -> Statistics:
    """Sums of 4 examples; every module has its own input, at 8 positions."""
    tensors = {key.replace("__", "/"): tensor for key, tensor in sums.items()}
    modules = [key.removeprefix("A/") for key in tensors if key.startswith("A/")]
    return Statistics(tensors, 4, dict.fromkeys(modules, 8), {m: m for m in modules})


def test_views_divide_sums_by_their_counts() -> None:
    eye = torch.eye(2)
    found = record(diagonal_fisher__p=eye, block_fisher__b=eye, A__m=eye, a__m=eye[0], G__m=eye)
    assert torch.equal(found.diagonal_fisher["p"], eye / 4)
    assert torch.equal(found.block_fisher["b"], eye / 4)
    assert torch.equal(found.gram["m"], eye / 8)
    assert torch.equal(found.kfac["m"][0], eye / 8)
    assert torch.equal(found.kfac["m"][1], eye / 4)
    assert found.positions == {"m": 8}
    assert list(found.kfac) == list(found.gram) == ["m"]


def test_a_module_without_g_has_a_gram_matrix_only() -> None:
    found = record(A__m=torch.eye(2), a__m=torch.ones(2))
    assert list(found.gram) == ["m"] and list(found.kfac) == []


@pytest.mark.parametrize(
    ("view", "name", "message"),
    [
        ("diagonal_fisher", "q", "no diagonal Fisher of 'q'; there are: p"),
        ("block_fisher", "p", "no block Fisher of 'p'; there are: none at all"),
        ("gram", "p", "no Gram matrix of 'p'; there are: m"),
        ("kfac", "m.weight", "no K-FAC factors of 'm.weight'; there are: m"),
    ],
)
def test_a_missing_name_is_an_error_that_says_what_there_is(
    view: str, name: str, message: str
) -> None:
    eye = torch.eye(2)
    found = record(diagonal_fisher__p=eye, A__m=eye, a__m=eye[0], G__m=eye)
    with pytest.raises(KeyError) as error:
        getattr(found, view)[name]
    assert error.value.args == (message,)
    assert name not in getattr(found, view)


def test_statistics_without_examples_have_no_means() -> None:
    coverage = find_coverage(MLP(), KINDS, 8192)
    empty = Statistics({})
    coverage.allocate(empty)
    assert "diagonal_fisher/first.weight" in empty.tensors
    for view in (empty.diagonal_fisher, empty.block_fisher, empty.gram, empty.kfac):
        assert not view


@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Transformer, texts()),
        (Sharing, ways("together", "k alone", "without v")),
        (Sharing, ways("without v", "together", "k alone")),
    ],
)
def test_two_shards_add_up_to_the_whole(
    model: Callable[[], nn.Module], batches: list[dict[str, Tensor]]
) -> None:
    torch.manual_seed(2)
    model_ = model().double()
    parts = [captured(model_, [batch])[0] for batch in batches]
    wanted = expected(model_, batches)
    assert_equals(parts[0] + parts[1] + parts[2], wanted, 1e-9, [])
    assert_equals(Statistics() + parts[2] + (parts[1] + parts[0]), wanted, 1e-9, [])


def test_a_sum_shares_what_both_parts_share() -> None:
    model = Sharing().double()
    together, apart, without = (
        captured(model, ways(way))[0] for way in ("together", "k alone", "without v")
    )
    assert (together + together).inputs == {"q": "q", "k": "q", "v": "q", "head": "head"}
    assert (together + apart).inputs == {"q": "q", "k": "k", "v": "q", "head": "head"}
    assert (without + together).inputs == {"q": "q", "k": "q", "v": "v", "head": "head"}
    assert (without + without).positions.keys() == {"q", "k", "head"}


def test_a_sum_tells_of_both_parts() -> None:
    common = {"digest": {"p": "1"}, "kinds": ["gram"]}
    first = Statistics({}, 1, info=common | {"epochs": [1], "notes": ["a"], "skipped_batches": 2})
    second = Statistics({}, 1, info=common | {"epochs": [1, 2], "notes": [], "skipped_batches": 3})
    wanted = common | {"epochs": [1, 2], "notes": ["a"], "skipped_batches": 5}
    assert (first + second).info == wanted
    assert first.info["skipped_batches"] == 2
    assert (first + Statistics({}, 1)).info == first.info


def test_statistics_at_other_weights_add_where_they_have_faded() -> None:
    first, second = (Statistics({}, 2, info={"digest": {"p": digest, "q": "3"}}) for digest in "12")
    with pytest.raises(ValueError, match=r"different weights: the digest of 'p' is 1\.\.\. in one"):
        first + second
    total = first + second.faded(1.0)
    assert total.examples == 4
    assert total.info["digest"] == first.info["digest"] == {"p": "1", "q": "3"}
    assert (second.faded(1.0) + first).info["digest"] == first.info["digest"]


def test_adding_leaves_both_parts_as_they_were() -> None:
    model = MLP().double()
    first, second = (captured(model, [batch])[0] for batch in vectors((3, 2)))
    before = {key: tensor.clone() for key, tensor in first.tensors.items()}
    total = first + second
    total.tensors["G/first"].zero_()
    assert_close(first.tensors, before, 0.0)
    assert (first.examples, second.examples, total.examples) == (3, 2, 5)


@pytest.mark.parametrize("homes", [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_a_sum_is_where_its_first_part_is(homes: tuple[str, str]) -> None:
    with FakeTensorMode():
        first, second = (record(**{"G/x": torch.ones(2, 2, device=home)}) for home in homes)
        total = (first + second).tensors["G/x"]
    assert str(total.device) == homes[0]


def test_adding_another_selection_is_refused() -> None:
    model = MLP().double()
    one, _ = captured(model, vectors(), ("diagonal_fisher", "gram"))
    with pytest.raises(ValueError, match=r"'G/first' is in one of the two only \(2 such\)"):
        one + captured(model, vectors(), ("diagonal_fisher", "kfac"))[0]
    other, _ = captured(Sharing().double(), ways("together"), ("gram",))
    with pytest.raises(ValueError, match=r"'first' is in one of the two only \(6 such\)"):
        captured(model, vectors(), ("gram",))[0] + other


def test_adding_another_size_is_refused() -> None:
    model = MLP().double()
    found, _ = captured(model, vectors())
    model.second = nn.Linear(5, 1).double()
    coverage, smaller = find_coverage(model, KINDS, 8192), Statistics({}, examples=1)
    coverage.allocate(smaller)
    with pytest.raises(ValueError, match=r"'G/second' has shape \(3, 3\) in one and \(1, 1\)"):
        found + smaller


EVENTS = st.lists(st.tuples(st.sets(st.sampled_from("qkvw"), min_size=1), st.integers(0, 3)))


@given(events=EVENTS)
@settings(max_examples=100, deadline=None)
def test_shared_inputs_are_exact_for_each_module(events: list[tuple[set[str], int]]) -> None:
    """Whatever shares an input when; no position at all is possible too, where all are masked."""
    found = Statistics({}, 1, dict.fromkeys("qkvw", 0), {m: m for m in "qkvw"})
    sums = {m: torch.zeros(2, 2, dtype=torch.float64) for m in "qkvw"}
    positions = dict.fromkeys("qkvw", 0)
    for seed, (modules, count) in enumerate(events):
        a = draw(seed, count, 2)
        add_input(found, sorted(modules), a, a.device)
        for module in modules:
            sums[module] += a.T @ a
            positions[module] += count
    assert found.positions == {m: n for m, n in positions.items() if n}
    for module, gram in found.gram.items():
        torch.testing.assert_close(gram, sums[module] / positions[module])
    histories = {m: tuple(i for i, (s, _) in enumerate(events) if m in s) for m in "qkvw"}
    stored = sum(key.startswith("A/") for key in found.tensors)
    assert stored == len(set(histories.values()) - {()})
    assert set(found.group_positions) == set(found.inputs.values())


# -- forms of gradients ------------------------------------------------------------------------


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(seed: int, n: int, r: int, rows: int, d: int) -> tuple[ExampleGradients, Tensor]:
    a, g = draw(seed, n, r, d), draw(seed + 1, n, r, rows)
    return MatrixGradients(a, g), torch.stack([g[i].T @ a[i] for i in range(n)])


def lookup(seed: int, n: int, r: int, rows: int, d: int) -> tuple[ExampleGradients, Tensor]:
    ids = torch.randint(rows, (n, r), generator=torch.Generator().manual_seed(seed))
    g, padding = draw(seed, n, r, d), seed % rows if seed % 2 else None
    dense = torch.zeros(n, rows, d, dtype=torch.float64)
    for i in range(n):
        for j in range(r):
            if ids[i, j] != padding:
                dense[i, ids[i, j]] += g[i, j]
    return LookupGradients(ids, g, padding), dense


def vector(seed: int, n: int, r: int, rows: int, d: int) -> tuple[ExampleGradients, Tensor]:
    v = draw(seed, n, rows * d)
    return VectorGradients(v), v.view(n, rows, d)


FORMS = {"matrix": matrix, "lookup": lookup, "vector": vector}
SIZES = st.tuples(*[st.integers(1, 5)] * 4)


@given(
    sizes=SIZES,
    seed=st.integers(0, 99),
    forms=st.lists(st.sampled_from(list(FORMS)), min_size=1, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_squares_of_sums_equal_the_dense_ones(
    sizes: tuple[int, int, int, int], seed: int, forms: list[str]
) -> None:
    made = [FORMS[form](seed + i, *sizes) for i, form in enumerate(forms)]
    total = torch.ones(sizes[2:], dtype=torch.float64)
    add_squares_of_sum([part for part, _ in made], total)
    dense = torch.stack([gradients for _, gradients in made]).sum(0)
    torch.testing.assert_close(total, 1 + dense.square().sum(0))


def test_outer_products_of_vectors() -> None:
    v = draw(0, 5, 3)
    total = torch.zeros(3, 3, dtype=torch.float64)
    VectorGradients(v).add_outer(total)
    torch.testing.assert_close(total, sum(torch.outer(x, x) for x in v))


# -- coverage ----------------------------------------------------------------------------------


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Plain(nn.Linear):
    """A subclass that keeps the forward."""


def patched() -> nn.Module:
    layer = nn.Linear(D, D)
    layer.forward = lambda input: input  # type: ignore[method-assign]
    return layer


def weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(nn.Linear(D, D))


KNOWN = ", ".join(kind.__name__ for kind in RULES) + ", and no small module without children"
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "own forward": (lambda: Scaled(D, D), "weight", "Scaled overrides the forward of nn.Linear"),
    "patched": (patched, "weight", "Linear overrides the forward of nn.Linear"),
    "attention": (
        lambda: nn.MultiheadAttention(D, 2),
        "in_proj_weight",
        "nn.MultiheadAttention multiplies without calling its modules",
    ),
    "in attention": (
        lambda: nn.MultiheadAttention(D, 2),
        "out_proj.weight",
        "nn.MultiheadAttention multiplies without calling its modules",
    ),
    "parametrized": (
        lambda: parametrizations.orthogonal(nn.Linear(D, D)),
        "parametrizations.weight.original",
        f"ParametrizationList is none of {KNOWN}",
    ),
    "bias beside a parametrization": (
        lambda: parametrizations.orthogonal(nn.Linear(D, D)),
        "bias",
        "its weight is computed by a parametrization",
    ),
    "weight_norm": (weight_normed, "weight_g", "a Linear has no parameter 'weight_g' of its own"),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(D, D), "weight", 0.5),
        "weight_orig",
        "a Linear has no parameter 'weight_orig' of its own",
    ),
    "frequency": (
        lambda: nn.Embedding(5, D, scale_grad_by_freq=True),
        "weight",
        "scale_grad_by_freq mixes the gradients of a batch's examples",
    ),
    "max_norm": (
        lambda: nn.Embedding(5, D, max_norm=1.0),
        "weight",
        "max_norm renormalises the weight in the forward pass",
    ),
    "large": (lambda: nn.Bilinear(20, 21, 20), "weight", f"Bilinear is none of {KNOWN}"),
    "own parameter": (
        lambda: nn.ParameterList([nn.Parameter(torch.ones(2))]),
        "0",
        f"ParameterList is none of {KNOWN}",
    ),
    "complex": (
        lambda: nn.Linear(D, D, dtype=torch.complex64),
        "weight",
        "complex parameters have no statistic here",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_has_a_reason(name: str) -> None:
    make, parameter, reason = REFUSED[name]
    coverage = find_coverage(nn.ModuleDict({"x": make(), "y": nn.Linear(2, 2)}), KINDS, 8192)
    assert coverage.uncovered[f"x.{parameter}"] == reason
    assert f"not covered ({reason})" in coverage.summary()
    assert coverage.rows["y.weight"].statistics == ["diagonal_fisher", "gram", "kfac"]


@pytest.mark.parametrize("name", [n for n in REFUSED if n != "complex"])
def test_every_trainable_parameter_has_a_row(name: str) -> None:
    model = nn.ModuleDict({"x": REFUSED[name][0](), "y": Transformer()})
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(find_coverage(model, KINDS, 8192).rows) == trainable


def test_what_is_covered_by_which_statistic() -> None:
    model = Transformer()
    model.words.weight.requires_grad_(False)
    model.get_parameter("blocks.0.q.weight").requires_grad_(False)
    model.blocks[1].norm1 = Plain(D, D)
    coverage = find_coverage(model, KINDS, 8192)
    found = {name: row.statistics for name, row in coverage.rows.items()}
    assert "words.weight" not in found and "blocks.0.q.weight" not in found
    assert coverage.frozen == 2
    assert found["places.weight"] == ["diagonal_fisher", "gram"]
    assert found["blocks.0.q.bias"] == ["diagonal_fisher", "block_fisher"]
    assert found["blocks.0.norm2.weight"] == ["diagonal_fisher", "block_fisher"]
    assert found["blocks.1.norm1.weight"] == ["diagonal_fisher", "gram", "kfac"]
    assert not coverage.uncovered


def test_tied_parameters_lose_the_factors_and_keep_one_name() -> None:
    coverage = find_coverage(Tied(), KINDS, 8192)
    row = coverage.rows["words.weight"]
    assert row.statistics == ["diagonal_fisher"]
    assert row.reason == "tied: shared by words and output"
    assert coverage.aliases == {"output.weight": "words.weight"}
    assert "output.weight" not in coverage.rows


@pytest.mark.parametrize("first", ["covered first", "covered last"])
def test_a_parameter_tied_to_an_unknown_use_is_not_covered(first: str) -> None:
    layer, other = nn.Linear(D, D), Scaled(D, D)
    other.weight = layer.weight
    modules = [layer, other] if first == "covered first" else [other, layer]
    coverage = find_coverage(nn.Sequential(*modules), KINDS, 8192)
    assert coverage.uncovered["0.weight"] == "Scaled overrides the forward of nn.Linear"
    assert len(coverage.rows) == 3  # one weight, two biases


def test_large_factors_are_left_out_and_named() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(4, 9), "long": nn.Linear(9, 4)})
    rows = find_coverage(model, KINDS, 8).rows
    assert rows["wide.weight"].statistics == ["diagonal_fisher", "gram"]
    assert rows["wide.weight"].reason == "no kfac: size 9 is above max_factor_size=8"
    assert rows["long.weight"].statistics == ["diagonal_fisher"]
    assert rows["long.weight"].reason == "no gram or kfac: size 9 is above max_factor_size=8"
    assert rows["wide.bias"].reason == "no block_fisher: size 9 is above max_factor_size=8"
    assert rows["long.bias"].statistics == ["diagonal_fisher", "block_fisher"]


@pytest.mark.parametrize("size", [0, -1])
def test_a_size_of_factors_below_1_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"max_factor_size={size}; it must be 1 or more"):
        find_coverage(nn.Linear(4, 2), KINDS, size)


def test_a_choice_that_fits_no_parameter_is_named() -> None:
    rows = find_coverage(MLP(), ["block_fisher"], 8192).rows
    reason = "no statistic that was chosen fits a Linear (5, 6)"
    assert rows["first.weight"].statistics == [] and rows["first.weight"].reason == reason


def test_a_statistic_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no statistic is called 'fisher'; choose from diagonal"):
        find_coverage(MLP(), ["gram", "fisher"], 8192)
    with pytest.raises(ValueError, match="no statistic is chosen"):
        find_coverage(MLP(), [], 8192)


def test_names_are_without_wrappers() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"_orig_mod": nn.Linear(2, 2)})})
    assert set(find_coverage(model, KINDS, 8192).rows) == {"a.weight", "a.bias"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_memory_is_as_announced(dtype: torch.dtype) -> None:
    model = MLP().to(dtype)
    batches = [{k: v.to(dtype) if k == "x" else v for k, v in b.items()} for b in vectors()]
    found, coverage = captured(model, batches)
    assert sum(t.nbytes for t in found.tensors.values()) == coverage.bytes()
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in found.tensors.values()} == {sums}


def test_memory_of_shared_inputs_is_less_than_announced() -> None:
    found, coverage = captured(Transformer().double(), texts())
    shared = 2 * 2 * (D * D + D) * 8  # two blocks, in each the A and a of k and v
    assert sum(t.nbytes for t in found.tensors.values()) == coverage.bytes() - shared


def test_what_no_gradient_reached_is_named() -> None:
    model = Reused()
    model.extra, model.spare = nn.Linear(D, D), nn.LayerNorm(D)
    found, coverage = captured(model.double(), vectors())
    rows = {row["name"]: row for row in coverage.table(found)}
    reason = "no gradient reached it in the captured batches"
    assert rows["extra.weight"]["statistics"] == ["diagonal_fisher"]
    assert rows["spare.bias"]["statistics"] == ["diagonal_fisher", "block_fisher"]
    named = {name for name, row in rows.items() if row["reason"] == reason}
    assert named == {"extra.weight", "extra.bias", "spare.weight", "spare.bias"}
    assert not found.diagonal_fisher["extra.weight"].any() and "extra" not in found.kfac


def test_a_record_shows_itself_in_a_line() -> None:
    found, _ = captured(MLP().double(), vectors())
    assert repr(found) == (
        "Statistics(10 examples; diagonal_fisher of 4, gram of 2, kfac of 2, block_fisher of 2)"
    )
    assert repr(Statistics()) == "Statistics(0 examples; nothing)"
