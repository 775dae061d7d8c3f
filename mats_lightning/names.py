"""Parameter names without the components that wrappers put into them."""

WRAPPERS = ("_orig_mod", "_forward_module")  # torch.compile, Lightning's strategies


def plain_name(name: str) -> str:
    """'backbone._orig_mod.layer.weight' -> 'backbone.layer.weight'."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
