"""collect_statistics: against brute force, and as a user of Hugging Face's libraries meets it."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from datasets import Dataset
from models import MLP, Batch, Transformer, texts, vectors
from oracle import Expected, assert_close, distance, expected, rows_of
from test_capture import assert_equals, hooks, to
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from mats_lightning import (
    MaTSStatsCallback,
    Task,
    collect_statistics,
    save_statistics,
    sidecar_path,
)
from mats_lightning.batches import loss_divisor
from mats_lightning.huggingface import reduction_of

# -- any torch module --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "batches"), [(MLP, vectors()), (Transformer, texts())], ids=["mlp", "transformer"]
)
def test_statistics_equal_brute_force(make: Callable[[], nn.Module], batches: list[Batch]) -> None:
    model = make().double()
    model.get_submodule("norm" if make is Transformer else "second").eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = collect_statistics(
        model, batches, loss_fn=lambda model, batch: model(batch).mean(), progress=False
    )
    assert_equals(found, expected(model, batches), 1e-9, [])
    assert (found.info["fisher"], found.info["mode"]) == ("empirical", "eval")
    assert found.info["loss_reduction"] == "mean"
    assert [module.training for module in model.modules()] == modes and len(set(modes)) == 2
    assert all(p.grad is None for p in model.parameters()) and hooks(model) == 0
    assert_close(model.state_dict(), weights, 0.0)


def test_a_training_step_may_leave_the_number_of_the_batch_out() -> None:
    class Short(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = MLP()

        def training_step(self, batch: Batch) -> Tensor:
            loss: Tensor = self.model(batch).mean()
            return loss

    module = Short().double()
    found = collect_statistics(module, vectors(), progress=False)
    assert_equals(found, expected(module.model, vectors(), root=module), 1e-9, [])


def test_a_step_that_optimizes_is_not_called() -> None:
    class Manual(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = MLP(), False

        def training_step(self, batch: Batch, batch_idx: int) -> None:
            raise AssertionError("it would train")

    module = Manual().double()
    with pytest.raises(ValueError, match=r"Manual optimizes manually, .* pass loss_fn="):
        collect_statistics(module, vectors(), progress=False)
    found = collect_statistics(
        module,
        vectors(),
        loss_fn=lambda _, batch: module.model(batch).mean(),
        progress=False,
    )
    assert_equals(found, expected(module.model, vectors(), root=module), 1e-9, [])


def test_weights_have_no_gradient_of_their_own_after_the_first_batch() -> None:
    """Only a layer's output needs one; in the first batch it is checked against the weight's."""
    model, computed = MLP().double(), Counter[str]()
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda g, name=name: computed.update([name]))
    collect_statistics(
        model, vectors(), loss_fn=lambda model, batch: model(batch).mean(), progress=False
    )
    batches = len(vectors())
    wanted = {"first.weight": 1, "first.bias": batches, "second.weight": 1, "second.bias": batches}
    assert computed == wanted


def test_dropout_is_off() -> None:
    model = Transformer(dropout=0.5).double()
    found = collect_statistics(
        model, texts(), loss_fn=lambda model, batch: model(batch).mean(), progress=False
    )
    assert_equals(found, expected(model.eval(), texts()), 1e-9, [])


class Normalised(nn.Sequential):
    """`trains`: the pass puts it into training mode itself."""

    def __init__(self, trains: bool, running: bool) -> None:
        norm = nn.BatchNorm1d(5, track_running_stats=running)
        super().__init__(nn.Linear(6, 5), norm, nn.Linear(5, 3))
        self.trains = trains

    def forward(self, batch: Batch) -> Tensor:
        if self.trains:
            self[1].train()
        return F.cross_entropy(super().forward(batch["x"]), batch["labels"])


@pytest.mark.parametrize(
    ("trains", "running", "noted"),
    [
        (False, True, []),
        (False, False, ["batch normalisation"]),
        (True, True, ["batch normalisation", "a batch's pass put 1 into training mode"]),
    ],
)
def test_what_is_not_as_in_eval_mode_is_noted(
    trains: bool, running: bool, noted: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    model = Normalised(trains, running).double()
    found = collect_statistics(
        model, vectors(), loss_fn=lambda model, batch: model(batch), progress=False
    )
    notes = found.info["notes"]
    assert len(notes) == len(noted)
    said = [str(w.message) for w in recwarn if "sidecar says so" in str(w.message)]
    assert said == [f"collect_statistics: {note}; the sidecar says so too" for note in notes]
    assert all(note.startswith(start) for note, start in zip(notes, noted, strict=True))


class Module(L.LightningModule):
    """Its own hooks move a batch, and it logs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = MLP().double()
        self.moved: list[torch.device] = []

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        self.moved.append(device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"x": 2 * batch["x"], "labels": batch["labels"]}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        loss = self.model(batch).mean()
        self.log("loss", loss)
        self.log_dict({"again": loss})
        return {"loss": loss}


