"""Penalties on what a row holds already, and the record of log-probabilities."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.sampling import rows, scoring
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import text_runs
from starflow2_jax.sampling.session import Session
from starflow2_jax.sampling.steps import penalise

VOCABULARY = tiny.CONFIG.vlm.vocabulary
PROMPT = [Text("draw an eight"), Image(tiny.pixels(1)), Text(" and then a seven")]
ALL = SampleOptions(temperature=0, max_tokens=12, max_images=0, logprobs=VOCABULARY - 1)


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC)


def answered(sampler: Sampler, options: SampleOptions) -> tuple[list[int], Session]:
    """The tokens of an answer, and the session that wrote it."""
    session = sampler.session(options, [3])
    session.read([PROMPT], room=session.to_write)
    session.write()
    return [token for run in text_runs(np.asarray(session.rows.tokens)[0]) for token in run], session


def test_repetition_is_transformers_over_prompt_and_answer(sampler):
    """At the next draw after an answer: the row has seen the texts of both, and nothing of the image."""
    answer, session = answered(sampler, ALL)
    held = sampler.encoder(PROMPT, closed=False)
    prompt = held["tokens"][held["modality"] == 1].tolist()
    seen = np.flatnonzero(np.asarray(session.rows.seen)[0])
    assert set(seen) == {*prompt, *answer} and len(prompt) == 10
    logits = np.random.default_rng(0).normal(size=(1, VOCABULARY)).astype(np.float32)
    for penalty in (0.7, 1.3):
        controls = rows.Controls.of([replace(ALL, repetition_penalty=penalty)], ())
        got = penalise(logits, session.rows.replace(controls=controls))
        want = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), torch.tensor(logits))
        np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)


@pytest.mark.parametrize("presence, frequency", [(0.5, 0.0), (0.0, 0.8), (1.0, -0.3)])
def test_presence_and_frequency_are_openais_over_the_answer(sampler, presence, frequency):
    """mu[j] - c[j] frequency - (c[j] > 0) presence, with the counts of what was written so far; the prompt does not
    count.

    The model's own log-probabilities, of all tokens, are the record's.
    """
    plain, _ = answered(sampler, ALL)
    answer, session = answered(sampler, replace(ALL, presence_penalty=presence, frequency_penalty=frequency))
    assert answer != plain
    likely, logprobs = np.asarray(session.rows.likely)[0], np.asarray(session.rows.logprobs)[0]
    forbidden = [getattr(sampler.ids, name) for name in ("image", "vision_end", "vision_start", "pad")]
    for i, token in enumerate(answer):
        own = np.full(VOCABULARY, -np.inf)
        own[likely[i, 1:]] = logprobs[i, 1:]
        own[token] = logprobs[i, 0]
        counts = np.bincount(answer[:i], minlength=VOCABULARY)
        own = own - counts * frequency - (counts > 0) * presence
        own[forbidden] = -np.inf
        assert np.argmax(own) == token


def test_penalties_are_each_rows_own(sampler):
    """Beside rows with other penalties, a row writes what it writes alone; drawn answers, too."""
    options = [SampleOptions(max_tokens=10, max_images=0, temperature=t, **p) for t, p in (
        (0, {}), (0, dict(repetition_penalty=1.8)), (1, dict(frequency_penalty=2.0)), (1, dict(presence_penalty=-2.0)),
    )]  # fmt: skip
    together = sampler.generate([PROMPT] * 4, options, seed=[5, 6, 7, 8])
    alone = [sampler.generate([PROMPT], o, seed=s)[0] for o, s in zip(options, (5, 6, 7, 8), strict=True)]
    assert together == alone and together[0] != together[1]


def test_logprobs_are_the_models(sampler, monkeypatch):
    """Their sum is the exact likelihood of the answer, whatever the temperature and the penalties that it was drawn
    with.
    """
    options = replace(ALL, temperature=1.4, top_k=50, frequency_penalty=1.0, logprobs=3)
    answer, session = answered(sampler, options)
    likely, logprobs = np.asarray(session.rows.likely)[0], np.asarray(session.rows.logprobs)[0]
    assert likely[: len(answer), 0].tolist() == answer and likely.shape == (32, 4)
    tokenize = sampler.encoder.tokenize  # the text of these tokens has other tokens
    monkeypatch.setattr(sampler.encoder, "tokenize", lambda text: answer if text == "the answer" else tokenize(text))
    [part] = scoring.score(sampler, [[*PROMPT, Text("the answer", predict=True), Text(".")]])[
        0
    ]  # its end does not count
    np.testing.assert_allclose(logprobs[: len(answer), 0].sum(), part.nats, rtol=1e-4)
    assert (np.diff(logprobs[: len(answer), 1:], axis=1) <= 0).all()


@pytest.mark.parametrize(
    "wrong",
    [dict(presence_penalty=2.5), dict(frequency_penalty=float("nan")), dict(repetition_penalty=0), dict(logprobs=-1)],
)
def test_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SampleOptions(**wrong)
