"""Statistics from fine-tuning runs, and models merged from them (MaTS, arXiv 2312.04339).

    training batch -> capture: a, g -> statistics: sums, counts
       -> sidecar: <checkpoint>.mats.safetensors
       -> operators: C_i -> solvers: (sum C_i) theta = sum C_i theta_i -> merging: state dict
       -> MergeModule: trainer.test, metrics a task -> report: table; figures
                                                    -> export: a model that others can load
                                                    -> refresh: heads fitted, training from there

Each arrow goes one way, and each noun is one module.
"""

from mats_lightning import merging
from mats_lightning.callback import MaTSStatsCallback
from mats_lightning.collect import collect_statistics
from mats_lightning.module import MergeModule
from mats_lightning.refresh import refresh
from mats_lightning.refresh_plan import RefreshPlan
from mats_lightning.sidecar import load_statistics, save_statistics, sidecar_path
from mats_lightning.statistics import Statistics
from mats_lightning.tasks import Task

__all__ = [
    "MaTSStatsCallback",
    "MergeModule",
    "RefreshPlan",
    "Statistics",
    "Task",
    "collect_statistics",
    "load_statistics",
    "merging",
    "refresh",
    "save_statistics",
    "sidecar_path",
]
