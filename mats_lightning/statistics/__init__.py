"""Pure functions from (input, output gradient) to sums, and the record that keeps them."""

from mats_lightning.statistics.coverage import KINDS, Coverage, find_coverage
from mats_lightning.statistics.gradients import add_squares_of_sum
from mats_lightning.statistics.record import Statistics

__all__ = ["KINDS", "Coverage", "Statistics", "add_squares_of_sum", "find_coverage"]
