"""What a user says, before the model reads it. Special tokens mark turns and images; in a text of one's own they are refused,
for the tokenizer would take them for those marks."""

import re
from itertools import groupby

from starflow2_jax.data.documents import Document, DocumentError, Said, Text, compose
from starflow2_jax.data.tokenizer import SPECIAL_TOKENS

IMAGE_TOKENS = SPECIAL_TOKENS[3:]  # where they stand in a document is said by its Image parts alone


def special_tokens(tokenizer) -> re.Pattern[str]:
    """Any of them, as a text would hold it."""
    named = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return re.compile("|".join(map(re.escape, sorted(named | {*SPECIAL_TOKENS}))))


def texts(document: Document) -> list[str]:
    """Neighbours as one text: a chat template joins them."""
    runs = groupby(document, lambda part: isinstance(part, Text))
    return ["".join(part.text for part in run) for words, run in runs if words]


def spoken(tokenizer, said: Said) -> Document:
    """A user's own words and images as a document. Raises DocumentError where a text holds a special token."""
    document, special = compose(said), special_tokens(tokenizer)
    if found := next(filter(None, map(special.search, texts(document))), None):
        raise DocumentError(f"a text holds {found[0]}, which is a mark of the model's own and no word; leave it out")
    return document


def require_no_image_tokens(document: Document) -> None:
    """Of any prompt, a chat template's included. Raises DocumentError: an image would begin or end that is none."""
    for part in document:
        for token in IMAGE_TOKENS:
            if isinstance(part, Text) and token in part.text:
                raise DocumentError(f"a text holds {token}, which marks an image; give images as parts of their own")


def is_empty(document: Document) -> bool:
    """Whether there is nothing in it to be read."""
    return not any(part.text if isinstance(part, Text) else True for part in document)
