"""Which statistic is a parameter's C_i, and what speaks against it: gaps, ties, other weights."""

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from mats_lightning.merging.forms import matrix_form, statistic_name
from mats_lightning.merging.models import (
    Weights,
    check_models,
    names_with,
    of_batch_norm,
    weighted_mean,
)
from mats_lightning.statistics import Statistics
from mats_lightning.statistics.adapters import BASE
from mats_lightning.statistics.digest import digest_of, has_digest

UNCOVERED = ("average", "pretrained", "error")


def covering_statistics(
    names: Sequence[str], kinds: Sequence[str], statistics: Sequence[Statistics]
) -> dict[str, str]:
    """parameter -> the first of `kinds` that covers it in all models, where there is one."""
    known = _known(kinds, statistics)
    covering: dict[str, str] = {}
    for name in names:
        for kind in kinds:
            if kind == "identity" or all(_models_with(name, kind, statistics, known)):
                covering[name] = kind
                break
    return covering


def _known(kinds: Sequence[str], statistics: Sequence[Statistics]) -> dict[str, list[set[str]]]:
    """kind -> the names that each model has it of; iterating a view reads no tensor."""
    return {k: [set(getattr(s, k)) for s in statistics] for k in kinds if k != "identity"}


def _models_with(
    name: str, kind: str, statistics: Sequence[Statistics], known: Mapping[str, list[set[str]]]
) -> list[bool]:
    """For each model, whether it has the statistic of a parameter."""
    return [
        statistic_name(name, kind, s) in keys
        for s, keys in zip(statistics, known[kind], strict=True)
    ]


def check_covering(
    covering: Mapping[str, str],
    names: Sequence[str],
    kinds: Sequence[str],
    statistics: Sequence[Statistics],
    uncovered: str,
) -> None:
    """Warns of parameters that some models alone cover: `uncovered` is what becomes of them.

    A model does so for what it does not use (a pooler, an expert). Raises ValueError for them with
    "error", and when no parameter is covered.
    """
    known = _known(kinds, statistics)
    partly = []
    for name in names:
        if name not in covering:
            models = {kind: _models_with(name, kind, statistics, known) for kind in known}
            if kind := next((kind for kind, there in models.items() if any(there)), ""):
                lacking = [str(i) for i, there in enumerate(models[kind]) if not there]
                with_it = models[kind].index(True)
                partly.append(
                    f"'{name}' has the statistic {kind} in model {with_it} but not in"
                    f" model {' and '.join(lacking)}"
                )
    if partly and (uncovered == "error" or not covering):
        raise ValueError(f"{_first_of(partly)}: take the same statistics of every model")
    if partly:
        how = {"pretrained": "the pretrained value is taken", "kept": "it stays as it is"}
        warnings.warn(
            f"{_first_of(partly)}: {how.get(uncovered, 'it is averaged')}. Where that model does"
            " not use it, this may be as good as can be; else take the same statistics of every"
            " model",
            stacklevel=4,
        )
    if not covering:
        if there := _other_statistics(names[0], statistics):
            raise ValueError(
                f"no parameter ('{names[0]}' ...) has the statistic {' or '.join(kinds)}; they have"
                f" {' and '.join(there)}: choose a method for these (fisher, or mats with"
                f" objective={there!r})"
            )
        found = sorted(key for sets in known.values() for keys in sets for key in keys)
        raise ValueError(
            f"no parameter ('{names[0]}' ...) has the statistic {' or '.join(kinds)}: the"
            " statistics hold "
            + (f"that of '{found[0]}' ...; is a prefix missing?" if found else "none of this kind")
        )


def _first_of(sentences: Sequence[str]) -> str:
    more = f" (and {len(sentences) - 4} more such parameters)" if len(sentences) > 4 else ""
    return "; ".join(sentences[:4]) + more


def _other_statistics(name: str, statistics: Sequence[Statistics]) -> list[str]:
    """What these statistics hold of a parameter, in all models."""
    return [
        kind
        for kind in ("diagonal_fisher", "gram", "kfac", "block_fisher")
        if all(statistic_name(name, kind, s) in getattr(s, kind) for s in statistics)
    ]


def _folded_biases(
    kind_of: Mapping[str, str], thetas: Sequence[Weights], statistics: Sequence[Statistics]
) -> dict[str, str]:
    """weight -> the bias beside it, where both can be solved for together.

    Raises ValueError for K-FAC with reduce, whose A is not that of single positions.
    """
    tied = {n for s in statistics for pair in s.info.get("tied", {}).items() for n in pair}
    folded = {}
    for name, kind in kind_of.items():
        bias = f"{name.removesuffix('.weight')}.bias"
        if kind not in ("gram", "kfac") or bias not in thetas[0] or {name, bias} & tied:
            continue
        if kind_of.get(bias) == "identity":
            continue
        if not matrix_form(name, kind, statistics[0], thetas[0][name].shape).whole:
            continue
        if kind == "kfac" and any(s.info.get("weight_sharing") == "reduce" for s in statistics):
            raise ValueError(
                "fold_bias=True needs K-FAC with weight_sharing='expand': with 'reduce' there is"
                " no mean input that fits A; leave the biases to their own blocks"
            )
        folded[name] = bias
    return folded


