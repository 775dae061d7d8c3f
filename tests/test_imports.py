"""The import graph: each noun is one module or folder of the package, and arrows go one way."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "mats_lightning"

# what each noun may import, in the order of the data's way; nothing stands above its imports
ALLOWED: dict[str, set[str]] = {
    "names": set(),
    "batches": set(),
    "broadcast": set(),
    "files": set(),
    "lazy": set(),
    "statistics": {"lazy", "names"},
    "verification": {"statistics"},
    "batch_sums": {"batches", "statistics", "verification"},
    "axes": {"statistics"},
    "capture": {"axes", "batch_sums", "batches", "broadcast", "statistics", "verification"},
    "sampled": {"batches", "capture"},
    "huggingface": set(),
    "sidecar": {"batches", "files", "lazy", "statistics"},
    "ranks": {"statistics"},
    "accumulation": {"ranks", "statistics"},
    "saving": {"sidecar", "statistics"},
    "training": set(),
    "cost": set(),
    "model_checks": {"batches"},
    "batch_capture": {
        "accumulation",
        "batches",
        "capture",
        "cost",
        "model_checks",
        "sampled",
        "statistics",
        "training",
    },
    "fit_capture": {
        "accumulation",
        "batch_capture",
        "batches",
        "model_checks",
        "names",
        "sampled",
        "sidecar",
        "statistics",
        "training",
    },
    "callback": {
        "batch_capture",
        "batches",
        "fit_capture",
        "ranks",
        "sampled",
        "saving",
        "statistics",
        "training",
    },
    "passes": {"huggingface", "names"},
    "distillation": {"batches", "passes", "sampled", "statistics"},
    "collect": {
        "batches",
        "capture",
        "huggingface",
        "model_checks",
        "names",
        "passes",
        "sampled",
        "sidecar",
        "statistics",
    },
    "replay": set(),
    "heads": {"batches", "names", "passes", "replay"},
    "operators": set(),
    "solvers": set(),
    "merging": {"lazy", "operators", "solvers", "statistics"},
    "adapter_files": {"names"},
    "checkpoints": {"adapter_files", "files", "lazy", "names"},
    "card": set(),
    "export": {"adapter_files", "card", "checkpoints", "names"},
    "lora": {"adapter_files", "checkpoints", "export", "lazy", "merging", "names"},
    "low_rank": {"lora", "merging", "operators", "statistics"},
    "tied": {"names"},
    "tasks": {"adapter_files", "checkpoints", "lazy", "names", "sidecar", "statistics", "tied"},
    "products": {"adapter_files", "lora", "low_rank", "merging", "statistics", "tasks"},
    "report": {"files"},
    "figures": {"files", "report"},
    "merged": {"lora", "merging", "products", "tasks"},
    "methods": {"merging", "statistics"},
    "joint": {"merged", "merging", "methods", "products", "statistics", "tasks", "tied"},
    "merge_folder": {
        "adapter_files",
        "card",
        "export",
        "joint",
        "merged",
        "names",
        "sidecar",
        "tasks",
    },
    "evaluation": {"passes", "report", "tasks"},
    "module": {
        "checkpoints",
        "evaluation",
        "joint",
        "lora",
        "merge_folder",
        "merged",
        "merging",
        "names",
        "tasks",
    },
    "measuring": {
        "checkpoints",
        "collect",
        "merging",
        "names",
        "passes",
        "sidecar",
        "statistics",
        "tasks",
        "tied",
    },
    "refresh_plan": {"heads", "merging", "sampled"},
    "rounds": {
        "checkpoints",
        "files",
        "merging",
        "sidecar",
        "statistics",
    },
    "joint_training": {"names", "passes", "tied"},
    "task_modules": {"passes", "tasks"},
    "judge": {"batches", "evaluation", "module", "passes", "task_modules"},
    "task_rounds": {
        "batches",
        "distillation",
        "heads",
        "joint_training",
        "measuring",
        "module",
        "names",
        "passes",
        "products",
        "refresh_plan",
        "rounds",
        "sampled",
        "sidecar",
        "statistics",
        "task_modules",
        "tasks",
    },
    "refresh": {
        "evaluation",
        "joint_training",
        "judge",
        "merging",
        "module",
        "names",
        "passes",
        "refresh_plan",
        "rounds",
        "sampled",
        "sidecar",
        "statistics",
        "task_rounds",
        "tasks",
    },
    "__init__": {
        "callback",
        "collect",
        "merging",
        "module",
        "refresh",
        "refresh_plan",
        "sidecar",
        "statistics",
        "tasks",
    },
    "__main__": set(),
}
KNOW_LIGHTNING = {
    "batch_capture",
    "callback",
    "collect",
    "evaluation",
    "fit_capture",
    "joint_training",
    "judge",
    "merge_folder",
    "model_checks",
    "module",
    "passes",
    "refresh",
    "refresh_plan",
    "saving",
    "task_modules",
    "task_rounds",
    "tasks",
    "training",
}
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}
NO_NAMES = {"utils", "util", "base", "helpers", "helper", "common", "misc", "managers", "factories"}


def imports_in(source: str) -> Iterator[str]:
    """Dotted names, wherever in the file they are imported; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def noun(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def imports_of(noun_: str) -> set[str]:
    files = [path for path in sources(PACKAGE) if noun(path) == noun_]
    return {name for path in files for name in imports_in(path.read_text(encoding="utf-8"))}


def own_imports(noun_: str) -> set[str]:
    """The nouns that a noun imports, itself left out; from `mats_lightning` itself: __init__."""
    found = set()
    for name in imports_of(noun_):
        package, _, rest = name.partition(".")
        if package == PACKAGE:
            first = rest.partition(".")[0]
            found.add(first if first in NOUNS else "__init__")
    return found - {noun_}


NOUNS = {noun(path) for path in sources(PACKAGE)}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import os.path, lightning.pytorch as pl
from mats_lightning import merging
from mats_lightning.statistics.record import BLOCK as B
def f():
    if TYPE_CHECKING:
        from recipes import merge
"""
    assert set(imports_in(source)) == {
        "os.path",
        "lightning.pytorch",
        "mats_lightning.merging",
        "mats_lightning.statistics.record.BLOCK",
        "recipes.merge",
    }
    with pytest.raises(AssertionError, match="relative"):
        set(imports_in("from .names import plain_name"))


def test_every_noun_has_its_place() -> None:
    assert set(ALLOWED) == NOUNS


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_go_one_way(name: str) -> None:
    assert own_imports(name) <= ALLOWED[name]


def test_what_is_allowed_has_no_circle() -> None:
    """Taking away what imports nothing that is left takes away everything."""
    left = dict(ALLOWED)
    while free := [name for name, imports in left.items() if not imports & set(left)]:
        for name in free:
            del left[name]
    assert not left


def imports_lightning(name: str) -> bool:
    return any(imported.partition(".")[0] in LIGHTNING for imported in imports_of(name))


def test_who_knows_lightning() -> None:
    assert {name for name in NOUNS if imports_lightning(name)} == KNOW_LIGHTNING


@pytest.mark.parametrize(
    "name",
    [
        "statistics",
        "capture",
        "ranks",
        "accumulation",
        "sidecar",
        "operators",
        "solvers",
        "merging",
        "checkpoints",
        "low_rank",
    ],
)
def test_who_knows_it_through_nobody_either(name: str) -> None:
    reached, new = set[str](), {name}
    while new:
        reached |= new
        new = {other for one in new for other in own_imports(one)} - reached
    assert not reached & (KNOW_LIGHTNING | {"__init__"})


def test_solvers_see_callables() -> None:
    assert not own_imports("solvers")
    assert not own_imports("operators")


def test_nobody_imports_the_recipes() -> None:
    programs = {path.stem for path in sources("recipes")} | {"recipes"}
    assert "merge" in programs
    for name in NOUNS:
        assert not {imported.partition(".")[0] for imported in imports_of(name)} & programs, name


def test_names_say_what_is_inside() -> None:
    files = [path for folder in (PACKAGE, "recipes", "tests") for path in sources(folder)]
    names = {part for path in files for part in path.relative_to(ROOT).with_suffix("").parts}
    assert "solvers" in names
    assert not names & NO_NAMES
