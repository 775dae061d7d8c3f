"""What capturing costs: against a plain training step, against the usual ways, in memory.

    python tests/benchmarks/capture.py [--fast] [--cases minilm-64 vit-56] [--parts step memory]

All ways of a table run in one process, in turns (A, B, C, A, B, C, ...), so that what else the
machine does falls on all of them; a ratio is taken within a round, and its median over the rounds
is printed with its range. A step is forward, backward and AdamW, on random rows without padding.

FLOPs are those of the matrix products (and convolutions, and attention) that really run, two for
a multiply and add, as torch's FlopCounterMode sees them dispatched: of a symmetric product only
the blocks that are computed. What an elementwise operation or a copy takes is in no FLOPs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import CONSOLE, Run, in_turns, machine, memory_of, ratios, spread
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AutoModel, Dinov2Config, Dinov2Model
from transformers.utils import logging

from mats_lightning.capture import Capture
from mats_lightning.statistics import KINDS, Statistics, find_coverage

sys.path.append(str(Path(__file__).parents[2] / "recipes"))

Batch = dict[str, Tensor]
CLASSES = 6
CHOICES: dict[str, tuple[str, ...]] = {
    "diagonal Fisher": ("diagonal_fisher",),
    "gram": ("gram",),
    "kfac": ("kfac",),
    "all, with block Fisher": KINDS,
}


# -- models and rows -----------------------------------------------------------------------------


class Classifier(nn.Module):
    """The mean of the last hidden states under a linear head."""

    def __init__(self, backbone: nn.Module, width: int = 384) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(width, CLASSES)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        hidden: Tensor = self.backbone(**inputs).last_hidden_state
        image = hidden.ndim == 4  # (N, channels, height, width), else (N, tokens, width)
        logits: Tensor = self.head(hidden.mean((2, 3) if image else 1))
        return logits


def minilm(attention: str = "sdpa") -> Classifier:
    from packages import model_path  # of the recipes

    folder = model_path("package:minilm")
    return Classifier(
        AutoModel.from_pretrained(folder, attn_implementation=attention, add_pooling_layer=False)
    )


def vit(attention: str = "sdpa") -> Classifier:
    """Of DINOv2-S's size, random weights: what they are takes no time."""
    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=56, patch_size=14)
    config._attn_implementation = attention
    return Classifier(Dinov2Model(config))


def cnn(attention: str = "none") -> Classifier:
    """EfficientNet-Lite0, most of it a channel or a position at a time; random weights."""
    from efficientnet import EfficientNetLite, EfficientNetLiteConfig  # of the recipes

    config = EfficientNetLiteConfig()
    return Classifier(EfficientNetLite(config), config.hidden_size)


