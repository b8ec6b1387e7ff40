"""Log-probabilities of text tokens, in OpenAI's form."""

from functools import lru_cache
from typing import Any

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level vocabularies
LEAST = -9999.0  # OpenAI's value for tokens of probability 0; JSON has no infinity


class Spelling:
    """The text and the bytes of each token of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.special = tokenizer, frozenset(tokenizer.all_special_ids)
        self.spelled = lru_cache(2**16)(self._spelled)

    def _spelled(self, token: int) -> tuple[str, list[int]]:
        written = self.tokenizer.convert_ids_to_tokens(token) or ""  # a vocabulary may have spare rows at its end
        raw = bytes(BYTES[c] for c in written) if all(c in BYTES for c in written) else written.encode()
        return raw.decode(errors="replace"), list(raw)

    def entries(self, likely: np.ndarray, logprobs: np.ndarray, top: int) -> list[dict]:
        """An entry of OpenAI's log-probabilities for each token that is not a special token.

        likely, logprobs: (n, W), see `Rows.likely`. top: number of likely tokens to list in each entry, at
        most W - 1.
        """
        return [
            {
                **self._entry(ids[0], values[0]),
                "top_logprobs": [self._entry(*pair) for pair in self._pairs(ids, values, top)],
            }
            for ids, values in zip(likely, logprobs, strict=True)
            if ids[0] not in self.special
        ]

    def _pairs(self, ids: np.ndarray, values: np.ndarray, top: int) -> list[tuple[int, float]]:
        return list(zip(ids[1 : 1 + top], values[1 : 1 + top], strict=True))

    def _entry(self, token: int, logprob: float) -> dict:
        text, raw = self.spelled(int(token))
        return {"token": text, "logprob": max(float(logprob), LEAST), "bytes": raw}
