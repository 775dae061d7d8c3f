"""A real model on real rows: the statistics of MiniLM, out of a Trainer, against brute force."""

from pathlib import Path

import pytest
import torch
from models import Batch
from oracle import expected
from packages import model_path
from test_callback import WAYS, Module, fit
from test_capture import assert_equals
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from mats_lightning import MaTSStatsCallback

# the first questions of TREC's training set, with their coarse classes
QUESTIONS = [
    ("How did serfdom develop in and then leave Russia ?", 0),
    ("What films featured the character Popeye Doyle ?", 1),
    ("How can I find a list of celebrities ' real names ?", 0),
    ("What fowl grabs the spotlight after the Chinese Year of the Monkey ?", 1),
    ("What is the full form of .com ?", 2),
    ("What contemptible scoundrel stole the cork from my lunch ?", 3),
    ("What team did baseball 's St. Louis Browns become ?", 3),
]


class Classifier(nn.Module):
    """The mean over the tokens that are no padding, and a linear head."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.backbone = AutoModel.from_pretrained(folder)
        self.head = nn.Linear(self.backbone.config.hidden_size, 4)

    def forward(self, batch: Batch) -> Tensor:
        mask = batch["attention_mask"]
        x = self.backbone(batch["input_ids"], attention_mask=mask).last_hidden_state
        keep = mask.unsqueeze(-1).to(x.dtype)
        logits = self.head((x * keep).sum(1) / keep.sum(1))
        return F.cross_entropy(logits, batch["labels"], reduction="none")


@pytest.fixture(scope="module")
def folder() -> str:
    try:
        return model_path("package:minilm")
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float64, "64-true", 1e-9), (torch.float32, "32-true", 1e-5)],
    ids=["float64", "float32"],
)
def test_statistics_of_minilm(
    dtype: torch.dtype, precision: str, tolerance: float, folder: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = []
    for rows in (QUESTIONS[:3], QUESTIONS[3:6], QUESTIONS[6:]):
        encoded = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
        batches.append(dict(encoded) | {"labels": torch.tensor([label for _, label in rows])})
    assert not all(batch["attention_mask"].all() for batch in batches)
    module, callback = Module(Classifier(folder).eval()), MaTSStatsCallback()
    options = WAYS["accumulated"] | {"gradient_clip_val": 0.1, "enable_checkpointing": False}
    fit(module, batches, tmp_path, callback, precision=precision, **options)
    found = callback.statistics
    assert {t.dtype for t in found.tensors.values()} == {dtype}
    wanted = expected(lambda batch: module.model(batch), batches, root=module.to(dtype))
    assert_equals(found, wanted, tolerance, [])
    assert found.positions["model.head"] == 7
    assert len(found.kfac) == 6 * 6 + 1