def test_a_lightning_module() -> None:
    module = Module()
    found = collect_statistics(module, vectors(), progress=False)
    doubled = [{"x": 2 * b["x"], "labels": b["labels"]} for b in vectors()]
    wanted = expected(lambda batch: module.model(batch), doubled, root=module)
    assert_equals(found, wanted, 1e-9, [])
    assert module.moved == [torch.device("cpu")] * 3
    assert "log" not in vars(module)


def test_max_examples_and_a_generator_of_batches() -> None:
    model = MLP().double()
    found = collect_statistics(
        model,
        (batch for batch in vectors((4, 4, 2))),
        statistics="gram",
        loss_fn=lambda model, batch: model(batch).mean(),
        max_examples=5,
        progress=False,
    )
    assert found.examples == 8
    assert set(found.gram) == {"first", "second"} and not found.kfac
    assert found.info["kinds"] == ["gram"]


class Pair(NamedTuple):
    x: Tensor
    labels: Tensor


def test_named_tuples_stay_named() -> None:
    model, (batch,) = MLP().double(), vectors((4,))
    found = collect_statistics(
        model,
        [Pair(batch["x"], batch["labels"])],
        loss_fn=lambda model, batch: model({"x": batch.x, "labels": batch.labels}).mean(),
        progress=False,
    )
    assert_equals(found, expected(model, [batch]), 1e-9, [])


def test_a_tokenizers_batch_stays_one() -> None:
    model, (batch,) = Transformer().double(), texts((4,))
    encoding = BatchEncoding({k: v for k, v in batch.items()})

    def loss(model: nn.Module, batch: Any) -> Tensor:
        ids, mask = batch.input_ids, batch.attention_mask  # by attribute
        columns = {"input_ids": ids, "attention_mask": mask, "labels": batch.labels}
        loss: Tensor = model(columns).mean()
        return loss

    found = collect_statistics(model, [encoding], loss_fn=loss, progress=False)
    assert_equals(found, expected(model, [batch]), 1e-9, [])
    assert found.positions["blocks.0.q"] == int(batch["attention_mask"].sum())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch), "a scalar tensor with a gradient is needed"),
        (lambda model, batch: model(batch).mean().detach(), "a scalar tensor with a gradient"),
        (lambda model, batch: model(batch).mean() * float("nan"), "the loss of batch 0 is nan"),
    ],
)
def test_a_loss_that_is_none(loss: Any, message: str) -> None:
    model = MLP().double()
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, vectors(), loss_fn=loss, progress=False)
    assert hooks(model) == 0 and model.training


def test_a_layer_that_is_left_out_at_once_is_named() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(6, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0]

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"].unsqueeze(1)).square().mean()

    with (
        pytest.warns(UserWarning, match="leaves statistics out"),
        pytest.raises(ValueError, match="in batch 0: cell is not called with one tensor, or does"),
    ):
        collect_statistics(Recurrent().double(), vectors(), loss_fn=loss_fn, progress=False)


