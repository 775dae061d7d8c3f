"""Pure functions from (input, output gradient) to sums, and the record that keeps them."""

from mats_lightning.statistics.coverage import ALL_KINDS, KINDS, Coverage
from mats_lightning.statistics.gradients import add_squares_of_sum
from mats_lightning.statistics.record import Statistics
from mats_lightning.statistics.walk import find_coverage

__all__ = [
    "ALL_KINDS",
    "KINDS",
    "Coverage",
    "Statistics",
    "add_squares_of_sum",
    "find_coverage",
]
