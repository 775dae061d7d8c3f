"""A round among parties that share no data: files alone go between their processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mats_lightning import load_statistics, merging
from mats_lightning.measuring import measure, next_weights, statistics_at

PARTIES = """
import sys

import torch
from torch import nn
from torch.nn import functional as F

from mats_lightning.measuring import measure, next_weights

CLASSES = {"a": 2, "b": 3}


def model(task):
    torch.manual_seed(0)
    net = nn.Module()
    net.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5))
    torch.manual_seed(CLASSES[task])
    net.head = nn.Linear(5, CLASSES[task])
    return net.double()


def batches(task):
    draw = torch.Generator().manual_seed(CLASSES[task])
    x = torch.randn(12, 4, generator=draw, dtype=torch.float64)
    y = torch.randint(CLASSES[task], (12,), generator=draw)
    return [{"x": x[:8], "y": y[:8]}, {"x": x[8:], "y": y[8:]}]


def loss(net, batch):
    return F.cross_entropy(net.head(net.body(batch["x"])), batch["y"])


KINDS = ("kfac", "block_fisher", "gradient")

if __name__ == "__main__":
    what, *names = sys.argv[1:]
    if what == "measure":
        (task,) = names
        measure(
            "merged.safetensors", model(task), batches(task), f"{task}.mats.safetensors",
            statistics=KINDS, loss_fn=loss, progress=False,
        )
    else:
        sidecars = [f"{task}.mats.safetensors" for task in names]
        checkpoints = [f"{task}.safetensors" for task in names]
        next_weights("merged.safetensors", sidecars, "next.safetensors", checkpoints, mix=0.25)
"""


@pytest.fixture
def parties(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program above as a module, in a folder with two checkpoints and their average."""
    (tmp_path / "parties.py").write_text(PARTIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "parties", raising=False)
    import parties  # type: ignore[import-not-found]

    thetas = []
    for task in ("a", "b"):
        state = parties.model(task).state_dict()
        draw = torch.Generator().manual_seed(ord(task))
        for tensor in state.values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        save_file(state, f"{task}.safetensors")
        thetas.append({n: t for n, t in state.items() if n.startswith("body.")})
    save_file(merging.average(thetas), "merged.safetensors")
    monkeypatch.delitem(sys.modules, "parties")
    return parties


def by_hand(parties: Any, task: str) -> Any:
    """The party's model at the merged weights, and its statistics there."""
    model = parties.model(task)
    model.load_state_dict(load_file("merged.safetensors"), strict=False)
    names = [n for n, _ in model.named_parameters() if n.startswith("body.")]
    options = {"loss_fn": parties.loss, "progress": False}
    return statistics_at(model, names, parties.batches(task), parties.KINDS, **options)


