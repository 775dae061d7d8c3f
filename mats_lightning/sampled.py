"""The sampled Fisher: labels drawn from the model's own prediction instead of the data's.

    F = 1/N sum_n E_{y ~ p(y | x_n)} [grad_n grad_n^T],  grad_n = gradient of -log p(y | x_n)

With the data's labels in place of y it is the empirical Fisher. A model that fits its data has
small gradients at the data's labels, and the empirical Fisher vanishes there; this one does not.
(Kunstner, Balles, Hennig, "Limitations of the empirical Fisher approximation", arXiv 1905.12558.)

An example is the unit. With logits (N, C) it has one label; with (N, R, C) it has one at each
position that counts, drawn independently given its input, and its loss is the sum over them.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning.batches import Masks
from mats_lightning.capture import Capture

# (model, batch) -> logits (N, C) or (N, R, C), or these and a mask (N, R) of what has a label
LogitsFn = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]
Fisher = Literal["empirical", "sampled"]
FISHERS = ("empirical", "sampled")
IGNORED = -100  # the label of a position that does not count
CHUNK = 2**24  # probabilities that are worked on at a time, of 24 bytes each


@dataclass(frozen=True)
class Sampling:
    """How labels are drawn."""

    logits_fn: LogitsFn
    seed: int
    draws: int  # labels for each row, each with a forward and backward pass of its own

    def generators(self, *where: int) -> list[torch.Generator]:
        """One for each draw, by the seed and `where` (rank, epoch, batch): nothing to keep.

        A draw's numbers are used row by row, so its labels do not depend on how rows are batched.
        """
        return [_generator(self.seed, draw, *where) for draw in range(self.draws)]


def _generator(*key: int) -> torch.Generator:
    """On the CPU: the same numbers on every device."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def choose_fisher(
    fisher: str, logits_fn: LogitsFn | None, seed: int, draws: int
) -> Sampling | None:
    """None for the empirical Fisher. Raises ValueError for choices that do not go together."""
    if fisher not in FISHERS:
        raise ValueError(f"fisher={fisher!r}; choose from {', '.join(FISHERS)}")
    if fisher == "empirical":
        if logits_fn is not None:
            raise ValueError(
                "logits_fn is given, and fisher='empirical' takes the labels of the data: pass"
                " fisher='sampled' to draw them from these logits, or leave logits_fn out"
            )
        return None
    if logits_fn is None:
        raise ValueError(
            "fisher='sampled' draws labels from the model's logits, and a LightningModule does not"
            " say which these are: pass logits_fn=lambda module, batch: ..., which gives (N, C),"
            " or (N, R, C) for a label at each position"
        )
    if draws < 1:
        raise ValueError(f"draws={draws}; it must be 1 or more")
    return Sampling(logits_fn, int(seed), int(draws))


def fisher_info(sampling: Sampling | None) -> dict[str, Any]:
    """For the sidecar. Lists, because a sum of statistics has those of its parts."""
    if sampling is None:
        return {"fisher": "empirical"}
    return {"fisher": "sampled", "seeds": [sampling.seed], "draws": [sampling.draws]}


