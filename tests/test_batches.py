"""What a batch tells: which positions count, for which modules."""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import MLP, Flattened, Transformer, classified, texts, vectors
from oracle import assert_close, expected
from peft import LoraConfig, get_peft_model
from test_capture import captured
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from mats_lightning.batches import (
    Masks,
    attention_mask,
    batch_size,
    default_masks,
    encoder_decoder_masks,
    first_rows,
    loss_divisor,
)
from mats_lightning.capture import Capture
from mats_lightning.model_checks import check_loss_modules
from mats_lightning.statistics import KINDS, Statistics, find_coverage


def test_the_first_mask_that_fits_name_and_shape_is_taken() -> None:
    short, long, other = torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2, 4)
    masks = Masks.of({"decoder": short, "^enc": long, "": other})
    assert masks.of_module("decoder.q", (2, 3)) is masks.masks["decoder"]
    assert masks.of_module("decoder.q", (2, 4)) is masks.masks[""]
    assert masks.of_module("enc.q", (2, 4)) is masks.masks["^enc"]
    assert masks.of_module("my.enc", (2, 4)) is masks.masks[""]
    assert masks.of_module("head", (2, 1)) is None
    assert Masks.of(None).of_module("head", (2, 3)) is None
    mask = Masks.of(short).of_module("anything", (2, 3))
    assert mask is not None and mask.dtype == torch.bool
    assert Masks.of(masks) is masks


@pytest.mark.parametrize("of", ["attention_mask", "decoder_attention_mask", "mask_fn"])
def test_a_mask_that_is_added_to_scores_is_refused(of: str) -> None:
    """0 stands where a position counts, the other way round."""
    keep = torch.tensor([[1, 1, 0], [1, 1, 1]])
    added = torch.where(keep == 1, 0.0, -1e9)
    given: Any = added if of == "mask_fn" else encoder_decoder_masks({of: added})
    with pytest.raises(ValueError, match=r"a mask has negative values.*pass mask_fn="):
        Masks.of(given)
    packed = Masks.of(attention_mask({"attention_mask": torch.tensor([[1, 1, 2, 2, 0]])}))
    assert packed.masks[""].tolist() == [[True, True, True, True, False]]


@pytest.mark.parametrize("labels", [[0, -100, 2], [[0, -100], [1, 2]], [[[-100, 3]]]])
def test_labels_that_are_left_out_are_not_in_a_mean(labels: Any) -> None:
    batch = {"labels": torch.tensor(labels)}
    message = "1 of the batch's labels are -100.*'next_token_mean' for a causal language model"
    with pytest.raises(ValueError, match=message):
        loss_divisor("mean", batch, 3)
    assert loss_divisor(lambda batch: 3, batch, 3) == 3
    assert loss_divisor("mean", {"labels": torch.full((2, 2), -100.0)}, 3) == 3  # a regression's


def test_a_batch_without_a_tensor_says_what_it_is() -> None:
    with pytest.raises(ValueError, match=r"no tensor is found in a SimpleNamespace; pass batch_"):
        batch_size(SimpleNamespace(x=torch.ones(2)))


def test_losses_with_another_divisor_than_the_examples() -> None:
    model = nn.ModuleDict({"loss": nn.CrossEntropyLoss(ignore_index=0)})
    with pytest.raises(ValueError, match=r"'loss' is a CrossEntropyLoss that leaves the label 0 "):
        check_loss_modules(model, "mean")
    check_loss_modules(model, lambda batch: 1.0)
    summed = nn.ModuleDict({"loss": nn.MSELoss(reduction="sum")})
    with pytest.warns(UserWarning, match="'loss' is a MSELoss that gives a sum, and loss_reduct"):
        check_loss_modules(summed, "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_loss_modules(summed, "sum")
        check_loss_modules(nn.CrossEntropyLoss(ignore_index=0, reduction="none"), "mean")


def test_a_mask_is_that_of_all_positions_as_rows_too() -> None:
    """As layers see them that a model gives x.flatten(0, 1)."""

    class Tokens(Flattened):
        def forward(self, batch: Any) -> Tensor:
            x = torch.tanh(self.first(batch["x"].unflatten(1, (3, 2))))
            x = torch.tanh(self.middle(x.flatten(0, 1))).view_as(x)
            keep = batch["attention_mask"].unsqueeze(-1).to(x)
            logits = self.last((x * keep).sum(1) / keep.sum(1))
            return classified(logits, batch)

    model, batches = Tokens().double(), vectors((4, 5))
    for batch in batches:
        lengths = torch.arange(len(batch["x"])) % 3 + 1
        batch["attention_mask"] = torch.arange(3) < lengths[:, None]
    found, _ = captured(model, batches)
    wanted = expected(model, batches)
    assert found.positions == wanted.positions
    assert found.positions["middle"] == sum(int(b["attention_mask"].sum()) for b in batches)
    assert_close(found.gram, wanted.gram, 1e-9)
    assert_close({m: g for m, (_, g) in found.kfac.items()}, wanted.output, 1e-9)


def test_the_default_depends_on_the_model() -> None:
    config = BertConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1)
    assert default_masks(nn.ModuleDict({"bert": BertModel(config)})) is attention_mask
    assert default_masks(MLP()) is attention_mask
    assert default_masks(nn.ModuleDict({"t5": tiny_t5()})) is encoder_decoder_masks


