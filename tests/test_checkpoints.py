"""Every form of checkpoint, written by the library that owns the form, and read back."""

import copy
import json
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mats_lightning.checkpoints import INDEX, load_weights


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(3, 4, generator=generator),
        "encoder.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=20,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=10,
        )
    )


def sharded(folder: Path) -> BertModel:
    bert = tiny_bert()
    bert.save_pretrained(folder, max_shard_size="3KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return bert


@pytest.mark.parametrize("weights_only", [False, True])
def test_checkpoint_of_a_trainer(tmp_path: Path, weights_only: bool) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = BoringModel()
    trainer.fit(module)
    path = tmp_path / "epoch=0-val_loss=0.31"  # a name whose suffix is none
    trainer.save_checkpoint(path, weights_only=weights_only)
    assert_same(load_weights(path), module.state_dict())


def test_checkpoint_is_memory_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    load = torch.load

    def recorded(*arguments: object, **options: object) -> object:
        calls.append(options)
        return load(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", recorded)
    torch.save({"state_dict": weights()}, tmp_path / "a.ckpt")
    assert_same(load_weights(tmp_path / "a.ckpt"), weights())
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]


def test_wrappers_components_go_wherever_they_stand(tmp_path: Path) -> None:
    # the second name has a wrapper's in it, but not as a component
    model = nn.ModuleDict({"backbone": nn.Linear(2, 3), "a_orig_mod": nn.Linear(2, 2)})
    wrapped = copy.deepcopy(model)
    wrapped.register_module("backbone", cast(nn.Module, torch.compile(model["backbone"])))
    state_dict = {f"_forward_module.{key}": value for key, value in wrapped.state_dict().items()}
    assert "_forward_module.backbone._orig_mod.weight" in state_dict
    torch.save({"state_dict": state_dict}, tmp_path / "a.ckpt")
    assert_same(load_weights(tmp_path / "a.ckpt"), model.state_dict())
    save_file(state_dict, tmp_path / "a.safetensors")
    assert_same(load_weights(tmp_path / "a.safetensors"), model.state_dict())


def test_safetensors_file(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    assert_same(load_weights(str(tmp_path / "a.safetensors")), weights())


def test_hugging_face_folder(tmp_path: Path) -> None:
    bert = tiny_bert()
    bert.save_pretrained(tmp_path)
    assert_same(load_weights(tmp_path), bert.state_dict())


def test_hugging_face_folder_of_shards(tmp_path: Path) -> None:
    bert = sharded(tmp_path)
    assert_same(load_weights(tmp_path), bert.state_dict())


def test_prefix_gives_the_names_of_the_lightning_module(tmp_path: Path) -> None:
    module = L.LightningModule()
    module.backbone = tiny_bert()
    module.backbone.save_pretrained(tmp_path / "exported")
    torch.save({"state_dict": module.backbone.state_dict()}, tmp_path / "a.ckpt")
    for path in (tmp_path / "exported", tmp_path / "a.ckpt"):
        assert_same(load_weights(path, prefix="backbone."), module.state_dict())


def test_prefix_without_its_dot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prefix 'backbone'.*expected 'backbone\.'"):
        load_weights(tmp_path, prefix="backbone")


def test_only_the_tensor_that_is_accessed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded(tmp_path)
    found = load_weights(tmp_path)
    opened = []

    def recorded(file: Path, framework: str) -> object:
        opened.append(file.name)
        return safe_open(file, framework=framework)

    monkeypatch.setattr("mats_lightning.checkpoints.safe_open", recorded)
    name = "encoder.layer.0.output.dense.weight"
    assert name in found
    assert len(list(found)) == len(found) > 1
    assert opened == []
    assert found[name].shape == (8, 16)
    assert len(opened) == 1


def test_lazy_weights_can_be_copied_and_pickled(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    found = load_weights(tmp_path / "a.safetensors")
    assert_same(copy.deepcopy(found), weights())
    assert_same(pickle.loads(pickle.dumps(found)), weights())


def test_tensor_outlives_the_file(tmp_path: Path) -> None:
    for name, write in {
        "a.safetensors": lambda path: save_file(weights(), path),
        "a.ckpt": lambda path: torch.save({"state_dict": weights()}, path),
    }.items():
        write(tmp_path / name)
        tensor = load_weights(tmp_path / name)["encoder.weight"]
        (tmp_path / name).unlink()
        assert torch.equal(tensor, weights()["encoder.weight"])


def test_change_of_a_tensor_stays_out_of_the_file(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "a.ckpt")
    load_weights(tmp_path / "a.ckpt")["encoder.weight"].zero_()
    assert_same(load_weights(tmp_path / "a.ckpt"), weights())


def test_missing_file_names_what_is_there(tmp_path: Path) -> None:
    torch.save({"state_dict": weights()}, tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*lst\.ckpt.*holds: last\.ckpt"):
        load_weights(tmp_path / "lst.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*elsewhere either"):
        load_weights(tmp_path / "elsewhere" / "last.ckpt")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.99])
def test_truncated_file(tmp_path: Path, part: float) -> None:
    save_file(weights(), tmp_path / "a.safetensors")
    torch.save({"state_dict": weights()}, tmp_path / "a.ckpt")
    for name, form in {"a.safetensors": "safetensors file", "a.ckpt": "file of torch.save"}.items():
        complete = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(complete[: int(part * len(complete))])
        expected = rf"{name} .*complete {form}.*found {int(part * len(complete))} bytes.*cut off"
        with pytest.raises(ValueError, match=expected):
            load_weights(tmp_path / name)


def test_truncated_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = max(tmp_path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} is no complete safetensors file"):
        load_weights(tmp_path)


class Opaque:
    """What weights_only=True does not admit."""


def test_objects_that_weights_only_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"state_dict": weights(), "hyper_parameters": Namespace(x=Opaque())}, path)
    with pytest.raises(ValueError, match=r"a\.ckpt holds pickled objects") as refused:
        load_weights(path)
    message = str(refused.value)
    assert "argparse.Namespace" in message
    assert f"{__name__}.Opaque" in message
    assert "save_weights_only=True" in message
    assert "torch.serialization.add_safe_globals" in message
    with torch.serialization.safe_globals([Namespace, Opaque]):
        assert_same(load_weights(path), weights())