def draw_labels(logits: Tensor, keep: Tensor | None, generator: torch.Generator) -> Tensor:
    """One label y ~ softmax(logits) for each row or position, IGNORED where `keep` is false.

    logits (N, C) or (N, R, C), keep (N, R) or None -> int64 (N,) or (N, R). `generator` (CPU)
    gives one number for each label. A class of probability 0 (a logit of -inf) is never drawn;
    one below 2^-41 counts as such.
    """
    classes = logits.shape[-1]
    rows = logits.detach().reshape(-1, classes)
    labels = torch.full((len(rows),), IGNORED, device=logits.device)
    counting = torch.ones(len(rows)) if keep is None else keep.flatten()
    for some in counting.to(logits.device).nonzero().squeeze(1).split(max(1, CHUNK // classes)):
        p = rows[some].softmax(-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        # In integers the sum up to a class is exact, and is deterministic on a GPU as well.
        up_to = (p * 2**40).round_().long().cumsum(-1)
        total = up_to[:, -1].cpu()
        number = torch.rand(len(some), dtype=torch.float64, generator=generator)
        target = torch.minimum((number * total).long() + 1, total)  # 1 .. total, equally likely
        drawn = torch.searchsorted(up_to, target.to(rows.device).unsqueeze(1)).squeeze(1)
        labels[some] = drawn.clamp_(0, classes - 1)  # NaN logits: their loss will show it
    return labels.view(logits.shape[:-1])


def sampled_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over all labels that are not IGNORED of -log p(label): of the examples' own losses.

    logits (N, C) or (N, R, C), labels (N,) or (N, R) -> scalar, in float32 at least.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return F.cross_entropy(rows, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")


def capture_sampled(
    capture: Capture,
    model: nn.Module,
    batch: Any,
    logits_fn: LogitsFn,
    generators: Sequence[torch.Generator],
    *,
    examples: int,
    masks: Masks,
    scaler_scale: float | None = None,
) -> bool:
    """Add a batch's statistics: for each generator a forward pass, labels, a backward pass.

    Each draw counts as examples of its own, so a batch of N rows counts N x draws. Neither
    `.grad`s nor the global random state are touched by anything but the model itself.

    Arguments:
        examples: N, the rows of the batch.
        masks: of the positions that count. With logits (N, R, C) labels are drawn at those of the
            model's output, unless `logits_fn` gives a mask of its own.
        scaler_scale: of a gradient scaler (16-bit floats); a batch that overflows is skipped.

    Returns False when no gradient came to a covered layer: then nothing is counted. Raises
    ValueError for logits of another shape or without gradient, and for re-entrant checkpointing.
    """
    # As large as a training loss is, which a gradient scaler's scale is made for.
    divisor = float(max([examples, *(mask.numel() for mask in masks.masks.values())]))
    scale = divisor / (scaler_scale or 1.0)
    counted = True
    for generator in generators:
        with (
            torch.enable_grad(),
            capture.batch(examples, scale, masks, defer=scaler_scale is not None),
        ):
            logits, keep = logits_and_mask(logits_fn(model, batch), examples, masks)
            loss = sampled_loss(logits, draw_labels(logits, keep, generator)) / scale
            capture.start_backward(loss)
            go_back(loss, capture.needed)
            counted &= capture.finish()
    return counted


def logits_and_mask(given: Any, examples: int, masks: Masks) -> tuple[Tensor, Tensor | None]:
    """What a `logits_fn` gave, checked: the logits, and which of their positions count.

    The mask is bool, (N, R) of logits (N, R, C), and None where all count. Raises ValueError for
    logits of another shape or of one class, or without gradient where there are gradients, and for
    a mask that does not fit them.
    """
    logits, keep = given if isinstance(given, tuple) else (given, None)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or len(logits) != examples:
        raise ValueError(
            f"logits_fn gives {shape} for a batch of {examples} examples; it must give a tensor"
            f" ({examples}, classes), or ({examples}, positions, classes)"
        )
    if logits.shape[-1] < 2:
        raise ValueError(
            f"logits_fn gives {shape}, and one class alone always has probability 1: for one logit"
            " z of two classes give torch.stack([torch.zeros_like(z), z], -1); a"
            " regression needs fisher='empirical' and labels='data'"
        )
    if torch.is_grad_enabled() and not logits.requires_grad:
        raise ValueError(
            "the logits of logits_fn have no gradient: it must call the model without"
            " torch.no_grad, and detach nothing"
        )
    if logits.ndim == 2 and given is logits:
        return logits, None  # the mask is of positions
    if given is logits and masks.masks:
        keep = masks.of_output(logits.shape[:-1])
    if keep is not None and keep.shape != logits.shape[:-1]:
        raise ValueError(
            f"the logits have shape {shape} and the mask {tuple(keep.shape)}: let logits_fn give"
            f" (logits, mask) with a mask {tuple(logits.shape[:-1])}, true where a position counts"
        )
    return logits, None if keep is None else keep.bool()


def go_back(loss: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """A backward pass that leaves `.grad` alone; the gradients, None where there is none.

    Raises ValueError where the model has re-entrant checkpointing, which cannot do this.
    """
    try:
        return torch.autograd.grad(loss, parameters, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "re-entrant gradient checkpointing needs loss.backward(), which would change the"
            " parameters' .grad: use use_reentrant=False (for a Hugging Face model"
            " gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant':"
            " False})), or switch checkpointing off here"
        ) from error


@contextmanager
def unchanged_buffers(model: nn.Module) -> Iterator[None]:
    """What a forward pass in training mode does to buffers (batch normalisation's) is undone."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, before in kept:
                setattr(module, name, buffer.copy_(before))
