"""The sidecar: one safetensors file beside a checkpoint, with its statistics (format 1).

`<checkpoint>.mats.safetensors` can be read with safetensors alone:

- tensors, raw sums in float32 or float64: "diagonal_fisher/<parameter>" in the parameter's
  shape; "A/<group>", "A_reduced/<group>", "G/<module>" and "block_fisher/<parameter>" as the
  packed upper triangle, row by row, of a symmetric (d, d) matrix: d (d + 1) / 2 numbers (on
  request in bfloat16), and one such row for each group of a convolution, or each block of a
  factor that is cut into blocks; "a/<group>" (d_in,), the sum of the inputs, or a row for each
  group or block as well;
  "counts/<module>" (rows,), how often each row of an embedding was looked up;
  "gradient/<parameter>", where it was asked for, the sum of the examples' gradients of the loss
  (with labels sampled for the curvature, too), in the parameter's shape;
- metadata: "format" = "mats_lightning", "format_version" = "1", and "statistics", a JSON object:
  `examples`; `positions` (group -> count; one with 0 has no A); `inputs` (module -> group whose
  A it shares); `info`: `fisher` (empirical, or sampled with its `seeds` and `draws`: each row
  counts as that many examples), `loss_reduction`, `mode` (train or eval), `epochs`,
  `global_step`, `every_n_batches` and `max_examples` (of an epoch) that were captured, `mask`,
  `kinds`, `weight_sharing` (expand or reduce), `coverage` (a row for each trainable parameter:
  shape, statistics, reason), `transposed` (modules whose weight is stored as (d_in, d_out)),
  `groups` (convolution -> its groups, where there are several), `blocks` (module -> into how many
  blocks A and G are cut, where they are), `tied`, `skipped_batches`, `notes`, `digest` (covered
  parameter -> SHA-256 of the weights that it belongs to), `versions`.

Divide sums by `examples` (A, a and counts by their group's positions; A_reduced by `examples`) to
have what the README defines.
"""

import json
import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mats_lightning.batches import LossReduction, MaskFn
from mats_lightning.files import write_atomically
from mats_lightning.lazy import Lazy
from mats_lightning.statistics import Coverage, Statistics
from mats_lightning.statistics.digest import digest, digest_of
from mats_lightning.statistics.record import BLOCK, INPUT, OUTPUT, REDUCED, finite

SUFFIX = ".mats.safetensors"
FORMAT, FORMAT_VERSION = "mats_lightning", 1
FACTOR_DTYPES = (None, torch.float32, torch.float64, torch.bfloat16)
PACKED = (INPUT, OUTPUT, BLOCK, REDUCED)


def sidecar_path(checkpoint: str | os.PathLike[str]) -> Path:
    """'val_loss=0.31.ckpt' -> 'val_loss=0.31.ckpt.mats.safetensors'."""
    path = Path(checkpoint)
    return path.with_name(path.name + SUFFIX)