@pytest.mark.slow
def test_a_round_over_files_and_processes_is_a_round(parties: Any, tmp_path: Path) -> None:
    for arguments in (["measure", "a"], ["measure", "b"], ["next", "a", "b"]):
        command = [sys.executable, "parties.py", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    thetas = [
        {n: t for n, t in load_file(f"{task}.safetensors").items() if n.startswith("body.")}
        for task in ("a", "b")
    ]
    wanted = merging.refresh_step(
        load_file("merged.safetensors"),
        [by_hand(parties, task) for task in ("a", "b")],
        thetas,
        mix=0.25,
    ).state_dict
    found = load_file("next.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12)
        assert not torch.equal(tensor, load_file("merged.safetensors")[name])
    assert not list(tmp_path.glob(".*"))  # no temporary file is left


def measured(
    parties: Any, task: str, weights: str = "merged.safetensors", folder: str = ""
) -> Path:
    sidecar = Path(folder, f"{task}.mats.safetensors")
    measure(
        weights,
        parties.model(task),
        parties.batches(task),
        sidecar,
        statistics=parties.KINDS,
        loss_fn=parties.loss,
        progress=False,
    )
    return sidecar


def test_what_is_measured_are_the_shared_parameters_at_the_merged_weights(parties: Any) -> None:
    found = load_statistics(measured(parties, "a"))
    model = parties.model("a")
    model.load_state_dict(load_file("merged.safetensors"), strict=False)
    assert set(found.gradient) == set(found.info["digest"]) == set(load_file("merged.safetensors"))
    batch = {k: torch.cat([b[k] for b in parties.batches("a")]) for k in ("x", "y")}
    body: list[Tensor] = list(model.body.parameters())
    for name, gradient in zip(
        (n for n, _ in model.body.named_parameters(prefix="body")),
        torch.autograd.grad(parties.loss(model, batch), body),
        strict=True,
    ):
        torch.testing.assert_close(found.gradient[name], gradient)


def test_the_head_trains_again_afterwards_and_what_was_frozen_does_not(parties: Any) -> None:
    model = parties.model("a")
    model.body[0].bias.requires_grad_(False)
    statistics_at(
        model, ["body.0.weight"], parties.batches("a"), loss_fn=parties.loss, progress=False
    )
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["body.0.bias"]


def test_statistics_of_other_weights_are_refused(parties: Any) -> None:
    sidecars = [measured(parties, "a"), measured(parties, "b")]
    next_weights("merged.safetensors", sidecars, "next.safetensors", mix=1.0, damping=0.1)
    with pytest.raises(
        ValueError,
        match=r"a\.mats\.safetensors with next\.safetensors: its statistics belong to other",
    ):
        next_weights("next.safetensors", sidecars, "more.safetensors", mix=1.0)
    assert not Path("more.safetensors").exists()
    measured(parties, "a", "next.safetensors")
    measured(parties, "b", "next.safetensors")
    next_weights("next.safetensors", sidecars, "more.safetensors", mix=1.0)
    assert Path("more.safetensors").exists()


def test_folders_of_what_is_written_are_made(parties: Any) -> None:
    sidecars = [measured(parties, task, folder=f"of/{task}") for task in ("a", "b")]
    assert all(path.exists() for path in sidecars)
    found = next_weights("merged.safetensors", sidecars, "next/round-1/x.safetensors", mix=1.0)
    written = load_file("next/round-1/x.safetensors")
    torch.testing.assert_close(written, found.state_dict, rtol=0, atol=0)


def test_rounds_over_files_lower_the_loss_of_all(parties: Any) -> None:
    """mix = 1 needs neither checkpoints nor anything else of the other parties."""
    sidecars, weights, losses = [], "merged.safetensors", []
    for number in range(4):
        total = 0.0
        for task in ("a", "b"):
            model = parties.model(task)
            model.load_state_dict(load_file(weights), strict=False)
            total += sum(float(parties.loss(model, b)) * len(b["y"]) for b in parties.batches(task))
        losses.append(total / 12)
        sidecars = [measured(parties, task, weights) for task in ("a", "b")]
        after = f"{number}.safetensors"
        next_weights(weights, sidecars, after, mix=1.0, damping=1.0, normalize=False, step=0.5)
        weights = after
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"other": torch.ones(2)}, r"has 'other', which Module does not have \(1 such names\)"),
        (
            {"body.0.bias": torch.ones(2).double()},
            r"'body.0.bias' has shape \(2,\) in .* and \(5,\) in",
        ),
        (
            {"body.0.bias": torch.ones(5).bfloat16()},
            r"'body.0.bias' is torch.bfloat16 in .* and torch.float64 in Module: convert the mod",
        ),
    ],
)
def test_weights_of_another_architecture_are_refused(
    parties: Any, change: dict[str, Tensor], message: str
) -> None:
    save_file({**load_file("merged.safetensors"), **change}, "wrong.safetensors")
    with pytest.raises(ValueError, match=message):
        measured(parties, "a", "wrong.safetensors")
    assert not Path("a.mats.safetensors").exists()


def test_checkpoints_of_other_models_are_refused(parties: Any) -> None:
    sidecars = [measured(parties, "a"), measured(parties, "b")]
    save_file({"head.weight": torch.ones(2)}, "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not have 'body\.0\.bias'"):
        next_weights(
            "merged.safetensors",
            sidecars,
            "next.safetensors",
            ["a.safetensors", "other.safetensors"],
        )


def test_names_get_the_prefix_that_they_have_in_the_module(tmp_path: Path) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()

    model = Outer()
    save_file(
        {"weight": torch.ones(2, 3).double(), "bias": torch.ones(2).double()},
        tmp_path / "x.safetensors",
    )
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1])
    sidecar, out = tmp_path / "x.mats.safetensors", tmp_path / "next.safetensors"

    def taken(weights: Path) -> Path:
        measure(
            weights,
            model,
            [{"x": x, "y": y}],
            sidecar,
            prefix="backbone.",
            statistics=("kfac", "block_fisher", "gradient"),
            loss_fn=lambda m, b: F.cross_entropy(model.head(model.backbone(b["x"])), b["y"]),
            progress=False,
        )
        return weights

    weights = taken(tmp_path / "x.safetensors")
    assert torch.equal(model.backbone.weight, torch.ones(2, 3).double())
    options: dict[str, Any] = {"prefix": "backbone.", "mix": 0.5, "damping": 1.0}
    own = {"weight": torch.zeros(2, 3).double(), "bias": torch.zeros(2).double()}
    save_file(own, tmp_path / "folder.safetensors")
    save_file({f"backbone.{n}": t for n, t in own.items()}, tmp_path / "lightning.safetensors")
    for form in ("folder", "lightning"):  # checkpoints have the prefix, or get it
        next_weights(weights, [sidecar], out, [tmp_path / f"{form}.safetensors"], **options)
        assert set(load_file(out)) == {"weight", "bias"}
    again = tmp_path / "again.safetensors"
    next_weights(taken(out), [sidecar], again, [tmp_path / "folder.safetensors"], **options)
    assert set(load_file(again)) == {"weight", "bias"}
    assert torch.equal(model.backbone.weight, load_file(out)["weight"])