def texts(examples: int, length: int) -> Batch:
    ids = torch.randint(1000, 30000, (examples, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def images(examples: int, size: int) -> Batch:
    return {"pixel_values": torch.randn(examples, 3, size, size)}


# the model, 32 rows of which size (tokens, pixels), random rows
CASES: dict[str, tuple[Callable[..., Classifier], int, Callable[[int, int], Batch]]] = {
    "minilm-64": (minilm, 64, texts),
    "minilm-128": (minilm, 128, texts),
    "vit-56": (vit, 56, images),
    "cnn-96": (cnn, 96, images),
}


# -- ours ----------------------------------------------------------------------------------------


def new_capture(model: nn.Module, kinds: Sequence[str]) -> Capture:
    return Capture(find_coverage(model, kinds, 8192), Statistics({}))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Batch,
    labels: Tensor,
    capture: Capture | None,
) -> None:
    """A training step, as MaTSStatsCallback captures it."""
    optimizer.zero_grad()
    if capture is None:
        F.cross_entropy(model(inputs), labels).backward()
    else:
        with capture.batch(len(labels), len(labels), inputs.get("attention_mask")):
            loss = F.cross_entropy(model(inputs), labels)
            capture.start_backward()
            loss.backward()
            capture.finish()
    optimizer.step()


def collect(model: nn.Module, inputs: Batch, labels: Tensor, capture: Capture) -> None:
    """A pass at fixed weights, as collect_statistics makes it."""
    with capture.batch(len(labels), len(labels), inputs.get("attention_mask")):
        loss = F.cross_entropy(model(inputs), labels)
        capture.start_backward()
        torch.autograd.grad(loss, capture.needed, allow_unused=True)
        capture.finish()


# -- the usual ways ------------------------------------------------------------------------------


def batch_size_one(model: nn.Module, inputs: Batch, labels: Tensor, kfac: bool) -> None:
    """The MaTS paper's code: rows one by one; `.grad` squared, a^T a and g^T g of linear layers."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    factors: dict[str, Tensor] = {}

    def add(key: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        product = x.T @ x
        factors[key] = factors[key] + product if key in factors else product

    def forward_hook(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        add(f"A/{name}", args[0])
        output.register_hook(lambda g: add(f"G/{name}", g))

    layers = {n: m for n, m in model.named_modules() if kfac and isinstance(m, nn.Linear)}
    hooks = [m.register_forward_hook(partial(forward_hook, n)) for n, m in layers.items()]
    for n in range(len(labels)):
        model.zero_grad()
        row = {name: x[n : n + 1] for name, x in inputs.items()}
        F.cross_entropy(model(row), labels[n : n + 1]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] += parameter.grad.square()
    for hook in hooks:
        hook.remove()


def per_example_gradients(model: nn.Module, inputs: Batch, labels: Tensor, chunk: int) -> None:
    """torch.func's way to the diagonal; `chunk` bounds the gradients that are held at once."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    sums = {name: torch.zeros_like(p) for name, p in parameters.items()}
    # No row is padded, and what the backbone does with a mask cannot be vectorised.
    (x,) = (x for name, x in inputs.items() if name != "attention_mask")
    (name_of_x,) = inputs.keys() - {"attention_mask"}

    def loss(parameters: dict[str, Tensor], row: Tensor, label: Tensor) -> Tensor:
        given = ({name_of_x: row.unsqueeze(0)},)
        return F.cross_entropy(functional_call(model, parameters, given), label.unsqueeze(0))

    gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    for rows, some in zip(x.split(chunk), labels.split(chunk), strict=True):
        for name, gradient in gradients(parameters, rows, some).items():
            sums[name] += gradient.square().sum(0)


def curvlinops_kfac(model: nn.Module, weights: list[Any], inputs: Batch, labels: Tensor) -> None:
    import curvlinops

    curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        weights,
        [(inputs, labels)],
        fisher_type="empirical",
        check_deterministic=False,
        num_data=len(labels),
        num_per_example_loss_terms=1,
        batch_size_fn=lambda inputs: len(next(iter(inputs.values()))),
    ).compute_kronecker_factors()


# -- measuring -----------------------------------------------------------------------------------