def describe(
    coverage: Coverage,
    statistics: Statistics,
    weights: Mapping[str, Tensor],
    *,
    loss_reduction: LossReduction,
    mask: MaskFn,
    **how: Any,
) -> dict[str, Any]:
    """The `info` of statistics taken of the model with these `weights`; `how` adds to it."""
    covered = [name for name, row in coverage.rows.items() if row.statistics and name in weights]
    return {
        "loss_reduction": name_of(loss_reduction),
        "mask": name_of(mask),
        **how,
        "coverage": coverage.table(statistics),
        **coverage.form(),
        "digest": digest({name: weights[name] for name in covered}),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a file means."""
    return {name: version(name) for name in ("mats_lightning", "torch", "lightning")}


def name_of(choice: Any) -> Any:
    """Of a choice that can be a function."""
    return getattr(choice, "__name__", "custom") if callable(choice) else choice


def save_statistics(
    statistics: Statistics,
    path: str | os.PathLike[str],
    factor_dtype: torch.dtype | None = None,
) -> None:
    """Write to a temporary name and rename: a kill leaves the old file or the new one.

    `factor_dtype` stores the packed triangles in another dtype: bfloat16 halves them, and rounds
    their numbers to a relative 2^-9, so that small eigenvalues are lost: merge with a damping.

    Raises ValueError when a sum is not finite (such statistics would ruin a merge), or for another
    `factor_dtype` than float32, float64 and bfloat16: sums are too large for narrower exponents.
    """
    if factor_dtype not in FACTOR_DTYPES:
        known = ", ".join(map(str, FACTOR_DTYPES))
        raise ValueError(f"factor_dtype={factor_dtype}; choose from {known}")
    path = Path(path)
    tensors: dict[str, Tensor] = {}
    for key in statistics.tensors:
        tensor = statistics.tensors[key].detach().cpu()
        if not finite(tensor):
            raise ValueError(f"{path}: '{key}' has NaN or inf: a loss or gradient was not finite")
        if key.split("/")[0] in PACKED:
            tensors[key] = _pack(tensor).to(factor_dtype or tensor.dtype)
            if not finite(tensors[key]):
                raise ValueError(f"{path}: '{key}' is too large for {factor_dtype}; leave it out")
        else:
            tensors[key] = tensor.contiguous()
    described = {
        "examples": statistics.examples,
        "positions": statistics.group_positions,
        "inputs": statistics.inputs,
        "info": statistics.info,
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "statistics": json.dumps(described),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """The statistics of a sidecar, or of the checkpoint beside which it lies.

    Where a checkpoint is a folder (a Hugging Face model, an adapter) its sidecar may also lie in
    it, under any name with the ending, and goes to the hub with it. Tensors are read when they are
    accessed, one at a time.

    Raises FileNotFoundError when there is none, and ValueError for several in a folder, a damaged
    file, another or a newer format, or a sidecar without examples.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIX):
        target = sidecar_path(path.resolve())  # `last.ckpt` may be a link to another checkpoint
        beside = target if path.is_symlink() and target.is_file() else sidecar_path(path)
        path = beside if beside.is_file() or not path.is_dir() else _inside(path) or beside
    if not path.is_file():
        raise FileNotFoundError(
            f"no statistics at {path}: train with MaTSStatsCallback in the Trainer's callbacks,"
            " or take them now with collect_statistics(...) and save_statistics(...)"
        )
    version_of_file = _version(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or truncated ({error}); copy it again or take the statistics anew"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file without statistics of mats_lightning")
    try:
        written = int(metadata["format_version"])
        described = json.loads(metadata["statistics"]) if written <= FORMAT_VERSION else {}
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({error!r})") from error
    if written > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {written}, this mats_lightning reads up to"
            f" {FORMAT_VERSION}: upgrade mats_lightning"
        )
    if not _as_documented(described):
        raise ValueError(
            f"{path} is damaged: its metadata has no 'examples', 'positions', 'inputs' and 'info'"
            " as they are documented; copy it again or take the statistics anew"
        )
    if not described["examples"]:
        notes = "".join(f" ({note})" for note in described["info"].get("notes", []))
        raise ValueError(
            f"{path} holds no examples: its checkpoint was saved before the capture window"
            f" (last_n_epochs), or its sums were left out{notes}; use a later checkpoint or"
            " collect_statistics(...)"
        )
    return Statistics(
        SidecarTensors(path, keys, version_of_file),
        described["examples"],
        described["positions"],
        described["inputs"],
        described["info"],
    )


def _as_documented(described: Any) -> bool:
    if not isinstance(described, dict):
        return False
    examples = described.get("examples")
    kinds = [type(described.get(name)) for name in ("positions", "inputs", "info")]
    return isinstance(examples, int) and examples >= 0 and kinds == [dict, dict, dict]


