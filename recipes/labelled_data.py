"""The rows of one classification task: read, made distinct, split; for texts and images alike."""

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

import lightning as L
import torch
from datasets import Dataset, load_dataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from packaged_tasks import PackagedTask, labelled_rows
from torch.utils.data import DataLoader
from typing_extensions import override

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class HubDataset:
    """A data set that `datasets.load_dataset` reads: a hub id, or a folder of its files (CSV,
    Parquet, images in a folder for each class).

    A validation or test split that is not named is carved out of the training split, always in the
    same way. Name a labelled split as `test_split`: on many benchmarks that is "validation".
    """

    dataset: str
    config: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None


class LabelledData(L.LightningDataModule):
    """A task of `tasks` by its name (`task`), or any other data set (`hub`).

    What counts as the same input is the subclass's to say. Each occurs once in all splits
    together, and not at all where its labels contradict each other. Which split a row belongs to
    depends on `seed` alone: other numbers of rows are longer or shorter slices of the same
    splits, so no run tests on what another one trained on.

    Args:
        task: a name of `tasks`.
        hub: any other data set.
        model: a hub id, a local folder, or a package: whose tokenizer or image processor is used.
        batch_size: rows of a batch.
        train_rows: rows of the training slice; None takes the whole split.
        validation_rows: rows of the validation slice.
        test_rows: rows of the test slice.
        seed: of the splits and the slices.
    """

    tasks: ClassVar[Mapping[str, PackagedTask]]
    column: ClassVar[str]  # the inputs of a task of `tasks`
    feature: ClassVar[Any]  # their type, in `datasets`
    hub_columns: ClassVar[Mapping[str, str]]  # column here -> the field of HubDataset that names it

    def __init__(
        self,
        task: str | None,
        hub: HubDataset | None,
        model: str,
        batch_size: int = 32,
        train_rows: int | None = 2000,
        validation_rows: int | None = 200,
        test_rows: int | None = 600,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        if (task is None) == (hub is None):
            raise MisconfigurationException(
                f"{kind} takes a task or a hub data set, one of them: got task={task!r} and "
                f"hub={hub!r}"
            )
        if task is not None and task not in self.tasks:
            raise MisconfigurationException(
                f"unknown task {task!r}: expected one of {', '.join(self.tasks)}; name any other "
                "data set with hub"
            )
        self.task = task
        self.hub = hub
        self.name = task if hub is None else hub.dataset
        self.model = model
        self.batch_size = batch_size
        self.limits = dict(zip(SPLITS, (train_rows, validation_rows, test_rows), strict=True))
        self.seed = seed
        self._encoded: dict[str, Any] = {}

    @abstractmethod
    def key(self, row: Mapping[str, Any]) -> Hashable:
        """What two rows have in common that count as the same; None for a row without content."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All of the data that decides what a fine-tune gives: the training rows, their form."""

    @abstractmethod
    def _encode(self, rows: Dataset) -> Any:
        """`rows` as `_loader` takes them."""

    @abstractmethod
    def _loader(self, name: str) -> DataLoader[Any]:
        """The batches of a split, out of `self._encoded`."""

    @property
    def num_classes(self) -> int:
        """The number of classes; for a hub data set this loads the rows."""
        return len(self._labelled[1] if self.task is None else self.tasks[self.task].classes)

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """The slices "train", "validation" and "test", as inputs and labels."""
        found, _ = self._labelled
        keys = {name: [self.key(row) for row in rows] for name, rows in found.items()}
        splits = carve(distinct(found, keys), self.seed)
        slices = {}
        for name, asked in self.limits.items():
            there = len(splits[name])
            slices[name] = splits[name].select(range(there if asked is None else min(asked, there)))
        read, left = (sum(map(len, parts.values())) for parts in (found, splits))
        sizes = ", ".join(f"{name} {len(rows)}" for name, rows in slices.items())
        rank_zero_info(f"{self.name}: {read} rows read, {left} distinct; slices: {sizes}")
        if empty := [name for name, rows in slices.items() if len(rows) == 0]:
            raise MisconfigurationException(
                f"{self.name}: no rows for {', '.join(empty)}. {read} rows were read, {left} are "
                f"left without duplicates, contradictions and empty rows; asked for: {self.limits}"
            )
        return slices

    @property
    def hub_settings(self) -> dict[str, Any] | None:
        """The fields of `hub` that say which rows these are, for the record of a fine-tune."""
        if self.hub is None:
            return None
        columns = {field.name for field in fields(HubDataset) if field.name.endswith("_column")}
        other = columns - {*self.hub_columns.values(), "label_column"}
        return {name: value for name, value in asdict(self.hub).items() if name not in other}

    @cached_property
    def _labelled(self) -> tuple[dict[str, Dataset], Sequence[Any]]:
        """The rows as they were read, a split; and the classes in the order of the labels."""
        if self.task is not None:
            task = self.tasks[self.task]
            return {"train": labelled_rows(task, self.column, self.feature)}, task.classes
        assert self.hub is not None
        found, classes = read_hub(self.hub, self.hub_columns)
        return {name: self._plain(rows) for name, rows in found.items()}, classes

    @abstractmethod
    def _plain(self, rows: Dataset) -> Dataset:
        """Rows of the hub, their columns named as in `hub_columns`, their inputs as `feature`s."""

    @override
    def prepare_data(self) -> None:
        _ = self._labelled  # reading them downloads what is missing

    @override
    def setup(self, stage: str | None = None) -> None:
        if not self._encoded:
            self._encoded = {name: self._encode(rows) for name, rows in self.rows.items()}

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")


def read_hub(
    hub: HubDataset, hub_columns: Mapping[str, str]
) -> tuple[dict[str, Dataset], Sequence[Any]]:
    """The named splits with the columns of `hub_columns` and `label`, and the classes."""
    named = {
        "train": hub.train_split,
        "validation": hub.validation_split,
        "test": hub.test_split,
    }
    columns = {new: getattr(hub, field) for new, field in hub_columns.items()}
    columns = {new: old for new, old in columns.items() if old is not None}
    wanted = {*columns.values(), hub.label_column}
    found = {}
    for name, split in named.items():
        if split is not None:
            rows = load_dataset(hub.dataset, hub.config, split=split)
            if missing := sorted(wanted - set(rows.column_names)):
                raise MisconfigurationException(
                    f"{hub.dataset}, split {split!r}: no column {', '.join(missing)}; it has "
                    f"{', '.join(rows.column_names)}. Set {next(iter(hub_columns.values()))} and "
                    "label_column."
                )
            found[name] = rows
    if unused := sorted({*(found["train"].info.splits or ())} - {*named.values()}):
        rank_zero_info(
            f"{hub.dataset}: {' and '.join(unused)} not used; say test_split or validation_split to"
            " take a split, or else these are carved out of the training rows"
        )
    feature = found["train"].features[hub.label_column]
    seen = {label for rows in found.values() for label in rows.unique(hub.label_column)}
    if None in seen or -1 in seen:
        raise MisconfigurationException(
            f"{hub.dataset}: rows without a label among {', '.join(map(str, named.values()))}; "
            "name splits that are labelled"
        )
    if any(isinstance(label, float) for label in seen):
        raise MisconfigurationException(
            f"{hub.dataset}: the labels in {hub.label_column!r} are fractions; classes are needed"
        )
    classes = list(range(len(feature.names))) if hasattr(feature, "names") else sorted(seen)
    number = {label: index for index, label in enumerate(classes)}
    plain = {}
    for name, rows in found.items():
        labels = [number[label] for label in rows[hub.label_column]]
        inputs = rows.select_columns(list(columns.values()))
        inputs = inputs.rename_columns({old: new for new, old in columns.items() if old != new})
        plain[name] = inputs.add_column("label", labels)
    return plain, classes


def distinct(
    splits: Mapping[str, Dataset], keys: Mapping[str, Sequence[Hashable]]
) -> dict[str, Dataset]:
    """`splits` without duplicates and without inputs whose labels contradict each other.

    Rows with the same key are duplicates; those with the key None are left out. An input of
    several splits stays in the last of them in the order train, validation, test: what a
    benchmark tests on is kept.
    """
    labels: dict[Hashable, set[int]] = {}
    for name, rows in splits.items():
        for key, label in zip(keys[name], rows["label"], strict=True):
            labels.setdefault(key, set()).add(label)
    left = {key for key, found in labels.items() if len(found) == 1 and key is not None}
    kept = {}
    for name in reversed([name for name in SPLITS if name in splits]):
        chosen = []
        for index, key in enumerate(keys[name]):
            if key in left:
                left.remove(key)
                chosen.append(index)
        kept[name] = splits[name].select(chosen)
    return kept


def carve(splits: Mapping[str, Dataset], seed: int) -> dict[str, Dataset]:
    """All three splits, shuffled: those missing are a fifth (test) and a tenth (validation) of
    the training split, and are taken out of it.

    The shares do not depend on the numbers of rows that are asked for.
    """
    shuffled = {}
    for name, rows in splits.items():
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        shuffled[name] = rows.select(order.tolist())
    for name, share in (("test", 0.2), ("validation", 0.1)):
        if name not in shuffled:
            count = round(share * len(splits["train"]))
            train = shuffled["train"]
            shuffled[name] = train.select(range(count))
            shuffled["train"] = train.select(range(count, len(train)))
    return shuffled
