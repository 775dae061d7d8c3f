"""What a program's process says, and the memory that it takes."""

import ctypes
import gc
import logging
import sys

ROUTINE = (  # what Lightning says about every trainer and every fit
    "GPU available",
    "TPU available",
    "💡 Tip",
    "Loading `train_dataloader`",
    "`Trainer.fit` stopped",
    "Restor",
)


def quiet_lightning() -> None:
    """Leave out what Lightning says about every trainer, and what was said for another task."""
    said: set[str] = set()

    def news(record: logging.LogRecord) -> bool:
        begin = record.getMessage().partition("\n")[0]
        known = begin in said or begin.startswith(ROUTINE)
        said.add(begin)
        return not known

    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(news)


def peak_memory() -> float | None:
    """The most memory that this process has held, in GB; None where the system does not say."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)


def return_memory() -> None:
    """Give the system back what has been freed: glibc keeps a gigabyte of it after each fit."""
    gc.collect()  # a trainer, its module and its data are in cycles
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)
