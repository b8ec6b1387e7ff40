"""The tokenizer is one of `transformers` whose vocabulary has the special tokens that this file names.

A converter of a VLM whose tokenizer names these tokens otherwise renames them in the tokenizer's files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from starflow2_jax.data.documents import Document, DocumentError, Image, Text

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"  # as a chat template writes it


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens that the sequence needs."""

    pad: int
    end: int  # of a document
    vision_start: int
    vision_end: int
    image: int

    @classmethod
    def of(cls, tokenizer) -> "TokenIds":
        names = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
        vocabulary = tokenizer.get_vocab()
        if missing := [n for n in names if n not in vocabulary]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; give the one of a converted VLM")
        return cls(*(vocabulary[n] for n in names))


def train(corpus: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, the special ones included, as `transformers` has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )


def chat(tokenizer, turns: list[tuple[str, Document]]) -> Document:
    """A conversation -> the document that the assistant's next answer continues, by the tokenizer's own chat template.

    turns: role ("system", "user", "assistant") and what it said. Raises DocumentError where the tokenizer has no template,
    or the template fails on the conversation.
    """
    if not tokenizer.chat_template:
        raise DocumentError("this model's tokenizer has no chat template; give the prompt as it is")
    images = [part for _, said in turns for part in said if isinstance(part, Image)]
    text = _rendered(tokenizer, turns, _content_form(tokenizer, bool(images)))
    if text.count(IMAGE_MARK) != len(images):
        raise DocumentError(f"the chat template must place each image once, as {IMAGE_MARK}, and no text may hold that")
    return unflat(text, images)


def _rendered(tokenizer, turns: list[tuple[str, Document]], content: Callable[[Document], object]) -> str:
    """The template's text of a conversation. Raises DocumentError for any error in the template."""
    messages = [{"role": role, "content": content(said)} for role, said in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program, which can fail in any way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DocumentError(f"the tokenizer's chat template refuses this conversation: {reason}") from None


def _content_form(tokenizer, with_images: bool) -> Callable[[Document], object]:
    """The form of a message's content that the template was written for: `_as_list`, or `_as_string` with image marks.

    Each form is tried on one short message. A template that takes strings prints a list as Python does, without marks.
    """
    word = "sevenfold"
    probe = [Image(np.zeros((1, 1, 1), np.float32)), Text(word)] if with_images else [Text(word)]
    for form in (_as_list, _as_string):
        try:
            text = _rendered(tokenizer, [("user", probe)], form)
        except DocumentError:
            continue
        if (
            word in text
            and text.count(IMAGE_MARK) == with_images
            and repr(word) not in text
            and f'"{word}"' not in text
        ):
            return form
    return _as_list


def _as_list(document: Document) -> list[dict[str, str]]:
    return [{"type": "image"} if isinstance(p, Image) else {"type": "text", "text": p.text} for p in document]


def _as_string(document: Document) -> str:
    return flat(document)[0]


def flat(document: Document) -> tuple[str, list[Image]]:
    """A document as text with a mark for each image, and the images."""
    images = [part for part in document if isinstance(part, Image)]
    return "".join(p.text if isinstance(p, Text) else IMAGE_MARK for p in document), images


def unflat(text: str, images: list[Image]) -> Document:
    """The inverse of `flat`."""
    parts: Document = []
    first, *texts = text.split(IMAGE_MARK)
    for image, after in zip(images, texts, strict=True):
        parts += [image, Text(after)]
    return [part for part in [Text(first), *parts] if isinstance(part, Image) or part.text]
