"""What a batch tells: how many examples it has, which positions count, how its loss is reduced.

And batches of the first rows of a loader.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

# batch -> (N, R), true where a position counts; or {regular expression: such a mask}, for modules
# whose name has it
MaskFn = Callable[[Any], Tensor | Mapping[str, Tensor] | None]
BatchSizeFn = Callable[[Any], int]
# batch -> what the mean loss was divided by
LossReduction = str | Callable[[Any], float]


def batch_size(batch: Any) -> int:
    """The leading size on which all tensors of a batch agree.

    Raises ValueError when they do not, or when there is no tensor.
    """
    sizes = {int(tensor.shape[0]) for tensor in _tensors(batch) if tensor.ndim}
    if len(sizes) != 1:
        none = f"no tensor is found in a {type(batch).__name__}"
        found = f"its tensors have the sizes {sorted(sizes)}" if sizes else none
        raise ValueError(
            f"cannot tell how many examples a batch has: {found}; pass"
            " batch_size_fn=lambda batch: ..."
        )
    return sizes.pop()


def count_examples(batch: Any, batch_size_fn: BatchSizeFn | None) -> int:
    """What the function says, or else `batch_size`.

    Raises ValueError as that does, and for a function that gives no positive number.
    """
    if batch_size_fn is None:
        return batch_size(batch)
    examples = int(batch_size_fn(batch))
    if examples < 1:
        raise ValueError(f"batch_size_fn gives {examples} for a batch; it must be 1 or more")
    return examples


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        for value in batch:
            yield from _tensors(value)


@dataclass(frozen=True)
class Masks:
    """What a mask function gave: the first whose pattern and shape fit a module is its mask."""

    masks: Mapping[str, Tensor]

    @staticmethod
    def of(given: "Masks | Tensor | Mapping[str, Tensor] | None") -> "Masks":
        if isinstance(given, Masks):
            return given
        masks = {"": given} if isinstance(given, Tensor) else dict(given or {})
        for mask in masks.values():
            if mask.dtype != torch.bool and bool((mask < 0).any()):
                raise ValueError(
                    "a mask has negative values, as one that is added to scores has: true (or 1)"
                    " is to stand where a position counts; pass"
                    ' mask_fn=lambda batch: batch["attention_mask"] == 0, or the like'
                )
        return Masks({pattern: mask.bool() for pattern, mask in masks.items()})

    def of_module(self, module: str, shape: Sequence[int]) -> Tensor | None:
        """(N, R) of a layer whose rows have this leading shape; None where all of them count.

        (N R, 1) of a layer that is given the positions of all examples as rows, one after another.
        """
        fitting = [mask for pattern, mask in self.masks.items() if re.search(pattern, module)]
        for mask in fitting:
            if tuple(mask.shape) == tuple(shape):
                return mask
        rows = [mask.reshape(-1, 1) for mask in fitting if tuple(shape) == (mask.numel(), 1)]
        return rows[0] if rows else None

    def alike(self, modules: Iterable[str]) -> list[set[str]]:
        """The modules, those together that have the same mask whatever their rows' shape is."""
        found: dict[tuple[bool, ...], set[str]] = {}
        for module in modules:
            fits = tuple(bool(re.search(pattern, module)) for pattern in self.masks)
            found.setdefault(fits, set()).add(module)
        return list(found.values())

    def of_output(self, shape: Sequence[int]) -> Tensor | None:
        """The mask of a model's outputs; of another shape, where none fits."""
        fitting = self.of_module("lm_head", shape)
        return fitting if fitting is not None else next(iter(self.masks.values()), None)


def attention_mask(batch: Any) -> Tensor | None:
    """A Hugging Face batch's "attention_mask" (N, R), if it has one."""
    return _mask_named("attention_mask", batch)


def encoder_decoder_masks(batch: Any) -> dict[str, Tensor]:
    """The masks of a Hugging Face encoder-decoder model.

    The decoder's are "decoder_attention_mask", or the labels that are not -100; the keys and
    values of its cross-attention come from the encoder, and have the encoder's.
    """
    encoder, decoder = attention_mask(batch), _mask_named("decoder_attention_mask", batch)
    labels = _column(batch, "labels")
    if decoder is None and isinstance(labels, Tensor) and labels.ndim == 2:
        decoder = labels != -100
    masks = {}
    if encoder is not None:
        masks[CROSS_ATTENTION] = encoder
    if decoder is not None:
        masks[f"^(?!.*{CROSS_ATTENTION}).*{DECODER}"] = decoder
    if encoder is not None:
        masks[f"^(?!.*{DECODER})"] = encoder
    return masks


