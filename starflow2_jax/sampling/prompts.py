"""A user's words and images as a document that the model may read.

Special tokens mark turns and images. A user's text must not hold them, because the tokenizer would take them for marks.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from starflow2_jax.data.documents import Document, DocumentError, Said, Text, compose
from starflow2_jax.data.tokenizer import SPECIAL_TOKENS

IMAGE_TOKENS = SPECIAL_TOKENS[3:]  # only Image parts of a document may put them into the sequence


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """A pattern that finds any special token of the tokenizer in a text."""
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(named | {*SPECIAL_TOKENS}))))


def texts(document: Sequence[object]) -> list[str]:
    """The texts of a document; neighbouring texts are joined, as a chat template joins them."""
    runs = groupby(document, lambda part: isinstance(part, Text))
    return ["".join(part.text for part in run if isinstance(part, Text)) for words, run in runs if words]


def spoken(tokenizer: Any, said: Said) -> Document:
    """A user's words and images as a document. Raises DocumentError if a text holds a special token."""
    document, special = compose(said), special_tokens(tokenizer)
    if found := next(filter(None, map(special.search, texts(document))), None):
        raise DocumentError(
            f"a text holds {found[0]}, which is a mark of the model's own (a special token); leave it out"
        )
    return document


def require_no_image_tokens(document: Document) -> None:
    """Raises DocumentError if a text of a prompt, also one made by a chat template, holds an image token."""
    for part in document:
        for token in IMAGE_TOKENS:
            if isinstance(part, Text) and token in part.text:
                raise DocumentError(f"a text holds {token}, which marks an image; give images as parts of their own")


def is_empty(document: Document) -> bool:
    """Whether a document has no image and no text but empty ones."""
    return not any(part.text if isinstance(part, Text) else True for part in document)