def flops(run: Run) -> int:
    """Of one run; the in-place products and the CPU's attention are unknown to torch's counter."""
    aten: Any = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention
    for unknown, known in (
        (aten.addmm_, aten.addmm),
        (aten.baddbmm_, aten.baddbmm),
        (aten._scaled_dot_product_flash_attention_for_cpu, attention),
        (
            aten._scaled_dot_product_flash_attention_for_cpu_backward,
            aten._scaled_dot_product_flash_attention_backward,
        ),
    ):
        flop_registry.setdefault(unknown, flop_registry[known])
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def steps(name: str, rounds: int) -> dict[str, Any]:
    """Part a): a training step with capture against one without."""
    make, size, rows = CASES[name]
    model, inputs, labels = make(), rows(32, size), torch.randint(CLASSES, (32,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    captures = {what: new_capture(model, kinds) for what, kinds in CHOICES.items()}
    ways: dict[str, Run] = {"plain": partial(train, model, optimizer, inputs, labels, None)}
    for what, capture in captures.items():
        ways[what] = partial(train, model, optimizer, inputs, labels, capture)
    for run in ways.values():  # a first captured batch is compared with autograd, once
        run()
    counted = {what: flops(run) for what, run in ways.items()}
    seconds = in_turns(ways, rounds)
    table = Table("a step with", "GFLOP", "FLOPs / plain", "ms", "time / plain", "measured/implied")
    table.title = f"{name}, 32 rows: a training step"
    found: dict[str, Any] = {}
    for what, times in seconds.items():
        implied = counted[what] / counted["plain"]
        measured = ratios(times, seconds["plain"])
        ratio = statistics.median(measured)
        table.add_row(
            what,
            f"{counted[what] / 1e9:.0f}",
            f"{implied:.2f}",
            spread([t * 1e3 for t in times], 0),
            spread(measured, 2),
            f"{ratio / implied:.2f}",
        )
        found[what] = {"flops": counted[what], "seconds": times, "implied": implied, "ratio": ratio}
    CONSOLE.print(table)
    return found


def usual_ways(name: str, rounds: int, chunk: int) -> dict[str, Any]:
    """Part b): the same statistics of the same rows, ours and the usual ways."""
    make, size, rows = CASES[name]
    model, inputs, labels = make(), rows(32, size), torch.randint(CLASSES, (32,))
    model.eval()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    vectorised = make("eager").eval()  # attention that vmap vectorises; the others are faster
    pairs: dict[str, tuple[Sequence[str], Run]] = {
        "diagonal, rows one by one": (
            ["diagonal_fisher"],
            partial(batch_size_one, model, inputs, labels, False),
        ),
        "diagonal, vmap(grad)": (
            ["diagonal_fisher"],
            partial(per_example_gradients, vectorised, inputs, labels, chunk),
        ),
        "all but block Fisher, rows one by one": (
            ["diagonal_fisher", "gram", "kfac"],
            partial(batch_size_one, model, inputs, labels, True),
        ),
        "kfac, curvlinops": (
            ["kfac"],
            partial(curvlinops_kfac, model, linear, inputs, labels),
        ),
    }
    try:
        import curvlinops  # noqa: F401
    except ImportError:
        del pairs["kfac, curvlinops"]
        CONSOLE.print("curvlinops is not installed (see .ci/run): it is left out")
    table = Table("way", "ms", "ours, ms", "ours / way")
    table.title = f"{name}, 32 rows: the same statistics in other ways"
    found: dict[str, Any] = {}
    for what, (kinds, theirs) in pairs.items():
        capture = new_capture(model, kinds)
        ours = partial(collect, model, inputs, labels, capture)
        ours()
        seconds = in_turns({"ours": ours, "theirs": theirs}, rounds)
        measured = ratios(seconds["ours"], seconds["theirs"])
        ms = {who: [t * 1e3 for t in times] for who, times in seconds.items()}
        table.add_row(what, spread(ms["theirs"], 0), spread(ms["ours"], 0), spread(measured, 2))
        found[what] = {**seconds, "ratio": statistics.median(measured)}
    CONSOLE.print(table)
    return found


def peak(name: str, examples: int, kinds: Sequence[str]) -> tuple[float, float]:
    """MB at the peak of three steps, and in the sums; of this process, so call it once."""
    make, size, rows = CASES[name]
    model, inputs, labels = make(), rows(examples, size), torch.randint(CLASSES, (examples,))
    capture = new_capture(model, kinds) if kinds else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(3):
        train(model, optimizer, inputs, labels, capture)
    sums = sum(t.nbytes for t in capture.statistics.tensors.values()) if capture else 0
    return memory_of("VmHWM"), sums / 2**20


def memory(name: str) -> dict[str, Any]:
    """Part c): the peak over that of a plain step, each in a process of its own.

    glibc gives back what is freed there (MALLOC_MMAP_THRESHOLD_), so that the peak is what was in
    use: without it holes between blocks of memory add some hundred MB, other ones in each run.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    table = Table("rows", "plain, MB", "all, MB", "difference", "of it the sums", "rest")
    table.title = f"{name}: peak memory of three steps"
    found: dict[str, Any] = {}
    for examples in (16, 32, 64):
        peaks = []
        for kinds in ((), KINDS):
            call = [sys.executable, __file__, "--peak", name, str(examples), *kinds]
            done = subprocess.run(call, capture_output=True, text=True, check=True, env=environment)
            peaks.append(json.loads(done.stdout.splitlines()[-1]))
        (plain, _), (captured, sums) = peaks
        more = captured - plain
        numbers = (plain, captured, more, sums, more - sums)
        table.add_row(str(examples), *(f"{number:.0f}" for number in numbers))
        found[str(examples)] = {"plain": plain, "captured": captured, "sums": sums}
    CONSOLE.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fast", action="store_true", help="two rounds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--parts", nargs="+", choices=["step", "ways", "memory"])
    parser.add_argument("--chunk", type=int, default=8, help="examples at a time in vmap(grad)")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    parser.add_argument("--peak", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.peak:
        name, examples, *kinds = options.peak
        print(json.dumps(peak(name, int(examples), kinds)))
        return
    rounds = 2 if options.fast else options.rounds
    found: dict[str, Any] = {"machine": machine()}
    CONSOLE.print(found["machine"])
    parts: dict[str, Callable[[str], dict[str, Any]]] = {
        "step": partial(steps, rounds=rounds),
        "ways": partial(usual_ways, rounds=rounds, chunk=options.chunk),
        "memory": memory,
    }
    for part in options.parts or parts:
        for name in options.cases:
            if (part, name) == ("ways", "cnn-96"):
                continue  # the usual ways are compared on transformers
            found[f"{part}, {name}"] = parts[part](name)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