def parameters_with(
    patterns: str | Sequence[str],
    names: Sequence[str],
    option: str,
    statistics: Sequence[Statistics],
) -> set[str]:
    """`names_with`, and all other names of the parameters that have one of them."""
    found = names_with(patterns, names, option)
    tied = {n: used for s in statistics for n, used in s.info.get("tied", {}).items()}
    parameters = {tied.get(name, name) for name in found}
    return {name for name in names if tied.get(name, name) in parameters}


def _check_alike(
    covering: Mapping[str, str], thetas: Sequence[Weights], statistics: Sequence[Statistics]
) -> None:
    """Raises ValueError for statistics of other weights than these, or K-FAC of two kinds."""
    ways: dict[str, int] = {}  # way -> the first model that has it
    for i, task in enumerate(statistics):
        if "weight_sharing" in task.info:
            ways.setdefault(task.info["weight_sharing"], i)
    if len(ways) > 1 and "kfac" in covering.values():
        (way, i), (other, j) = list(ways.items())[:2]
        raise ValueError(
            f"the K-FAC factors are of two kinds: weight_sharing is {way} in model {i} and {other}"
            f" in model {j}; take the statistics of all models in the same way"
        )
    for i, (theta, task) in enumerate(zip(thetas, statistics, strict=True)):
        for name, expected in task.info.get("digest", {}).items():
            if covering.get(name, "identity") == "identity" or name.endswith(f".{BASE}"):
                continue  # not used; or, below LoRA, not what is merged, which is its product
            if not has_digest(theta[name], expected):
                raise ValueError(
                    f"the statistics of model {i} belong to other weights: the digest of '{name}'"
                    f" is {expected[:12]}... there and {digest_of(theta[name])[:12]}... in the"
                    " model; give the statistics in the order of the models, and the weights as"
                    " they were saved"
                )


def uncovered_value(
    name: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    pretrained: Weights | None,
    uncovered: str,
) -> Tensor:
    """The value of a parameter without a statistic: `uncovered` is the user's choice."""
    if uncovered == "pretrained":
        assert pretrained is not None
        return pretrained[name].detach().to(tensors[0], copy=True)
    return weighted_mean(tensors, weights)


def check_statistics(
    thetas: Sequence[Weights],
    statistics: Sequence[Statistics],
    kinds: Sequence[str],
    uncovered: str,
    pretrained: Weights | None,
    fold_bias: bool = False,
    averaged: str | Sequence[str] = (),
) -> tuple[dict[str, str], dict[str, str]]:
    """Two mappings: parameter -> the statistic of its C_i; weight -> the bias solved for with it.

    The statistic is "identity" for names that have one of the regular expressions `averaged`, and
    for the other names of what is tied to them. A parameter in neither mapping is uncovered.

    Warns and raises as `check_covering` does. Raises ValueError for statistics of other weights, an
    expression that no name has, a wrong choice of `uncovered`, or, with "error", an uncovered
    parameter.
    """
    if uncovered not in UNCOVERED:
        raise ValueError(f"uncovered={uncovered!r}; choose from {', '.join(UNCOVERED)}")
    if uncovered == "pretrained" and pretrained is None:
        raise ValueError("uncovered='pretrained' needs pretrained=<state dict>")
    if uncovered == "pretrained":
        check_models(thetas[:1], pretrained)
    covering = covering_statistics(list(thetas[0]), kinds, statistics)
    apart = parameters_with(averaged, list(thetas[0]), "averaged", statistics)
    covering |= dict.fromkeys(apart, "identity")
    folded = _folded_biases(covering, thetas, statistics) if fold_bias else {}
    _check_alike(covering, thetas, statistics)
    alone = [name for name in thetas[0] if name not in folded.values()]
    check_covering(covering, alone, kinds, statistics, uncovered)
    if uncovered == "error":
        known = covering.keys() | set(folded.values())
        for name in thetas[0]:
            running = of_batch_norm(name, thetas[0])  # merged by their counts
            if name not in known and not running and thetas[0][name].is_floating_point():
                raise ValueError(
                    f"'{name}' has no statistic {' or '.join(kinds)}; choose"
                    " uncovered='average' or 'pretrained', or a statistic that covers it"
                )
    return covering, folded
