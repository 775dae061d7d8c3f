"""What the comparison can be made on: for each modality its model, its data and their options."""

from collections.abc import Mapping
from typing import NamedTuple

from classifier import Classifier
from image_data import ImageData
from image_model import ImageClassifier
from labelled_data import LabelledData
from text_data import TextData
from text_model import TextClassifier


class Modality(NamedTuple):
    """The classes of one modality, and the options that its data takes beside the common ones."""

    model: type[Classifier]
    data: type[LabelledData]
    options: tuple[str, ...]


MODALITIES: Mapping[str, Modality] = {
    "text": Modality(TextClassifier, TextData, ("max_length",)),
    "image": Modality(ImageClassifier, ImageData, ("image_size",)),
}