@pytest.mark.parametrize(
    "content, found",
    [(weights(), r"encoder\.weight, encoder\.bias, steps"), ([torch.ones(1)], "a list")],
    ids=["bare state dict", "list"],
)
def test_checkpoint_without_a_state_dict(tmp_path: Path, content: object, found: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt has no 'state_dict'.*found {found}\. Save"):
        load_weights(tmp_path / "a.pt")


def test_extra_state_is_left_out_aloud(tmp_path: Path) -> None:
    state_dict = {**weights(), "metric._extra_state": {"count": 3}}
    torch.save({"state_dict": state_dict}, tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"left out, as no tensors: metric\._extra_state"):
        assert_same(load_weights(tmp_path / "a.ckpt"), weights())


@pytest.mark.parametrize("form", ["a.ckpt", "a.safetensors"])
def test_names_that_are_equal_without_wrappers(tmp_path: Path, form: str) -> None:
    twice = {"_orig_mod.head.bias": torch.ones(2), "head.bias": torch.zeros(2)}
    if form == "a.ckpt":
        torch.save({"state_dict": twice}, tmp_path / form)
    else:
        save_file(twice, tmp_path / form)
    with pytest.raises(ValueError, match=r"'_orig_mod\.head\.bias' and 'head\.bias' are both"):
        load_weights(tmp_path / form)


def test_one_name_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "2.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"'a' is in 1\.safetensors and in 2\.safetensors"):
        load_weights(tmp_path)


def test_missing_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = max(tmp_path.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"names the shard {shard.name}, .* not there"):
        load_weights(tmp_path)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_shard_outside_of_the_folder_is_refused(absolute: bool, tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere.safetensors", tmp_path / "model"
    save_file({"a": torch.ones(1)}, elsewhere)
    folder.mkdir()
    shard = str(elsewhere) if absolute else "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"elsewhere\.safetensors, which is not in its folder"):
        load_weights(folder)


def test_index_and_shards_of_different_saves(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    index = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"says that 1\.safetensors holds 'b'"):
        load_weights(tmp_path)


@pytest.mark.parametrize("text", ['{"weight_map": ', "[]", "{}", '{"weight_map": []}'])
def test_broken_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=rf"{INDEX} is no index of shards"):
        load_weights(tmp_path)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"expected model\.safetensors or .*holds: pytorch_model\.bin"
    ):
        load_weights(tmp_path)
