"""collect_statistics: the same statistics by a pass over data, at fixed weights."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.progress import track
from torch import Tensor, nn

from mats_lightning import huggingface
from mats_lightning.batches import (
    BatchSizeFn,
    LossReduction,
    MaskFn,
    Masks,
    check_loss_reduction,
    count_examples,
    default_masks,
    loss_divisor,
)
from mats_lightning.capture import Capture
from mats_lightning.model_checks import check_loss_modules, coupling
from mats_lightning.names import plain_name
from mats_lightning.passes import LossFn, check_finite, evaluating, loss_of, to_device
from mats_lightning.sampled import (
    Fisher,
    LogitsFn,
    capture_sampled,
    choose_fisher,
    fisher_info,
    go_back,
)
from mats_lightning.sidecar import describe
from mats_lightning.statistics import KINDS, Statistics, check_kinds, find_coverage
from mats_lightning.statistics.record import GRADIENT


def collect_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    statistics: Sequence[str] = KINDS,
    fisher: Fisher = "empirical",
    loss_fn: LossFn | None = None,
    loss_reduction: LossReduction | None = None,
    logits_fn: LogitsFn | None = None,
    seed: int = 0,
    draws: int = 1,
    mask_fn: MaskFn | None = None,
    batch_size_fn: BatchSizeFn | None = None,
    max_factor_size: int = 8192,
    weight_sharing: str = "expand",
    adapted_weights: bool = False,
    max_examples: int | None = None,
    progress: bool = True,
) -> Statistics:
    """What MaTSStatsCallback accumulates, for a model that was trained without it.

    The model is put into eval mode (no dropout) for the pass and left as it was; its weights and
    `.grad`s are not touched. Save the result beside the checkpoint:
    `save_statistics(statistics, sidecar_path(checkpoint))`.

    Arguments:
        model: a LightningModule, whose training_step gives the loss, or any torch module.
        batches: a DataLoader or any iterable of batches, of training rows; labelled ones, unless
            labels are sampled.
        statistics: any of those of MaTSStatsCallback, and "gradient": the mean gradient of the
            loss at these weights, of every parameter that trains. It is always that of the loss,
            with fisher="sampled" too, where it takes a pass of its own: labels that the model
            draws itself have a mean gradient of 0. For rows without labels give
            loss_fn=soft_targets(teacher, logits_fn).
        fisher: "empirical", with the labels of the data, or "sampled", with labels drawn from the
            model's own prediction (see `mats_lightning.sampled`).
        loss_fn: (model, batch) -> the reduced loss. The default is a LightningModule's
            training_step, and for other modules Hugging Face's `model(**batch).loss`.
        loss_reduction: how the loss is reduced, as in MaTSStatsCallback. The default is found
            from the first batch for `model(**batch).loss`, and is "mean" otherwise.
        logits_fn: with fisher="sampled", (model, batch) -> logits (N, C), or (N, R, C) for a
            label at each position that the mask leaves, or a pair (logits, mask (N, R)) where
            labels are drawn at other positions. The default is Hugging Face's
            `model(**batch).logits`, labels left out; a LightningModule needs one.
        seed: of the drawn labels; the global random state is not used.
        draws: labels drawn for each row, each with a pass of its own. A row counts as so many
            examples.
        max_examples: stop after the batch in which this number of rows is reached.
        progress: show a progress bar.
        mask_fn, batch_size_fn, max_factor_size, weight_sharing, adapted_weights: as in
            MaTSStatsCallback.

    Raises ValueError for choices that do not exist or do not go together, a loss or logits
    without gradient, a loss that is not finite, a batch that no covered layer sees, or no batches.
    """
    kinds = check_kinds(statistics, weight_sharing)
    of_loss = GRADIENT in kinds or fisher != "sampled"  # whether the loss is computed at all
    if not of_loss and (loss_fn is not None or loss_reduction is not None):
        raise ValueError(
            "fisher='sampled' has a loss of its own, that of the labels it draws: leave loss_fn"
            " and loss_reduction out, or take fisher='empirical'"
        )
    if loss_reduction is not None:
        check_loss_reduction(loss_reduction)
    lightning = isinstance(model, pl.LightningModule)
    if fisher == "sampled" and not lightning:
        logits_fn = logits_fn or huggingface.logits_of
    sampling = choose_fisher(fisher, logits_fn, seed, draws)
    coverage = find_coverage(model, kinds, max_factor_size, weight_sharing, adapted_weights)
    sums = Statistics()
    capture = Capture(coverage, sums)
    trainable = {plain_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    if not trainable or not coverage.modules:
        raise ValueError(
            f"no trainable parameter of {type(model).__name__} is in a layer that is covered:\n"
            f"{coverage.summary()}"
        )
    if lightning and of_loss and loss_fn is None:
        check_loss_modules(model, loss_reduction or "mean")
    device = next(iter(trainable.values())).device
    mask = mask_fn or default_masks(model)
    reduction: LossReduction = loss_reduction or "mean"
    generators = sampling.generators() if sampling else []
    rows, notes = 0, dict[str, None]()
    with evaluating(model), torch.enable_grad():
        for index, batch in enumerate(_with_progress(batches, progress)):
            batch = to_device(model, batch, device)
            examples = count_examples(batch, batch_size_fn)
            if of_loss and index == 0 and loss_fn is None and not lightning:
                reduction = _reduction(model, batch, loss_reduction)
            scale = loss_divisor(reduction, batch, examples) if of_loss else 1.0
            gradients: tuple[Tensor | None, ...] = ()
            if sampling is not None:
                counted = capture_sampled(
                    capture,
                    model,
                    batch,
                    sampling.logits_fn,
                    generators,
                    examples=examples,
                    masks=Masks.of(mask(batch)),
                )
                scale *= draws  # a row counts as so many examples
                if GRADIENT in kinds:
                    gradients = go_back(
                        loss_of(model, batch, index, loss_fn), list(trainable.values())
                    )
            else:
                with capture.batch(examples, scale, Masks.of(mask(batch))):
                    loss = loss_of(model, batch, index, loss_fn)
                    capture.start_backward()
                    needed = list(trainable.values()) if GRADIENT in kinds else capture.needed
                    gradients = go_back(loss, needed)
                    counted = capture.finish()
            if GRADIENT in kinds:
                capture.add_gradients(_named(trainable, gradients), scale)
            for note in _modes(model):
                if note not in notes:
                    rank_zero_warn(f"collect_statistics: {note}; the sidecar says so too")
                notes[note] = None
            for told in capture.told():
                rank_zero_warn(f"collect_statistics leaves statistics out. {told}")
            if not counted:
                reasons = "; ".join(dict.fromkeys(coverage.uncovered.values()))
                raise ValueError(
                    f"no gradient came to a covered layer of {type(model).__name__} in batch"
                    f" {index}: {reasons or 'is its output made of another module?'}"
                )
            if sums.info.get("skipped_batches"):
                raise ValueError(f"the logits of batch {index} are not finite: leave it out")
            rows += examples
            if max_examples is not None and rows >= max_examples:
                break
    if not sums.examples:
        raise ValueError("no example was seen: `batches` is empty (a generator that is used up?)")
    weights = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    sums.info = describe(
        coverage,
        sums,
        weights,
        loss_reduction="sum" if sampling else reduction,
        mask=mask,
        mode="eval",
        kinds=list(kinds),
        epochs=[],
        skipped_batches=0,
        notes=list(notes),
        **fisher_info(sampling),
    )
    return sums


def _modes(model: nn.Module) -> list[str]:
    """Notes on how the model is after a batch."""
    trains = [name or "the model" for name, module in model.named_modules() if module.training]
    put = f"a batch's pass put {trains[0]} into training mode" if trains else ""
    return [*coupling(model), *([put] if put else [])]


def _reduction(model: nn.Module, batch: Any, given: LossReduction | None) -> LossReduction:
    """Of `model(**batch).loss`: what was given, unless the loss shows another; or what it shows."""
    with torch.no_grad():
        output = huggingface.output_of(model, batch)
    check_finite(output.loss, 0)
    found = huggingface.reduction_of(output, labels := batch.get("labels"))
    if given is not None:
        # one and the same where each row of this batch has one label
        same = (found, given) == ("mean", "token_mean") and labels.numel() == len(labels)
        if isinstance(given, str) and found not in (None, given) and not same:
            raise ValueError(
                f"loss_reduction={given!r}, and the loss of {type(model).__name__} in the first"
                f" batch is a {found!r}: leave loss_reduction out, or pass {found!r}"
            )
        return given
    if found is None:
        raise ValueError(
            f"how the loss of {type(model).__name__} is reduced cannot be told from the first"
            " batch: pass loss_reduction='mean' (over examples), 'token_mean' (over labels that are"
            " not -100), 'next_token_mean' (over labels[:, 1:] that are not -100), or a function"
            " of the batch that gives what the loss was divided by"
        )
    return found


def _named(
    parameters: Mapping[str, Tensor], gradients: Sequence[Tensor | None]
) -> dict[str, Tensor]:
    """parameter -> its gradient; 0 where the loss does not reach it."""
    pairs = zip(parameters.items(), gradients, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def _with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    return track(
        batches,
        "collecting statistics",
        total=sized_len(batches),
        disable=not progress,
        transient=True,
    )
