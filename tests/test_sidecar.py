"""The file: what is written is read, by us and by others, and nothing half or foreign is taken."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, Transformer, texts
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_capture import captured
from torch import Tensor, nn

from mats_lightning import Statistics, load_statistics, save_statistics, sidecar, sidecar_path
from mats_lightning.sidecar import check_belongs, describe

PACKED = ("A/", "G/", "block_fisher/")


def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Transformer()


@cache
def taken(dtype: torch.dtype) -> Statistics:
    """Of a transformer, with matrices that are symmetric to the last bit and all of the info."""
    model = transformer().to(dtype)
    sums, coverage = captured(model, texts())
    for key, tensor in sums.tensors.items():
        if key.startswith(PACKED):
            tensor.copy_((tensor + tensor.T) / 2)
    sums.info = describe(
        coverage,
        sums,
        dict(model.state_dict()),
        loss_reduction="mean",
        mask=lambda batch: None,
        epochs=[1, 2],
        notes=["größer"],
    )
    return sums


def statistics(dtype: torch.dtype = torch.float32) -> Statistics:
    return deepcopy(taken(dtype))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = sidecar_path(tmp_path / "val_loss=0.31.ckpt")
    save_statistics(statistics(), path)
    return path


def doctored(path: Path, **metadata: str) -> None:
    """The same file with other metadata."""
    with safe_open(path, framework="pt") as file:
        old = file.metadata()
    save_file(load_file(path), path, old | metadata)


# -- what is written is read -------------------------------------------------------------------


def test_the_name_is_appended() -> None:
    expected = Path("a/val_loss=0.31.ckpt.mats.safetensors")
    assert sidecar_path("a/val_loss=0.31.ckpt") == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_round_trip_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    wanted = statistics(dtype)
    save_statistics(wanted, sidecar_path(tmp_path / "x.ckpt"))
    for path in (tmp_path / "x.ckpt", sidecar_path(tmp_path / "x.ckpt")):
        found = load_statistics(path)
        assert sorted(found.tensors) == sorted(wanted.tensors)
        for key, tensor in wanted.tensors.items():
            assert torch.equal(found.tensors[key], tensor), key
            assert found.tensors[key].dtype == dtype
        assert found.examples == wanted.examples
        assert found.group_positions == wanted.group_positions
        assert found.inputs == wanted.inputs
        assert found.info == wanted.info
        for view in ("diagonal_fisher", "block_fisher", "gram", "kfac"):
            assert set(getattr(found, view)) == set(getattr(wanted, view))


def test_triangles_may_be_written_in_bfloat16(tmp_path: Path) -> None:
    wanted, paths = statistics(), [tmp_path / name for name in ("full", "half")]
    save_statistics(wanted, sidecar_path(paths[0]))
    save_statistics(wanted, sidecar_path(paths[1]), factor_dtype=torch.bfloat16)
    found = load_statistics(paths[1])
    for name, (a, g) in wanted.kfac.items():
        for exact, rounded in zip((a, g), found.kfac[name], strict=True):
            assert rounded.dtype == torch.float32 and torch.equal(rounded, rounded.T)
            torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=0.0)
            assert not torch.equal(rounded, exact)
    for name, f in wanted.diagonal_fisher.items():
        assert torch.equal(found.diagonal_fisher[name], f)
    large, small = (sidecar_path(path).stat().st_size for path in paths)
    packed = sum(
        t.shape[-1] * (t.shape[-1] + 1) // 2
        for key, t in wanted.tensors.items()
        if key.split("/")[0] in sidecar.PACKED
    )
    assert abs(large - small - 2 * packed) < 4096  # the headers differ in length
    with pytest.raises(ValueError, match=r"factor_dtype=torch\.int8; choose from"):
        save_statistics(wanted, sidecar_path(paths[0]), factor_dtype=torch.int8)


def test_others_can_read_it_with_safetensors_alone(saved: Path) -> None:
    """By the text of the module's docstring."""
    wanted = statistics()
    with safe_open(saved, framework="numpy") as file:
        metadata, keys = file.metadata(), list(file.keys())
        tensors = {key: torch.from_numpy(file.get_tensor(key)) for key in keys}
    assert metadata["format"] == "mats_lightning" and metadata["format_version"] == "1"
    described = json.loads(metadata["statistics"])
    assert set(described) == {"examples", "positions", "inputs", "info"}

    def symmetric(packed: Tensor) -> Tensor:
        d = int((2 * len(packed)) ** 0.5)
        assert d * (d + 1) // 2 == len(packed)
        full = torch.zeros(d, d)
        full[tuple(torch.triu_indices(d, d))] = packed
        return full + full.triu(1).T

    examples = described["examples"]
    for name, fisher in wanted.diagonal_fisher.items():
        assert torch.equal(tensors[f"diagonal_fisher/{name}"] / examples, fisher)
    for name, block in wanted.block_fisher.items():
        assert torch.equal(symmetric(tensors[f"block_fisher/{name}"]) / examples, block)
    for module, (a, g) in wanted.kfac.items():
        group = described["inputs"][module]
        positions = described["positions"][group]
        assert torch.equal(symmetric(tensors[f"A/{group}"]) / positions, a)
        assert torch.equal(symmetric(tensors[f"G/{module}"]) / examples, g)
        assert tensors[f"a/{group}"].shape == a.shape[:1]
    coverage = {row["name"]: row for row in described["info"]["coverage"]}
    assert coverage["head.weight"] == {
        "name": "head.weight",
        "shape": [3, 6],
        "statistics": ["diagonal_fisher", "gram", "kfac"],
        "reason": "",
    }
    assert described["info"]["notes"] == ["größer"]


