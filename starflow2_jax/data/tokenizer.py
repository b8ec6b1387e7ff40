"""Tokenizers of `transformers`, chat templates, and the special tokens that every tokenizer must have.

If a VLM's tokenizer has other names for these tokens, the VLM's converter renames them in the tokenizer's files.
"""

import contextlib
import json
import shutil
import tempfile
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from starflow2_jax.data.documents import DocumentError, Image, StoredImage, Text
from starflow2_jax.text_files import read_json_file, reason

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"  # an image in the output of a chat template
PROCESSOR_FILES = ("processor_config.json", "chat_template.json")  # of `transformers` 4; the key is chat_template

END = "<|im_end|>"  # of a turn, and of a document
AnyImage = TypeVar("AnyImage", bound=Image | StoredImage)  # images that were read, or may not have been
Turn = tuple[str, Sequence[Text | AnyImage]]  # who speaks, and what was said


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens in a Sequence."""

    pad: int
    end: int  # of a document
    vision_start: int
    vision_end: int
    image: int

    @classmethod
    def of(cls, tokenizer: Any) -> "TokenIds":
        """The ids in a tokenizer's vocabulary. Raises ValueError if a token is missing."""
        names = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
        vocabulary = tokenizer.get_vocab()
        if missing := [n for n in names if n not in vocabulary]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; give the one of a converted VLM")
        return cls(*(vocabulary[n] for n in names))


def train(corpus: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens, special tokens included, trained on these texts."""
    most = (
        len(SPECIAL_TOKENS) + 256 + sum(len(text.encode()) for text in corpus)
    )  # the trainer reserves memory for `size`
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, most),
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


def load(folder: str | Path) -> Any:
    """The tokenizer that `transformers` saved in a folder, with the chat template of the tokenizer or of its processor.

    Raises ValueError if there is none that can be read.
    """
    try:
        with _without_marks(Path(folder)) as plain:
            tokenizer = AutoTokenizer.from_pretrained(str(plain), local_files_only=True)
    except Exception as error:  # damaged files raise many kinds of exceptions
        raise ValueError(reason(error)) from None
    for file in (Path(folder) / name for name in PROCESSOR_FILES):
        if not tokenizer.chat_template and file.is_file():
            values = read_json_file(file)
            tokenizer.chat_template = _by_name(values.get("chat_template") if isinstance(values, dict) else None)
    return tokenizer


@contextlib.contextmanager
def _without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or where files in it begin with a UTF-8 byte order mark, a temporary copy without these marks."""
    marked = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and _is_marked(path)]
    with tempfile.TemporaryDirectory() if marked else contextlib.nullcontext() as copy:
        if copy is not None:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            for path in marked:
                (Path(copy) / path).write_bytes((folder / path).read_bytes().removeprefix(BOM_UTF8))
        yield Path(copy or folder)


def _is_marked(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(BOM_UTF8)) == BOM_UTF8


def _by_name(template: Any) -> Any:
    """A processor's chat template. A list of several, [{"name": ..., "template": ...}, ...], becomes a dict by name."""
    if not isinstance(template, list):
        return template
    return {each["name"]: each["template"] for each in template if isinstance(each, dict) and len(each) == 2}


def chat(tokenizer: Any, turns: Sequence[Turn[AnyImage]], **variables: Any) -> list[Text | AnyImage]:
    """The document that the assistant's next answer continues: a conversation, by the tokenizer's own chat template.

    turns: pairs of a role ("system", "user" or "assistant") and the content of its turn. variables: further values that
        the template may read.

    Some templates take the content as a list of parts, others as one string; the form that the template handles is
    used. Raises DocumentError if there is no template, or it handles neither form.
    """
    if not tokenizer.chat_template:
        raise DocumentError("this model's tokenizer has no chat template; give plain text instead of a conversation")
    images = [part for _, said in turns for part in said if not isinstance(part, Text)]
    words = [part.text.strip() for _, said in turns for part in said if isinstance(part, Text)]
    rendered, fault = [], ""
    for content in (_as_list, _as_string):
        messages = [{"role": role, "content": content(said)} for role, said in turns]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        except Exception as error:  # a template is a program: it raises what it likes
            fault = fault or f"the tokenizer's chat template refuses this conversation: {reason(error)}"
            continue
        printed = any(form in text for message in messages for form in _printed(message["content"]))
        if text.count(IMAGE_MARK) == len(images) and not printed:
            rendered.append(text)
        else:
            fault = fault or f"the chat template must place each image once, as {IMAGE_MARK}, and no text may hold that"
    if not rendered:
        raise DocumentError(fault)
    complete = [text for text in rendered if all(word in text for word in words)]
    return unflat((complete or rendered)[0], images)


def conversation(tokenizer: Any, turns: Sequence[Turn[AnyImage]]) -> list[Text | AnyImage]:
    """A whole conversation, laid out as `chat` does turn by turn, so that training and chatting show the same tokens.

    The assistant's turns keep their own parts. Each is ended by END, which counts as a prediction; the last one's END
    comes when the document is encoded. What follows the last answer is left out. Raises DocumentError.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DocumentError(
            "the tokenizer has no chat template, which lays out conversations; begin from a converted vision-language "
            "model"
        )
    if not any(role == "assistant" for role, _ in turns):
        raise DocumentError("the conversation has no turn of the assistant, so there is nothing to learn from it")
    for part in (part for _, said in turns for part in said):
        if found := next((mark for mark in SPECIAL_TOKENS if isinstance(part, Text) and mark in part.text), None):
            raise DocumentError(f"a text of the conversation holds {found}, which only the chat template may write")
    document: list[Text | AnyImage] = []
    known = ""  # the document so far, as one text
    for i, (role, said) in enumerate(turns):
        if role != "assistant":
            continue
        text, images = flat(chat(tokenizer, turns[:i]))
        if not text.startswith(known):
            raise DocumentError("the chat template changes an earlier turn when another one comes")
        added = text.removeprefix(known)
        if document:
            document.append(Text(END, predict=True))
            added = added.removeprefix(END)
        document += unflat(added, images[known.count(IMAGE_MARK) :])
        document += said
        known = text + flat(said)[0]
    return document


def flat(document: Sequence[Text | AnyImage]) -> tuple[str, list[AnyImage]]:
    """A document as one text, with IMAGE_MARK for each image, and the images."""
    images = [part for part in document if not isinstance(part, Text)]
    return "".join(p.text if isinstance(p, Text) else IMAGE_MARK for p in document), images


def unflat(text: str, images: Sequence[AnyImage]) -> list[Text | AnyImage]:
    """The inverse of `flat`."""
    parts: list[Text | AnyImage] = []
    first, *texts = text.split(IMAGE_MARK)
    for image, after in zip(images, texts, strict=True):
        parts += [image, Text(after)]
    return [part for part in [Text(first), *parts] if not isinstance(part, Text) or part.text]


def _printed(content: list | str) -> list[str]:
    """How a template that expects a string prints a list of parts."""
    if not content or isinstance(content, str):
        return []
    return [str(content), json.dumps(content), json.dumps(content, ensure_ascii=False)]


def _as_list(said: Sequence[Text | Image | StoredImage]) -> list[dict[str, str]]:
    return [{"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in said]


def _as_string(said: Sequence[Text | Image | StoredImage]) -> str:
    return flat(said)[0]
