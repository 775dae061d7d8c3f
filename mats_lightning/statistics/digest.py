"""Digests of weights: whether statistics were taken at them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def digest(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """name -> SHA-256 of the tensor's dtype, shape and bytes."""
    return {name: digest_of(tensor) for name, tensor in weights.items()}


def digest_of(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    sha = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def has_digest(tensor: Tensor, expected: str) -> bool:
    """Whether it is that of the tensor, or of what a wider dtype was made of."""
    if digest_of(tensor) == expected:
        return True
    narrower = [dtype for dtype in DTYPES if dtype.itemsize < tensor.dtype.itemsize]
    return tensor.is_floating_point() and any(
        digest_of(tensor.to(dtype)) == expected for dtype in narrower
    )
