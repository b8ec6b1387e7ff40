"""A data set of TensorFlow Datasets that has been prepared as ArrayRecord files. TensorFlow is not needed."""

from dataclasses import dataclass
from typing import Any

from etils import epath

from starflow2_jax.data.documents import DocumentError, Draft
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.rows import RowOptions, from_row
from starflow2_jax.errors import UserError
from starflow2_jax.fields import option
from starflow2_jax.text_files import reason, shorten

SCHEME = "tfds://"


@dataclass(frozen=True, kw_only=True)
class TfdsOptions(RowOptions):
    """Columns, split and place of a data set."""

    split: str = option("the split, or a part of it such as train[:90%]", "train")
    data_dir: str = option('folder of the prepared data sets; "": the one that TFDS uses', "")


class TfdsDocuments(Source):
    """tfds://NAME, with a config and a version as TFDS writes them: tfds://NAME/CONFIG:VERSION.

    Raises UserError for a data set that has not been prepared with `file_format="array_record"`.
    """

    Options = TfdsOptions

    def __init__(self, path: str, options: TfdsOptions = TfdsOptions()):  # noqa: B008 - it is frozen
        import tensorflow_datasets as tfds  # takes seconds

        self.path, self.options = path, options
        try:
            builder: Any = tfds.builder(path.removeprefix(SCHEME), data_dir=options.data_dir or None)
            features: Any = builder.info.features
            image = {options.image: tfds.decode.SkipDecoding()} if options.image in features else {}
            self.rows: Any = builder.as_data_source(split=options.split, decoders=image)
        except (
            OSError,
            ValueError,
            AssertionError,
            NotImplementedError,
            tfds.core.DatasetNotFoundError,
        ) as error:
            raise UserError(
                f"{shorten(path)} cannot be opened ({reason(error)}); prepare it with TFDS, with file_format "
                f"array_record, and set data_dir to its folder"
            ) from None
        self.names = {
            column: feature.names
            for column, feature in features.items()
            if isinstance(feature, tfds.features.ClassLabel)
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Draft:
        try:
            row = {column: _plain(value) for column, value in self.rows[index].items()}
            return from_row(self.options.classes(row, self.names), self.options, epath.Path())
        except DocumentError as error:
            raise type(error)(f"{shorten(self.path)}, row {index}: {error}") from None


def _plain(value: Any) -> Any:
    """Numbers, texts and lists of a feature that TFDS gives as NumPy values or bytes."""
    return value.tolist() if hasattr(value, "tolist") else value