def test_the_docstring_names_every_field(saved: Path) -> None:
    assert sidecar.__doc__ is not None
    for field in load_statistics(saved).info:
        assert f"`{field}`" in sidecar.__doc__, field


def test_tensors_are_read_when_they_are_asked_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Watched:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Watched":
            self.opened = self.file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self.file.__exit__(*args)

        def get_tensor(self, key: str) -> Tensor:
            read.append(key)
            return self.opened.get_tensor(key)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

    monkeypatch.setattr(sidecar, "safe_open", Watched)
    found = load_statistics(saved)
    assert "head.weight" in found.diagonal_fisher and "head" in found.kfac
    assert "A/head" in found.tensors and len(found.gram) == 15
    assert read == []
    assert found.kfac["blocks.0.k"][1].shape == (6, 6)
    assert read == ["A/blocks.0.q", "G/blocks.0.k"]


def test_two_sidecars_add(saved: Path) -> None:
    found = load_statistics(saved)
    total = found + found
    assert total.examples == 2 * found.examples
    for name, fisher in found.diagonal_fisher.items():
        torch.testing.assert_close(total.diagonal_fisher[name], fisher)
    for module, (a, g) in found.kfac.items():
        torch.testing.assert_close(total.kfac[module], (a, g))


# -- a kill leaves the old file or the new one ---------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mats_lightning import Statistics, load_statistics, save_statistics
torch.set_num_threads(1)
path, moments = Path(sys.argv[1]), random.Random(0)
for round in range(40):
    child = os.fork()
    if not child:
        n = 1000 * round
        while True:
            n += 1
            sums = {f"diagonal_fisher/{i}": torch.full((300, 300), float(n)) for i in range(10)}
            save_statistics(Statistics(sums, examples=n), path)
    time.sleep(moments.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not path.exists():
        print("none")
        continue
    found = load_statistics(path)
    numbers = {float(x) for t in found.tensors.values() for x in t.unique()}
    assert numbers == {float(found.examples)}, (numbers, found.examples)
    print("old" if found.examples < 1000 * round else "new")
    if round % 3 == 0:
        path.unlink()
"""


def test_a_kill_leaves_the_old_file_or_the_new_one_or_none(tmp_path: Path) -> None:
    path = sidecar_path(tmp_path / "x.ckpt")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {"none", "old", "new"}
    litter = list(tmp_path.glob(".*.tmp"))
    assert litter  # at least one kill came while it was written
    save_statistics(statistics(), path)  # and what it left is in nobody's way
    assert load_statistics(path).examples == 10


def test_a_leftover_of_the_same_process_is_in_nobodys_way(saved: Path) -> None:
    leftover = saved.with_name(f".{saved.name}.{os.getpid()}.tmp")
    leftover.write_bytes(b"half")
    save_statistics(statistics(), saved)
    assert load_statistics(saved).examples == 10 and not leftover.exists()


# -- what is refused -----------------------------------------------------------------------------


def test_a_missing_sidecar(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no statistics at .*x\.ckpt\.mats\.safetensors: "):
        load_statistics(tmp_path / "x.ckpt")


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 200, 0.5, 0.99, -1])
def test_a_truncated_sidecar(kept: float, saved: Path) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    with pytest.raises(ValueError, match=f"{saved} is damaged or truncated .*copy it again"):
        load_statistics(saved)


def test_a_sidecar_that_is_truncated_after_it_was_opened(saved: Path) -> None:
    found = load_statistics(saved)
    os.truncate(saved, 5000)
    with pytest.raises(ValueError, match=r"'diagonal_fisher/words\.weight' cannot be"):
        found.diagonal_fisher["words.weight"]


def test_a_sidecar_that_is_replaced_after_it_was_opened(saved: Path) -> None:
    """Sums of the new one would be divided by the counts of the old one."""
    found, more = load_statistics(saved), statistics()
    assert found.diagonal_fisher["norm.weight"].shape == (6,)
    more.examples *= 2
    save_statistics(more, saved)
    with pytest.raises(ValueError, match=f"{saved} has been replaced since it was loaded"):
        found.diagonal_fisher["norm.weight"]
    assert load_statistics(saved).examples == 2 * found.examples


@pytest.mark.parametrize("content", [b"PK\x03\x04" * 50, b"\xff" * 100, b'{"a": 1}' * 9])
def test_a_file_that_is_no_safetensors(content: bytes, saved: Path) -> None:
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or truncated"):
        load_statistics(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_foreign_safetensors_file(metadata: dict[str, str] | None, saved: Path) -> None:
    save_file({"weight": torch.ones(2)}, saved, metadata)
    with pytest.raises(ValueError, match="is a safetensors file without statistics"):
        load_statistics(saved)


def test_a_newer_format(saved: Path) -> None:
    doctored(saved, format_version="2")
    with pytest.raises(ValueError, match="format version 2, this mats_lightning reads up to 1: up"):
        load_statistics(saved)


@pytest.mark.parametrize(
    "metadata",
    [
        {"format_version": "new"},
        {"statistics": "{"},
        {"statistics": "[1]"},
        {"statistics": '{"positions": {}, "inputs": {}, "info": {}}'},
        {"statistics": '{"examples": 0, "positions": {}, "inputs": {}}'},
        {"statistics": '{"examples": "3", "positions": {}, "inputs": {}, "info": {}}'},
        {"statistics": '{"examples": -3, "positions": {}, "inputs": {}, "info": {}}'},
    ],
)
def test_metadata_that_is_not_as_documented(metadata: dict[str, str], saved: Path) -> None:
    doctored(saved, **metadata)
    with pytest.raises(ValueError, match=f"{saved} is damaged"):
        load_statistics(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["diagonal_fisher/head.weight", "A/head", "G/head", "a/head"])
def test_sums_that_are_not_finite_are_not_saved(key: str, value: float, saved: Path) -> None:
    before, broken = saved.read_bytes(), statistics()
    broken.tensors[key].view(-1)[-1] = value
    with pytest.raises(ValueError, match=f"'{key}' has NaN or inf"):
        save_statistics(broken, saved)
    assert saved.read_bytes() == before


def test_a_sum_that_is_not_finite_is_not_read(saved: Path) -> None:
    tensors = load_file(saved)
    tensors["G/head"][2] = float("nan")
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, saved, metadata)
    found = load_statistics(saved)
    with pytest.raises(ValueError, match=f"{saved}: 'G/head' has NaN or inf; take the statistics"):
        found.kfac["head"]


def test_no_examples(saved: Path) -> None:
    save_statistics(Statistics({}), saved)
    with pytest.raises(ValueError, match="holds no examples: its checkpoint was saved before"):
        load_statistics(saved)


# -- which weights it belongs to -----------------------------------------------------------------


def test_statistics_belong_to_their_weights(saved: Path) -> None:
    weights = transformer().state_dict() | {"not covered": torch.ones(1)}
    check_belongs(load_statistics(saved), weights, "trec")


def test_other_weights(saved: Path) -> None:
    weights = dict(transformer().state_dict())
    weights["head.bias"] = torch.nextafter(weights["head.bias"], torch.tensor(9.0))
    with pytest.raises(
        ValueError, match="trec: its statistics belong to other weights: the digest"
    ) as e:
        check_belongs(load_statistics(saved), weights, "trec")
    assert "'head.bias'" in str(e.value) and "use the sidecar that was saved with" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.int32])
def test_dtypes_that_are_too_narrow_for_sums(tmp_path: Path, dtype: torch.dtype) -> None:
    found = Statistics({"A/x": torch.full((2, 2), 1e6)}, 1, {"x": 1}, {"x": "x"})
    with pytest.raises(
        ValueError, match=rf"factor_dtype={dtype}; choose from None, torch\.float32"
    ):
        save_statistics(found, tmp_path / "x.mats.safetensors", dtype)
    assert not list(tmp_path.iterdir())


def test_sums_that_are_too_large_for_their_dtype(tmp_path: Path) -> None:
    large = torch.full((2, 2), 1e300, dtype=torch.float64)
    found = Statistics({"A/x": large}, 1, {"x": 1}, {"x": "x"})
    save_statistics(found, tmp_path / "x.mats.safetensors", torch.float64)
    with pytest.raises(ValueError, match=r"'A/x' is too large for torch\.float32; leave it out"):
        save_statistics(found, tmp_path / "y.mats.safetensors", torch.float32)


def test_a_sidecar_without_digests_belongs_to_none(saved: Path) -> None:
    found = load_statistics(saved)
    found.info["digest"] = {}
    with pytest.raises(ValueError, match=r"trec: its statistics hold no digest .*rename them\?"):
        check_belongs(found, transformer().state_dict(), "trec")


def test_another_architecture_that_lacks_a_parameter(saved: Path) -> None:
    message = r"trec: .* of another architecture: they cover 'words.weight' \(11, 6\), which"
    with pytest.raises(ValueError, match=message):
        check_belongs(load_statistics(saved), MLP().state_dict(), "trec")


def test_another_architecture_with_other_shapes(saved: Path) -> None:
    weights = transformer().state_dict() | {"head.weight": torch.ones(4, 6)}
    message = (
        r"trec: .* of another architecture: 'head.weight' has shape \(3, 6\) there and \(4, 6\)"
    )
    with pytest.raises(ValueError, match=message):
        check_belongs(load_statistics(saved), weights, "trec")


def test_a_moved_sidecar_still_belongs(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    found = load_statistics(saved.rename(sidecar_path(tmp_path / "other" / "x.ckpt")))
    check_belongs(found, transformer().state_dict(), "trec")


def test_a_sidecar_within_a_models_folder(tmp_path: Path) -> None:
    """As it comes from the hub; one beside the folder stands before it."""
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no statistics at .*model\.mats\.safetensors"):
        load_statistics(folder)
    inside, beside = statistics(), statistics()
    inside.info["note"], beside.info["note"] = "inside", "beside"
    save_statistics(inside, folder / "statistics.mats.safetensors")
    assert load_statistics(folder).info["note"] == "inside"
    save_statistics(inside, folder / "more.mats.safetensors")
    with pytest.raises(ValueError, match=r"holds 2 sidecars, more\.mats.* and statistics\.mats"):
        load_statistics(folder)
    save_statistics(beside, sidecar_path(folder))
    assert load_statistics(folder).info["note"] == "beside"
