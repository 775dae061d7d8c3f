"""What a Hugging Face model gives for a batch: its loss, how that is reduced, its logits."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LABELS = ("labels", "label")  # columns of a batch
IGNORED = -100  # a label that does not count


def output_of(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)`, whose `loss` is a tensor.

    Raises ValueError for a batch that is no mapping or has columns that the model does not take,
    and for an output without a loss.
    """
    output = _call(model, _columns(batch))
    if not isinstance(getattr(output, "loss", None), Tensor):
        hint = " (it has 'label': rename that column)" if "label" in batch else ""
        raise ValueError(
            f"{type(model).__name__} gives no loss for a batch with the columns {list(batch)}:"
            f" Hugging Face models want the labels as 'labels'{hint}; for another model pass"
            " loss_fn=lambda model, batch: ..."
        )
    return output


def logits_of(model: nn.Module, batch: Any) -> Tensor:
    """`model(**batch).logits`, without the labels; they are what a decoder is given, moved by one.

    Raises ValueError as `output_of` does, and for a decoder that is given nothing.
    """
    columns = {name: value for name, value in _columns(batch).items() if name not in LABELS}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        columns |= _decoder_inputs(model, batch)
    logits = getattr(_call(model, columns), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{type(model).__name__} gives no logits for a batch with the columns"
            f" {list(columns)}; pass logits_fn=lambda model, batch: ..."
        )
    return logits


def _decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What the batch does not give itself."""
    if "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
        return {}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or not isinstance(batch.get("labels"), Tensor):
        raise ValueError(
            f"the decoder of {type(model).__name__} is given nothing by a batch with the columns"
            f" {list(batch)}: add labels or decoder_input_ids, or pass logits_fn=lambda model,"
            " batch: ..."
        )
    return {"decoder_input_ids": shift(labels=batch["labels"])}


def reduction_of(output: Any, labels: Any) -> str | None:
    """How a loss is reduced: "mean", "token_mean" or "next_token_mean".

    Found by computing it: the loss of each kind from the logits, and which of them is the model's.
    None when none is, or more than one. One label a row, some of them -100, is "token_mean" too.
    """
    loss, logits = output.loss, getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return None
    wide, classes = logits.float(), logits.shape[-1]
    losses: dict[str, list[Tensor]] = {}
    if labels.numel() == wide.numel():  # several labels, or regression, of whole numbers too
        numbers = labels.reshape(wide.shape).float()
        kinds = (F.mse_loss, F.binary_cross_entropy_with_logits)
        losses["mean"] = [kind(wide, numbers) for kind in kinds]
    elif _are_classes(labels, classes):
        labels = labels.long()
        if wide.ndim == 2 and labels.numel() == len(wide):
            name = "token_mean" if (labels == IGNORED).any() else "mean"
            losses[name] = [F.cross_entropy(wide, labels.view(-1))]
        elif wide.ndim == 3 and labels.shape == wide.shape[:2]:
            losses["token_mean"] = [F.cross_entropy(wide.mT, labels)]
            losses["next_token_mean"] = [F.cross_entropy(wide[:, :-1].mT, labels[:, 1:])]
    tolerance = 8 * max(torch.finfo(dtype).eps for dtype in (loss.dtype, torch.float32))
    found = [
        name
        for name, values in losses.items()
        if any(torch.isclose(loss.float(), value, rtol=tolerance) for value in values)
    ]
    return found[0] if len(found) == 1 else None


def _are_classes(labels: Tensor, classes: int) -> bool:
    """Cross entropy raises for others, and a GPU is lost to the process then."""
    known = (labels >= 0) & (labels < classes) | (labels == IGNORED)
    return not labels.is_floating_point() and bool(known.all())


def _columns(batch: Any) -> Mapping[str, Any]:
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch is a {type(batch).__name__}, and a Hugging Face model is called with a"
            " mapping of columns, as model(**batch): pass loss_fn=lambda model, batch: ... (or"
            " logits_fn, for fisher='sampled')"
        )
    return batch


def _call(model: nn.Module, columns: Mapping[str, Any]) -> Any:
    """model(**columns), if its forward takes them all."""
    takes = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
    unknown = [name for name in columns if name not in takes]
    if unknown and not takes_all:
        rename = "; rename_column('label', 'labels')" if "label" in unknown else ""
        raise ValueError(
            f"{type(model).__name__}.forward takes no {unknown}, which the batches have: take them"
            f" out of the data set (dataset.remove_columns({unknown}){rename}), or pass"
            " loss_fn=lambda model, batch: ..."
        )
    return model(**columns)