def test_no_batches_and_no_covered_layer() -> None:
    with pytest.raises(ValueError, match="no example was seen"):
        collect_statistics(MLP(), [], progress=False)
    with pytest.raises(
        ValueError, match=r"no trainable parameter of MultiheadAtt(.|\n)*multiplies"
    ):
        collect_statistics(nn.MultiheadAttention(2, 1), [], progress=False)


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_a_compiled_model(fisher: Any) -> None:
    """Whether it has run before or not: it is run without the compiler."""
    options: dict[str, Any] = {
        "empirical": {"loss_fn": lambda model, batch: model(batch).mean()},
        "sampled": {
            "logits_fn": lambda model, batch: model(batch).outer(torch.arange(3.0).double())
        },
    }[fisher]
    model = MLP().double()
    wanted = collect_statistics(model, vectors(), fisher=fisher, progress=False, **options)
    for run_before in (False, True):
        torch.compiler.reset()
        compiled: Any = torch.compile(model.eval(), backend="eager")
        if run_before:
            compiled(vectors()[0])
        found = collect_statistics(compiled, vectors(), fisher=fisher, progress=False, **options)
        assert_close(found.tensors, wanted.tensors, 1e-12)


# -- Hugging Face ------------------------------------------------------------------------------

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h"]
SENTENCES = ["a b c", "d e", "f g h a b", "c d", "e f g a", "h", "b b d c a f"]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[MASK]", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenized(remove: tuple[str, ...] = ("text", "idx"), **columns: list[Any]) -> Dataset:
    """As `load_dataset` and `map` give it, with an index and the text in it."""
    data = Dataset.from_dict({"text": SENTENCES, "idx": list(range(len(SENTENCES))), **columns})
    words = tokenizer()
    data = data.map(lambda rows: words(rows["text"]), batched=True)
    return data.remove_columns(list(remove))


SMALL: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}


def bert(head: Callable[[BertConfig], nn.Module], **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return head(BertConfig(**SMALL, **config)).double()


def llama(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **config)).double()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_positions=12, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).double()


Losses = Callable[[nn.Module, Batch], Tensor]


