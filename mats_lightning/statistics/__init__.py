"""What is summed of a layer's input and output gradient, and the record that keeps the sums."""

from mats_lightning.statistics.coverage import Coverage
from mats_lightning.statistics.record import KINDS, Statistics
from mats_lightning.statistics.walk import check_kinds, find_coverage

__all__ = [
    "KINDS",
    "Coverage",
    "Statistics",
    "check_kinds",
    "find_coverage",
]