# the keys and values, and what an adapter puts below them
CROSS_ATTENTION = (
    r"(EncDecAttention\.[kv]"
    r"|(encoder_attn|cross_?attn|cross_?attention)\.(\w+\.)*([kv]\w*|c_attn))(\.|$)"
)
DECODER = r"(^|\.)(decoder|lm_head)(\.|$)"


def default_masks(model: nn.Module) -> MaskFn:
    """The mask function for batches of this model, where the user gives none."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            return encoder_decoder_masks
    return attention_mask


def _column(batch: Any, name: str) -> Any:
    """Of a batch that is a mapping, if it has it."""
    return batch.get(name) if hasattr(batch, "get") else None


def _mask_named(name: str, batch: Any) -> Tensor | None:
    mask = _column(batch, name)
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def loss_divisor(reduction: LossReduction, batch: Any, examples: int) -> float:
    """What the reduced loss was divided by, so that scale = divisor gives an example's own.

    "mean": the examples; "sum": 1; "token_mean": the labels that are not -100 in
    batch["labels"] (N, R); "next_token_mean": those in batch["labels"][:, 1:], which a causal
    language model predicts; or a function of the batch (class weights, say).

    Raises ValueError for a mean over labels that the batch does not have, and for "mean" where some
    labels are -100: torch's losses leave these out of their mean.
    """
    if callable(reduction):
        return float(reduction(batch))
    if reduction == "sum":
        return 1.0
    labels = _column(batch, "labels")
    if reduction == "mean":
        if missing := _left_out(labels):
            raise ValueError(
                f"loss_reduction='mean' divides by all {examples} examples, and {missing} of the"
                " batch's labels are -100, which torch's losses leave out of their mean: pass"
                " loss_reduction='token_mean' ('next_token_mean' for a causal language model), or a"
                " function of the batch that gives this loss's divisor"
            )
        return float(examples)
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"loss_reduction={reduction!r} counts the labels that are not -100 in"
            ' batch["labels"], and this batch has none; pass a function of the batch instead'
        )
    if reduction == "next_token_mean":
        labels = labels[:, 1:]
    return float(torch.count_nonzero(labels != -100))


def _left_out(labels: Any) -> int:
    """How many labels, where they are classes."""
    classes = isinstance(labels, Tensor) and not labels.is_floating_point()
    return int(torch.count_nonzero(labels == -100)) if classes else 0


LOSS_REDUCTIONS = ("mean", "sum", "token_mean", "next_token_mean")


def check_loss_reduction(reduction: LossReduction) -> None:
    """Raises ValueError for a name that is none of LOSS_REDUCTIONS."""
    if not callable(reduction) and reduction not in LOSS_REDUCTIONS:
        raise ValueError(
            f"loss_reduction={reduction!r}; choose from {', '.join(LOSS_REDUCTIONS)}, or pass a"
            " function of the batch that gives what the loss was divided by"
        )


def first_rows(loader: Any, rows: int, seed: int) -> DataLoader[Any]:
    """Batches of the first `rows` rows of a loader's data set, in an order that `seed` gives.

    The loader's shuffling has no influence; where its sampler gives only some rows, the choice is
    among these. Raises ValueError for a loader that rows cannot be picked from.
    """
    known = rows_to_pick(loader)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    chosen: Subset[Any] = Subset(loader.dataset, [known[i] for i in order[:rows].tolist()])
    return DataLoader(chosen, loader.batch_size, collate_fn=loader.collate_fn)


def rows_to_pick(loader: Any) -> Sequence[int]:
    """The rows of its data set that a loader gives, each once.

    Raises ValueError where it is not so.
    """
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Sized) or getattr(loader, "batch_size", None) is None:
        raise ValueError(
            f"rows cannot be picked out of its training loader, a {type(loader).__name__}: a"
            " DataLoader with a batch size over a data set with a length is needed; or pass"
            " loaders={name: batches}"
        )
    first, second = _two_epochs(loader.sampler)
    if len(set(first)) < len(first) or set(first) != set(second):
        raise ValueError(
            "rows cannot be picked out of its training loader, whose"
            f" {type(loader.sampler).__name__} gives other rows each time, or some twice: pass"
            " loaders={name: batches}"
        )
    return sorted(first)


def _two_epochs(sampler: Any) -> tuple[list[int], list[int]]:
    """The rows of each; random numbers are afterwards as if nothing had been drawn."""
    generator = getattr(sampler, "generator", None)
    state = None if generator is None else generator.get_state()
    with torch.random.fork_rng(devices=[]):
        rows = list(sampler), list(sampler)
    if generator is not None:
        generator.set_state(state)
    return rows