def classification(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def tokens(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over the labels of each row."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits.mT, batch["labels"], reduction="none").sum(1)


def next_tokens(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none").sum(1)


def regression(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    return (logits - batch["labels"]).square()


def several(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").mean(1)


def tags() -> list[list[int]]:
    """A label at each word, one of them ignored."""
    return [[-100 if w == "d" else WORDS.index(w) % 3 for w in s.split()] for s in SENTENCES]


class Doubles(DataCollatorWithPadding):
    """Labels in the dtype of the model, which a squared error wants."""

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = super().__call__(rows)
        batch["labels"] = batch["labels"].double()
        return batch


class MaskSome:
    """Every third word is masked, and is a label."""

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = DataCollatorWithPadding(tokenizer())(rows)
        place = torch.arange(batch["input_ids"].numel()).view_as(batch["input_ids"])
        masked = (place % 3 == 0) & batch["attention_mask"].bool()
        batch["labels"] = torch.where(masked, batch["input_ids"], -100)
        batch["input_ids"] = torch.where(masked, 2, batch["input_ids"])
        return batch


LABELS = [0, 1, 2, 1, 0, 2, 2]
KINDS_OF_MODEL: dict[
    str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, Any]], str, Losses]
] = {
    "sequences": (
        lambda: bert(BertForSequenceClassification, num_labels=3),
        lambda: (tokenized(label=LABELS), DataCollatorWithPadding(tokenizer())),
        "mean",
        classification,
    ),
    "regression": (
        lambda: bert(BertForSequenceClassification, num_labels=1),
        lambda: (tokenized(label=[float(x) for x in LABELS]), Doubles(tokenizer())),
        "mean",
        regression,
    ),
    "several labels": (
        lambda: bert(
            BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification"
        ),
        lambda: (
            tokenized(label=[[float(x == y) for y in range(3)] for x in LABELS]),
            DataCollatorWithPadding(tokenizer()),
        ),
        "mean",
        several,
    ),
    "tokens": (
        lambda: bert(BertForTokenClassification, num_labels=3),
        lambda: (tokenized(labels=tags()), DataCollatorForTokenClassification(tokenizer())),
        "token_mean",
        tokens,
    ),
    "masked": (
        lambda: bert(BertForMaskedLM),
        lambda: (tokenized(), MaskSome()),
        "token_mean",
        tokens,
    ),
    "llama": (
        llama,
        lambda: (tokenized(), DataCollatorForLanguageModeling(tokenizer(), mlm=False)),
        "next_token_mean",
        next_tokens,
    ),
    "gpt2": (
        gpt2,
        lambda: (tokenized(), DataCollatorForLanguageModeling(tokenizer(), mlm=False)),
        "next_token_mean",
        next_tokens,
    ),
}


def loaded(kind: str) -> tuple[nn.Module, DataLoader[Any]]:
    make, data, _, _ = KINDS_OF_MODEL[kind]
    rows, collate = data()
    return make(), DataLoader(rows, batch_size=3, collate_fn=collate)


def covered_part(found: Any, wanted: Expected) -> Expected:
    """The oracle has every parameter; the coverage leaves out RMSNorm and Conv1D."""
    names = {row["name"] for row in found.info["coverage"] if row["statistics"]}
    wanted.diagonal_fisher = {k: v for k, v in wanted.diagonal_fisher.items() if k in names}
    wanted.block_fisher = {k: v for k, v in wanted.block_fisher.items() if k in names}
    return wanted


@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_a_model_and_a_tokenized_data_set(kind: str) -> None:
    """No argument but the two. transformers computes losses in float32, so less than 1e-9."""
    model, data = loaded(kind)
    found = collect_statistics(model, data, progress=False)
    _, _, reduction, losses = KINDS_OF_MODEL[kind]
    assert found.info["loss_reduction"] == reduction
    assert found.info["mask"] == "attention_mask"
    batches = [dict(batch) for batch in data]
    wanted = expected(lambda batch: losses(model.eval(), batch), batches, root=model)
    pairs = {
        "gpt2": ["transformer.wte", "lm_head"],
        "masked": ["bert.embeddings.word_embeddings", "cls.predictions.decoder"],
    }
    tied = pairs.get(kind, [])
    assert found.examples == len(SENTENCES)
    assert_equals(found, covered_part(found, wanted), 1e-5, tied)


def test_labels_drawn_for_an_encoder_decoder() -> None:
    """It is given what its labels tell, and no label of the data has an influence on the loss."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 13, "d_model": 8, "d_kv": 4, "d_ff": 10, "num_heads": 2}
    sizes |= {"num_layers": 1, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    ids, labels = torch.randint(1, 13, (4, 5)), torch.randint(1, 13, (4, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    given = {"decoder_input_ids": F.pad(labels[:, :-1], (1, 0))}
    found, wanted = (
        collect_statistics(model, [batch | more], fisher="sampled", progress=False)
        for more in ({}, given)
    )
    assert_close(found.tensors, wanted.tensors, 0.0)
    with pytest.raises(ValueError, match=r"the decoder of T5For.* add labels or decoder_input_ids"):
        del batch["labels"]
        collect_statistics(model, [batch], fisher="sampled", progress=False)


class Around(L.LightningModule):
    """What a user writes around a model that is there already."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(4, 6, 2, groups=2, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return SimpleNamespace(loss=(self.layer(x).mean((1, 2)) - labels).square().mean())


@pytest.mark.parametrize("kind", ["gpt2", "sequences", "convolution"])
def test_statistics_of_a_model_are_those_of_the_module_around_it(kind: str) -> None:
    """But for the names: with tied and transposed weights, factors in blocks, and groups."""
    reduction: Any = "mean"
    model: nn.Module
    data: Any
    if kind == "convolution":
        torch.manual_seed(0)
        model, rows = Convolution(), torch.randn(5, 4, 7, dtype=torch.float64)
        data = [{"x": rows, "labels": torch.randn(5, dtype=torch.float64)}]
    else:
        model, data = loaded(kind)
        reduction = KINDS_OF_MODEL[kind][2]
    options: dict[str, Any] = {"max_factor_size": 16, "progress": False}
    wanted = collect_statistics(Around(model), data, loss_reduction=reduction, **options)
    found = collect_statistics(model, data, loss_reduction=reduction, **options)
    assert found.info != wanted.info and found.inputs != wanted.inputs
    again = found.prefixed("model.")
    assert set(again.tensors) == set(wanted.tensors)
    assert_close(dict(again.tensors), wanted.tensors, 0.0)
    for statistics in (again, wanted):  # the reasons are sentences that name layers
        statistics.info["coverage"] = [row | {"reason": ""} for row in statistics.info["coverage"]]
    assert again.info == wanted.info
    assert (again.inputs, again.group_positions) == (wanted.inputs, wanted.group_positions)
    forms = {"gpt2": ("transposed", "tied", "blocks"), "convolution": ("groups",)}
    assert all(again.info[form] for form in forms.get(kind, ()))


@pytest.mark.parametrize("bare", [True, False])
def test_a_task_takes_statistics_of_the_bare_model(tmp_path: Path, bare: bool) -> None:
    model, data = loaded("sequences")
    folder = tmp_path / "model"
    model.save_pretrained(folder)  # type: ignore[operator]
    wanted = collect_statistics(Around(model), data, progress=False)
    found = collect_statistics(model, data, progress=False) if bare else wanted
    save_statistics(found, sidecar_path(folder))
    task = Task("a", Around(model), folder, data, head=("model.classifier",), prefix="model.")
    statistics = task.load_statistics()
    assert_close(dict(statistics.tensors), wanted.tensors, 1e-6)  # kept in float32
    assert set(statistics.kfac) == set(wanted.kfac) != set()

    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)  # type: ignore[operator]
    task = Task("a", Around(model), folder, data, head=("model.classifier",), prefix="model.")
    with pytest.raises(ValueError, match="belong to other weights: the digest of 'model"):
        task.load_statistics()


@pytest.mark.parametrize("kind", ["sequences", "llama"])
def test_labels_that_are_sampled(kind: str) -> None:
    """The data's are not looked at, and need not be there."""
    model, data = loaded(kind)
    found = collect_statistics(model, data, fisher="sampled", progress=False)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    again = collect_statistics(model, batches, fisher="sampled", progress=False)
    assert_close(found.tensors, again.tensors, 0.0)
    assert found.info["fisher"] == "sampled" and found.examples == len(SENTENCES)


def test_next_tokens_are_counted_for_the_callback_too() -> None:
    labels = torch.tensor([[5, 1, 2, -100], [-100, 3, -100, -100]])
    assert loss_divisor("next_token_mean", {"labels": labels}, 2) == 3
    assert loss_divisor("token_mean", {"labels": labels}, 2) == 4
    MaTSStatsCallback(loss_reduction="next_token_mean")
    with pytest.raises(ValueError, match="'next_token_mean' counts the labels"):
        loss_divisor("next_token_mean", {}, 2)


@pytest.mark.parametrize("given", ["mean", "token_mean", "sum"])
def test_a_reduction_that_is_not_the_models_is_refused(given: str) -> None:
    model, data = loaded("llama")
    message = f"loss_reduction='{given}', and the loss of LlamaForCausalLM in the first batch is a"
    with pytest.raises(ValueError, match=f"{message} 'next_token_mean'"):
        collect_statistics(model, data, loss_reduction=given, progress=False)


def test_a_reduction_that_is_given_is_taken() -> None:
    model, data = loaded("llama")
    found, halved, same = (
        collect_statistics(model, data, loss_reduction=reduction, progress=False)
        for reduction in (
            None,
            lambda batch: float(torch.count_nonzero(batch["labels"][:, 1:] != -100)) / 2,
            "next_token_mean",
        )
    )
    g = found.tensors["G/lm_head"]
    torch.testing.assert_close(halved.tensors["G/lm_head"], g / 4)
    torch.testing.assert_close(same.tensors["G/lm_head"], g)


@pytest.mark.parametrize("first", ["all labelled", "some labelled"])
def test_rows_without_a_label_are_not_in_the_mean(first: str) -> None:
    """Their own loss is 0, so they count as examples without curvature."""
    model = bert(BertForSequenceClassification, num_labels=3).eval()
    batches = texts((4, 5))
    batches[1]["labels"][:3] = -100
    given: dict[str, Any] = {}
    if first == "some labelled":
        batches.reverse()  # the first batch shows how the loss is reduced
    else:
        with pytest.raises(ValueError, match=r"3 of the batch's labels are -100.*'token_mean'"):
            collect_statistics(model, batches, progress=False)
        given["loss_reduction"] = "token_mean"
    found = collect_statistics(model, batches, progress=False, **given)
    wanted = expected(lambda batch: classification(model, batch), batches, root=model)
    assert found.info["loss_reduction"] == "token_mean"
    assert found.examples == wanted.examples == 9
    name = "classifier.weight"
    assert distance(found.diagonal_fisher[name], wanted.diagonal_fisher[name]) < 1e-9
    assert distance(found.kfac["classifier"][1], wanted.output["classifier"]) < 1e-9
    with pytest.raises(ValueError, match=r"3 of the batch's labels are -100|is a 'token_mean'"):
        collect_statistics(model, batches, loss_reduction="mean", progress=False)


def test_whole_numbers_may_be_the_labels_of_a_regression() -> None:
    model = (
        bert(BertForSequenceClassification, num_labels=1, problem_type="regression").eval().float()
    )
    batches = [batch | {"labels": 3 * batch["labels"]} for batch in texts((4, 5))]
    try:
        model(**batches[0]).loss.backward()
    except RuntimeError as error:  # transformers 5.0
        pytest.skip(f"the model takes no whole numbers: {error}")
    model.zero_grad()
    found = collect_statistics(model, batches, progress=False)
    wanted = expected(lambda batch: regression(model, batch), batches, root=model)
    assert found.info["loss_reduction"] == "mean"
    name = "classifier.weight"
    assert distance(found.diagonal_fisher[name], wanted.diagonal_fisher[name]) < 1e-5
    assert found.kfac["classifier"][1].shape == (1, 1)


@pytest.mark.parametrize("label", [3, -1])
def test_labels_that_are_no_classes_do_not_end_the_search(label: int) -> None:
    """The model's own loss may take them."""
    output = SimpleNamespace(loss=torch.tensor(1.0), logits=torch.zeros(4, 3))
    assert reduction_of(output, torch.tensor([0, 1, 2, label])) is None
    output.logits = torch.zeros(4, 5, 3)
    assert reduction_of(output, torch.full((4, 5), label)) is None


def test_a_reduction_that_cannot_be_told_is_asked_for() -> None:
    class Smoothed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.loss = 0.9 * output.loss
            return output

    _, data = loaded("llama")
    model = Smoothed(LlamaConfig(**SMALL))
    with pytest.raises(ValueError, match="how the loss of Smoothed is reduced cannot be told"):
        collect_statistics(model, data, progress=False)
    collect_statistics(model, data, loss_reduction="next_token_mean", progress=False)
    flat = llama()
    nn.init.zeros_(flat.lm_head.weight)  # type: ignore[arg-type, union-attr]
    with pytest.raises(ValueError, match="cannot be told"):
        collect_statistics(flat, data, progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sequences", "tokens", "llama"])
def test_the_reduction_is_found_in_other_precisions(kind: str, dtype: torch.dtype) -> None:
    model, data = loaded(kind)
    head = model.get_submodule("lm_head" if kind == "llama" else "classifier")
    nn.init.normal_(head.weight)  # type: ignore[arg-type]
    found = collect_statistics(model.to(dtype), data, max_examples=1, progress=False)
    assert found.info["loss_reduction"] == KINDS_OF_MODEL[kind][2]


def test_columns_that_the_model_does_not_take_are_named() -> None:
    model = bert(BertForSequenceClassification, num_labels=3)
    data = tokenized(remove=("text",), label=LABELS)
    batches = DataLoader(data, batch_size=3, collate_fn=DataCollatorWithPadding(tokenizer()))

    class Strict(nn.Module):
        """Its forward takes what it names."""

        def __init__(self) -> None:
            super().__init__()
            self.bert = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Any:
            return self.bert(input_ids, attention_mask, labels=labels)

    message = r"Strict.forward takes no \['idx'\], .* \(dataset.remove_columns\(\['idx'\]\)\)"
    with pytest.raises(ValueError, match=message):
        collect_statistics(Strict(), batches, progress=False)
    with pytest.raises(ValueError, match=r"rename_column\('label', 'labels'\)"):
        (batch,) = texts((4,))
        batch["label"] = batch.pop("labels")
        collect_statistics(Strict(), [batch], progress=False)


def test_a_column_too_many_does_no_harm_where_the_model_lets_it_pass() -> None:
    model, data = loaded("sequences")
    more = DataLoader(
        tokenized(remove=("text",), label=LABELS),
        batch_size=3,
        collate_fn=DataCollatorWithPadding(tokenizer()),
    )
    assert "idx" in next(iter(more))
    found, wanted = (collect_statistics(model, x, progress=False) for x in (more, data))
    assert_close(found.tensors, wanted.tensors, 0.0)


def test_labels_that_are_missing_are_named() -> None:
    model, (batch,) = bert(BertForSequenceClassification, num_labels=3), texts((4,))
    labels = batch.pop("labels")
    message = "BertForSequenceClassification gives no loss for a batch with the columns"
    with pytest.raises(ValueError, match=message):
        collect_statistics(model, [batch], progress=False)
    with pytest.raises(ValueError, match=r"it has 'label': rename that column"):
        collect_statistics(model, [batch | {"label": labels}], progress=False)
    with pytest.raises(ValueError, match="MLP gives no loss"):
        collect_statistics(MLP().double(), [{"batch": vectors()[0]}], progress=False)
    with pytest.raises(ValueError, match=r"a batch is a list, .* pass loss_fn"):
        collect_statistics(model, [[batch["input_ids"], labels]], progress=False)
    with pytest.raises(ValueError, match="MLP gives no logits"):
        batch_of_one = {"batch": vectors()[0]}
        collect_statistics(MLP().double(), [batch_of_one], fisher="sampled", progress=False)


def test_a_batch_without_any_label_is_named() -> None:
    model, data = loaded("llama")
    batches = [dict(batch) for batch in data]
    batches[1]["labels"] = torch.full_like(batches[1]["labels"], -100)
    with pytest.raises(ValueError, match=r"the loss of batch 1 is nan.*\(all -100\)"):
        collect_statistics(model, batches, progress=False)
    with pytest.raises(ValueError, match="the loss of batch 0 is nan"):
        collect_statistics(model, batches[1:], progress=False)


def test_rows_of_a_batch_are_its_examples() -> None:
    """What `next_token_mean` undoes: the sums of the rows alone are those of the batch."""
    model, data = loaded("llama")
    batch = dict(next(iter(data)))
    whole = collect_statistics(model, [batch], progress=False)
    alone = collect_statistics(model, rows_of(batch), progress=False)
    assert_close(whole.tensors, alone.tensors, 1e-5)
    single = collect_statistics(model.float(), [to(batch, torch.float32)], progress=False)
    assert_close(single.tensors, whole.tensors, 1e-4)
