"""For all tests: small models run no faster on many threads, and far slower on a busy machine."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def models_start_the_same() -> None:
    """Whatever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def messages_are_not_left_out() -> Iterator[None]:
    """The recipes drop what was said before, and would in the tests behind theirs."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(logger.filters)
    yield
    logger.filters[:] = before
