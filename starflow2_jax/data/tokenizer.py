"""The tokenizer is one of `transformers` whose vocabulary has the special tokens that this file names.

A converter of a VLM whose tokenizer names these tokens otherwise renames them in the tokenizer's files.
"""

from dataclasses import dataclass

from jinja2 import TemplateError
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

    turns: role ("system", "user", "assistant") and what it said. Raises DocumentError where there is no such template, or
    it refuses them.
    """
    if not tokenizer.chat_template:
        raise DocumentError("this model's tokenizer has no chat template; give the prompt as it is")
    images = [part for _, said in turns for part in said if isinstance(part, Image)]
    messages = [{"role": role, "content": [_content(part) for part in said]} for role, said in turns]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise DocumentError(f"the tokenizer's chat template refuses this conversation: {error}") from None
    if text.count(IMAGE_MARK) != len(images):
        raise DocumentError(f"the chat template must place each image once, as {IMAGE_MARK}, and no text may hold that")
    return unflat(text, images)


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


def _content(part: Text | Image) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, Image) else {"type": "text", "text": part.text}
