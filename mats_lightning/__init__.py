"""Statistics from fine-tuning runs; models merged from them (MaTS, arXiv 2312.04339)."""

from mats_lightning.callback import MaTSStatsCallback
from mats_lightning.sidecar import load_statistics, save_statistics
from mats_lightning.statistics import Statistics

__all__ = ["MaTSStatsCallback", "Statistics", "load_statistics", "save_statistics"]
