"""A folder that `datasets.Dataset.save_to_disk` has written."""

from dataclasses import dataclass
from typing import Any

from etils import epath

from starflow2_jax.data.documents import DocumentError, Draft
from starflow2_jax.data.images import locate
from starflow2_jax.data.protocol import Source
from starflow2_jax.data.rows import RowOptions, from_row
from starflow2_jax.errors import UserError
from starflow2_jax.fields import option
from starflow2_jax.text_files import reason, shorten


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions(RowOptions):
    """Columns and split of a data set."""

    split: str = option("the split of a folder with several", "train")


class HuggingFaceDocuments(Source):
    """Rows of a data set, or of one split of a DatasetDict, with its pictures in its files or beside them.

    Raises UserError for a folder that `datasets` cannot load.
    """

    Options = HuggingFaceOptions

    def __init__(self, path: str, options: HuggingFaceOptions = HuggingFaceOptions()):  # noqa: B008 - it is frozen
        self.path, self.options = path, options
        self.folder = locate(path, epath.Path(), "folder")
        self._load()

    def _load(self) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError("this folder needs `datasets`; install it with `pip install 'starflow2_jax[hf]'`") from None
        try:
            loaded = datasets.load_from_disk(str(self.folder))
        except Exception as error:  # damaged files raise many kinds of exceptions
            raise UserError(f"{shorten(self.path)} cannot be loaded as a data set ({reason(error)})") from None
        if isinstance(loaded, datasets.DatasetDict):
            if self.options.split not in loaded:
                raise UserError(
                    f"{shorten(self.path)} has the splits {', '.join(map(str, loaded))}; set split to one of them"
                )
            loaded = loaded[self.options.split]
        self.names = {
            column: feature.names for column, feature in loaded.features.items() if hasattr(feature, "int2str")
        }
        self.rows = undecoded(loaded, datasets.Image)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "options": self.options, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._load()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Draft:
        try:
            return from_row(self.options.classes(self.rows[index], self.names), self.options, self.folder)
        except DocumentError as error:
            raise type(error)(f"{shorten(self.path)}, row {index}: {error}") from None


def undecoded(rows: Any, image: type) -> Any:
    """The rows with their pictures as files, not decoded: {"bytes", "path"}, also in lists of pictures."""
    for column, feature in rows.features.items():
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        if isinstance(feature, image):
            rows = rows.cast_column(column, image(decode=False))
        elif isinstance(inner, image):
            rows = rows.cast_column(column, type(feature)(image(decode=False)))
    return rows
