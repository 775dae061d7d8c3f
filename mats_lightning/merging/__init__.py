"""One file a method: plain functions over state dicts."""

from mats_lightning.merging.average import average
from mats_lightning.merging.dare import dare, drop_and_rescale
from mats_lightning.merging.fisher import fisher
from mats_lightning.merging.iso_c import iso_c
from mats_lightning.merging.mats import mats
from mats_lightning.merging.refresh_step import refresh_step
from mats_lightning.merging.regmean import regmean
from mats_lightning.merging.rescale import rescale
from mats_lightning.merging.results import Block, MergeResult
from mats_lightning.merging.task_arithmetic import task_arithmetic
from mats_lightning.merging.ties import ties
from mats_lightning.merging.tsv_m import tsv_m

__all__ = [
    "Block",
    "MergeResult",
    "average",
    "dare",
    "drop_and_rescale",
    "fisher",
    "iso_c",
    "mats",
    "refresh_step",
    "regmean",
    "rescale",
    "task_arithmetic",
    "ties",
    "tsv_m",
]
