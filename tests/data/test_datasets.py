"""Data sets that `datasets` and TensorFlow Datasets have written are read back equal, also in another process."""

import io
import sys

import cloudpickle
import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds
from picture_files import pixels, png
from refused import refused

from starflow2_jax.data import sources
from starflow2_jax.data.documents import DocumentError, Speaker, Text, Wordings
from starflow2_jax.data.huggingface import HuggingFaceDocuments, HuggingFaceOptions
from starflow2_jax.data.images import ImageReader
from starflow2_jax.data.tfds import TfdsDocuments, TfdsOptions
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.table import open_benchmark

COUNT, CLASSES = 5, ["zebra", "hot_dog"]


def same(draft, captions: tuple[str, ...], seed: int) -> bool:
    words, image = draft
    read = ImageReader(3)(image).pixels
    return words == Wordings(captions) and image.generate and np.allclose(read, pixels(seed), atol=1e-6)


def everywhere(source):
    """A source, and what another process gets of it."""
    return source, cloudpickle.loads(cloudpickle.dumps(source))


def captioned() -> datasets.Dataset:
    features = {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "more": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=CLASSES),
    }
    rows = {
        "image": [{"bytes": png(i), "path": None} for i in range(COUNT)],
        "caption": [f"animal {i}" for i in range(COUNT)],
        "more": [[f"one {i}", f"two {i}"] for i in range(COUNT)],
        "label": [i % 2 for i in range(COUNT)],
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def test_a_hugging_face_folder(tmp_path):
    captioned().save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=captioned(), test=captioned().select([3])).save_to_disk(tmp_path / "two")
    for folder in ("one", "two"):
        assert sources.find(str(tmp_path / folder)) is HuggingFaceDocuments
    options = HuggingFaceOptions(captions=("caption", "more", "label"), template="a photo of a {}")
    for source in everywhere(HuggingFaceDocuments(str(tmp_path / "one"), options)):
        assert len(source) == COUNT
        for i in range(COUNT):
            name = ("zebra", "hot dog")[i % 2]
            assert same(source[i], (f"animal {i}", f"one {i}", f"two {i}", f"a photo of a {name}"), i)
    test = HuggingFaceDocuments(str(tmp_path / "two"), HuggingFaceOptions(split="test"))
    assert len(test) == 1 and same(test[0], ("animal 3",), 3)
    refused(
        UserError, HuggingFaceDocuments, str(tmp_path / "two"), HuggingFaceOptions(split="val"), saying=("train, test",)
    )
    refused(UserError, HuggingFaceDocuments, str(tmp_path), saying=("cannot be loaded",))
    wrong = HuggingFaceDocuments(str(tmp_path / "one"), HuggingFaceOptions(image="picture"))
    refused(DocumentError, wrong.__getitem__, 1, saying=("row 1", "no picture 'picture'"))


def test_conversations_of_a_hugging_face_folder(tmp_path):
    turn = {"from": datasets.Value("string"), "value": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "conversations": datasets.List(turn)})
    said = [{"from": "human", "value": "<image>\n<image>\nsame?"}, {"from": "gpt", "value": "no"}]
    pictures = [{"bytes": png(i), "path": None} for i in range(2)]
    rows = datasets.Dataset.from_dict({"images": [pictures], "conversations": [said]}, features=features)
    rows.save_to_disk(tmp_path / "talk")
    draft = HuggingFaceDocuments(str(tmp_path / "talk"))[0]
    assert [draft[0], *draft[3:]] == [Speaker("user"), Text("same?"), Speaker("assistant"), Text("no", predict=True)]
    for i in range(2):
        np.testing.assert_allclose(ImageReader(3)(draft[1 + i]).pixels, pixels(i), atol=1e-6)


class Animals(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=CLASSES),
            "captions": tfds.features.Sequence(tfds.features.Text()),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            yield i, {"image": io.BytesIO(png(i)), "label": i % 2, "captions": [f"ß {i}", f"two {i}"]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    Animals(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_a_prepared_data_set_of_tfds(prepared):
    assert sources.find("tfds://animals") is TfdsDocuments
    options = TfdsOptions(data_dir=prepared, captions=("captions", "label"), template="a {}")
    found = {}
    for source in everywhere(TfdsDocuments("tfds://animals:1.0.0", options)):
        assert len(source) == COUNT
        for i in range(COUNT):  # TFDS has shuffled them
            number = int(source[i][0].texts[0].removeprefix("ß "))
            found[number] = i
            assert same(
                source[i], (f"ß {number}", f"two {number}", f"a {CLASSES[number % 2].replace('_', ' ')}"), number
            )
    assert sorted(found) == list(range(COUNT))
    assert len(TfdsDocuments("tfds://animals", TfdsOptions(data_dir=prepared, split="train[:40%]"))) == 2
    assert "tensorflow" not in sys.modules


def test_data_sets_that_are_not_there(prepared, tmp_path):
    for path, options in (
        ("tfds://zebras", TfdsOptions(data_dir=prepared)),
        ("tfds://animals", TfdsOptions(data_dir=str(tmp_path))),
        ("tfds://animals", TfdsOptions(data_dir=prepared, split="test")),
    ):
        refused(UserError, TfdsDocuments, path, options, saying=(path, "cannot be opened", "data_dir"))
    lacking = TfdsDocuments("tfds://animals", TfdsOptions(data_dir=prepared, captions=("text",)))
    refused(DocumentError, lacking.__getitem__, 0, saying=("animals, row 0", "no caption 'text'"))


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"[" * 100_000, b"9" * 5000, b"\xff\xfe"])
@pytest.mark.parametrize("name", ["dataset_info.json", "state.json"])
def test_a_damaged_folder_of_datasets_is_refused(tmp_path, name, content):
    captioned().save_to_disk(str(tmp_path / "data"))
    (tmp_path / "data" / name).write_bytes(content)
    refused(UserError, HuggingFaceDocuments, str(tmp_path / "data"), saying=("data cannot be loaded as a data set",))
    refused(UserError, open_benchmark, "mme", str(tmp_path / "data"), None, None, saying=("cannot be loaded",))
