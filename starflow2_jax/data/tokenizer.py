"""Tokenizers are `transformers` ones with Qwen2.5-VL's special tokens; this file names those tokens and loads the files."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip


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
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; give one of a Qwen2.5-VL checkpoint")
        return cls(*(vocabulary[n] for n in names))


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
    )


def load(folder: str | Path):
    """The tokenizer saved in `folder`. Raises ValueError where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no readable tokenizer ({str(error).splitlines()[0]})") from None
