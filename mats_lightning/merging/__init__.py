"""One file a method: plain functions over state dicts."""

from mats_lightning.merging.average import average
from mats_lightning.merging.fisher import fisher
from mats_lightning.merging.mats import Block, MergeResult, mats
from mats_lightning.merging.regmean import regmean
from mats_lightning.merging.task_arithmetic import task_arithmetic
from mats_lightning.merging.ties import ties

__all__ = [
    "Block",
    "MergeResult",
    "average",
    "fisher",
    "mats",
    "regmean",
    "task_arithmetic",
    "ties",
]