def tiny_t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 13, "d_model": 8, "d_kv": 4, "d_ff": 10, "num_heads": 2}
    sizes |= {"num_layers": 1, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    config = T5Config(**sizes)
    return T5ForConditionalGeneration(config).double()


def with_lora() -> Any:
    """Factors that start at 0 would be given nothing."""
    config = LoraConfig(r=2, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    return get_peft_model(tiny_t5(), config).double()


@pytest.mark.parametrize("make", [tiny_t5, with_lora])
@pytest.mark.parametrize("given", ["labels", "decoder_attention_mask"])
def test_layers_of_an_encoder_decoder_have_the_mask_of_what_they_read(
    given: str, make: Callable[[], Any]
) -> None:
    """Both sides are of the same length here, so the shape does not tell them apart."""
    model = make()
    ids, labels = torch.randint(1, 13, (3, 5)), torch.randint(1, 13, (3, 5))
    encoder = torch.arange(5) < torch.tensor([[5], [3], [2]])
    decoder = torch.arange(5) < torch.tensor([[2], [5], [4]])
    batch = {"input_ids": ids * encoder, "attention_mask": encoder.long()}
    batch["labels"] = labels.masked_fill(~decoder, -100)
    if given == "decoder_attention_mask":
        batch["decoder_attention_mask"] = decoder.long()
        batch["decoder_input_ids"] = labels * decoder
    inputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    with capture.batch(3, 1.0, Masks.of(default_masks(model)(batch))):
        loss = model(**batch).loss
        capture.start_backward()
        loss.backward()
        capture.finish()
    for handle in handles:
        handle.remove()
    found = capture.statistics
    trained = {name for name in inputs if model.get_submodule(name).weight.requires_grad}
    assert set(found.kfac) == trained - {"lm_head"}  # whose weight is tied
    for name, (a, _) in found.kfac.items():
        crossing = "EncDecAttention.k" in name or "EncDecAttention.v" in name
        mask = encoder if crossing or "encoder.block" in name else decoder
        rows = inputs[name].detach()[mask]
        torch.testing.assert_close(a, rows.T @ rows / len(rows))
        assert found.positions[name] == int(mask.sum())
    assert not torch.equal(encoder, decoder)


@pytest.mark.parametrize(
    ("module", "of"),
    [
        ("decoder.block.0.layer.1.EncDecAttention.k", "encoder"),
        ("decoder.block.0.layer.1.EncDecAttention.q", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.o", "decoder"),
        ("decoder.block.0.layer.1.EncDecAttention.v.lora_B.default", "encoder"),
        ("model.decoder.layers.0.encoder_attn.v_proj.base_layer", "encoder"),
        ("model.decoder.layers.0.encoder_attn.out_proj", "decoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.key", "encoder"),
        ("decoder.bert.encoder.layer.0.crossattention.self.query.lora_A.default", "decoder"),
        ("decoder.bert.encoder.layer.0.crossattention.output.dense", "decoder"),
        ("decoder.transformer.h.0.crossattention.c_attn", "encoder"),
        ("decoder.transformer.h.0.crossattention.q_attn", "decoder"),
        ("decoder.transformer.h.0.crossattention.c_proj", "decoder"),
        ("encoder.block.0.layer.0.SelfAttention.k", "encoder"),
    ],
)
@pytest.mark.parametrize("known", [{"encoder", "decoder"}, {"decoder"}, {"encoder"}])
def test_masks_of_the_two_sides(module: str, of: str, known: set[str]) -> None:
    sides = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    batch = {sides[side]: torch.ones(2, 3) for side in known}
    found = Masks.of(encoder_decoder_masks(batch)).of_module(module, (2, 3))
    assert (found is not None) == (of in known)
    both = encoder_decoder_masks(
        {name: torch.full((2, 3), int(s == of)) for s, name in sides.items()}
    )
    chosen = Masks.of(both).of_module(module, (2, 3))
    assert chosen is not None and bool(chosen.all())


def test_a_mask_function_may_name_modules() -> None:
    model, batch = Transformer().double(), texts()[0]
    mask = batch["attention_mask"].bool()
    only_first = mask & (torch.arange(mask.shape[1]) == 0)
    capture = Capture(find_coverage(model, KINDS, 8192), Statistics({}))
    with capture.batch(len(mask), len(mask), Masks.of({r"\.down$": only_first, "": mask})):
        loss = model(batch).mean()
        capture.start_backward()
        loss.backward()
        capture.finish()
    assert capture.statistics.positions["blocks.0.down"] == len(mask)
    wanted = expected(model, [batch], mask=lambda row: only_first[:1, : row["input_ids"].shape[1]])
    found = {"x": capture.statistics.gram["blocks.0.down"]}
    assert_close(found, {"x": wanted.gram["blocks.0.down"]}, 1e-9)
    whole = expected(model, [batch])
    assert_close(
        {"x": capture.statistics.gram["blocks.0.up"]}, {"x": whole.gram["blocks.0.up"]}, 1e-9
    )


def test_reduce_needs_the_examples_of_each_row() -> None:
    found, coverage = captured(Flattened().double(), vectors(), weight_sharing="reduce")
    assert coverage.rows["middle.weight"].statistics == ["gram"]
    assert sorted(found.kfac) == ["first", "last"]


def test_statistics_of_different_kinds_do_not_add_up() -> None:
    model = MLP().double()
    parts = [captured(model, vectors(), weight_sharing=w)[0] for w in ("expand", "reduce")]
    message = "of two kinds: weight_sharing is expand in one and reduce in the other"
    with pytest.raises(ValueError, match=message):
        parts[0] + parts[1]
    with pytest.raises(ValueError, match="weight_sharing='mean'; choose from expand, reduce"):
        find_coverage(model, KINDS, 8192, weight_sharing="mean")


# -- rows that are picked out of a loader --------------------------------------------------------


def picked(rows: int, seed: int = 1, **options: Any) -> list[int]:
    """Of a data set with 40 rows, each its own number."""
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_size=4, **options)
    return torch.cat([batch[0] for batch in first_rows(loader, rows, seed)]).tolist()


def test_of_a_subset_its_rows_alone_are_picked() -> None:
    subset = [3, 5, 8, 13, 21, 34]
    found = picked(4, sampler=SubsetRandomSampler(subset))
    assert len({*found}) == 4 and {*found} <= {*subset}
    every = picked(100, sampler=SubsetRandomSampler(subset))
    assert every[:4] == found and sorted(every) == subset
    assert picked(100, seed=2, sampler=SubsetRandomSampler(subset)) != every


class Backwards(Sampler[int]):
    """As a user's own that groups rows by their length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(39, -1, -1))


def test_samplers_that_give_each_row_once_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    samplers = (
        SequentialSampler(range(40)),
        RandomSampler(range(40)),
        RandomSampler(range(40), generator=generator),
        Backwards(),
    )
    for sampler in samplers:
        found = picked(100, sampler=sampler)
        assert found == picked(100) and sorted(found) == [*range(40)]
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([0.0] * 20 + [1.0] * 20, 40),
        RandomSampler(range(40), replacement=True),
        RandomSampler(range(40), num_samples=10),
    ],
)
def test_samplers_that_choose_rows_are_refused(sampler: Sampler[int]) -> None:
    with pytest.raises(
        ValueError, match=f"whose {type(sampler).__name__} gives other rows each time"
    ):
        picked(4, sampler=sampler)