def _version(path: Path) -> tuple[int, int, int]:
    """Of a file: another one of that name has another."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _inside(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        raise ValueError(
            f"{folder} holds {len(found)} sidecars, {found[0].name} and {found[1].name} among them:"
            " give the path of one"
        )
    return found[0] if found else None


class SidecarTensors(Lazy[Tensor]):
    """The raw sums of a sidecar, each read, unpacked and checked when it is asked for."""

    def __init__(self, path: Path, keys: list[str], version_of_file: tuple[int, int, int]) -> None:
        super().__init__(keys)
        self.path, self._version = path, version_of_file

    def __getitem__(self, key: str) -> Tensor:
        if key not in self:
            raise KeyError(f"{self.path} has no '{key}'")
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{self.path}: '{key}' cannot be read ({error})") from error
        if _version(self.path) != self._version:  # its counts are those of the file before
            raise ValueError(
                f"{self.path} has been replaced since it was loaded (by a training that goes on?):"
                " load it again, or a copy of it and its checkpoint"
            )
        if not finite(tensor):
            raise ValueError(f"{self.path}: '{key}' has NaN or inf; take the statistics anew")
        return _unpack(tensor) if key.split("/")[0] in PACKED else tensor


def check_belongs(statistics: Statistics, weights: Mapping[str, Tensor], what: str) -> None:
    """Statistics and weights are of one model: names, shapes and digests agree.

    `what` names the model in the error. Raises ValueError for another architecture (a parameter
    is missing or has another shape), for other weights, and for statistics whose digest names none
    of their parameters. Those that have no digest in their info at all (made by hand, or faded)
    belong to no weights, and pass.
    """
    if statistics.info.get("digest") == {}:
        raise ValueError(
            f"{what}: its statistics hold no digest of weights, so they cannot be told to be of"
            " these: the checkpoint that they were saved with has other names than the module that"
            " was trained (does on_save_checkpoint rename them?); take them anew, with"
            " collect_statistics(...), of a module that has these weights"
        )
    shapes = {row["name"]: tuple(row["shape"]) for row in statistics.info.get("coverage", [])}
    for name, expected in statistics.info.get("digest", {}).items():
        if name not in weights:
            raise ValueError(
                f"{what}: its statistics are of another architecture: they cover '{name}'"
                f" {shapes.get(name, '')}, which the checkpoint does not have"
            )
        tensor = weights[name]
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{what}: its statistics are of another architecture: '{name}' has shape"
                f" {shapes[name]} there and {tuple(tensor.shape)} in the checkpoint"
            )
        if digest_of(tensor) != expected:
            raise ValueError(
                f"{what}: its statistics belong to other weights: the digest of '{name}' is"
                f" {expected[:12]}..., the checkpoint's is {digest_of(tensor)[:12]}...; use the"
                " sidecar that was saved with this checkpoint, or collect_statistics(...)"
            )


def _pack(matrix: Tensor) -> Tensor:
    """(..., d, d) symmetric -> (..., d (d + 1) / 2), the upper triangle row by row."""
    return matrix[..., _upper(matrix.shape[-1], matrix.device)]


def _unpack(packed: Tensor) -> Tensor:
    """The same from right to left, in float32 at least."""
    packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
    d = (math.isqrt(8 * packed.shape[-1] + 1) - 1) // 2
    mask = _upper(d, packed.device).expand(*packed.shape[:-1], d, d)
    matrix = packed.new_zeros(mask.shape).masked_scatter_(mask, packed)
    for start in range(0, d, 256):  # mirrored in blocks, so that no second matrix is needed
        square = matrix[..., start : start + 256, start : start + 256]
        square += square.triu(1).mT
        below = matrix[..., start + 256 :, start : start + 256]
        below.copy_(matrix[..., start : start + 256, start + 256 :].mT)
    return matrix


def _upper(d: int, device: torch.device) -> Tensor:
    return torch.ones(d, d, dtype=torch.bool, device=device).triu_()
