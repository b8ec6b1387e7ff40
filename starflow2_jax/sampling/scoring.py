"""Exact log-likelihoods of the parts of documents, each given all parts before it, and rankings of captions."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.codecs.protocol import level_bits
from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.data.pipeline import collate
from starflow2_jax.models.likelihood import CHUNK, image_noise, text_nll
from starflow2_jax.models.pretzel import Pretzel, apply
from starflow2_jax.parallel import sharding
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import require_no_image_tokens
from starflow2_jax.sampling.rows import bucket, power
from starflow2_jax.sequence import Sequence, Shape

BATCH = 16  # documents that run at once


@dataclass(frozen=True, eq=False)
class Score:
    """The log-likelihood of one part of a document given all parts before it, in nats.

    For a text, `tokens` (T,) holds log p of each token. As in training, the <|im_end|> after a document's last part
    counts, and a document's first token does not, because nothing predicts it.

    For an image, `tokens` (N,) holds one entry for each image token in raster order: log N(z; 0, 1) plus the
    log-determinants of the deep flow, the shallow flow and the codec, summed over the token's D dimensions. The sum of
    all entries is the log-density of the whole image. The shallow flow mixes the tokens, so a single entry is a
    conditional density of u_n, not of that token's pixels.
    """

    part: int  # index in the document
    tokens: np.ndarray  # (T,) nats
    dims: int = 0  # dimensions of an image's density; 0 for a text
    level_bits: float = 0.0  # -log2 of the width of one level of the data

    @property
    def nats(self) -> float:
        """log p of the part. For an image it is a log-density of pixels in [-1, 1], which can be above 0.

        If the codec is no bijection (its `log_volume` is None), it is a log-density of the latents.
        """
        return float(np.sum(self.tokens, dtype=np.float64))

    @property
    def nats_per_dim(self) -> float:
        """Negative log-likelihood of an image per dimension: its training loss + 0.5 ln 2 pi - codec.log_volume."""
        return -self.nats / self.dims

    @property
    def bits_per_dim(self) -> float:
        """(nats_per_dim + ln 128) / ln 2 for pixels: from the density times the width 1/128 of one of 256 levels.

        If uniform noise of one level was added to 8-bit pixels, it bounds their code length. Images without 8-bit
        levels, such as latents from a file, have nats_per_dim / ln 2.
        """
        return self.nats_per_dim / math.log(2) + self.level_bits

    @property
    def perplexity(self) -> float:
        """exp of the mean of -log p over the tokens of a text."""
        return math.exp(-self.nats / len(self.tokens))

    def summary(self) -> dict:
        """The part's index, its likelihoods in every unit, and `tokens`, as JSON values."""
        names = ("nats", "nats_per_dim", "bits_per_dim") if self.dims else ("nats", "perplexity")
        return {"part": self.part, **{n: getattr(self, n) for n in names}, "tokens": self.tokens.tolist()}


def score(sampler: Sampler, documents: list[Document], batch_size: int = BATCH) -> list[list[Score]]:
    """The Scores of each document, one for each Image(generate=True) and Text(predict=True) in their order.

    The scores of a document do not depend on the other documents. An image is scored as it is; a model that was trained
    on images with noise expects noise, which the caller adds. Raises DocumentError, which names the document by its
    index, if no part of it counts or the model has no room for it.
    """
    features = []
    for number, document in enumerate(documents):
        try:
            features.append(f := layout(sampler, document))
        except DocumentError as error:
            raise DocumentError(f"document {number}: {error}", number) from None
        if not (f["image_weight"].any() or f["text_weight"][1:].any()):
            raise DocumentError(
                f'document {number}: nothing in it counts; mark an image with "generate" or a text with "predict"',
                number,
            )
    text = any(isinstance(part, Text) and part.predict for document in documents for part in document)
    scores: list[list[Score]] = [[] for _ in documents]
    for rows, batch in batches(sampler, features, ("the score", text), batch_size):
        z, logdet, words = sampler.run(_measure, sampler.model, sampler.skips, text, sampler.params, batch)
        density = np.asarray(logdet - 0.5 * z**2).sum(-1) + z.shape[-1] * (
            (sampler.codec.log_volume or 0.0) - 0.5 * math.log(2 * math.pi)
        )
        words = np.asarray(words)
        for row, i in enumerate(rows):
            scores[i] = _parts(sampler, documents[i], features[i]["part"], density[row], words[row])
    return scores


def illustrate(caption: str, image: np.ndarray) -> Document:
    """A document in which the caption comes first and the image is scored."""
    return [Text(caption), Image(image, generate=True)]


def describe(caption: str, image: np.ndarray) -> Document:
    """A document in which the image comes first and the caption is scored."""
    return [Image(image), Text(caption, predict=True)]


def rank(
    sampler: Sampler,
    image: np.ndarray,
    captions: list[str],
    prior: bool = True,
    make_document: Callable[[str, np.ndarray], Document] = illustrate,
    batch_size: int = BATCH,
) -> list[tuple[str, float]]:
    """The captions and their scores in nats, best first.

    make_document(caption, image) makes the document of a caption, with parts that are marked `generate` or `predict`.
    The score is the sum of their log-likelihoods. Give a function of your own that words the document as the training
    data did. `illustrate` asks which caption explains the image best: it gives log p(image | caption), and with `prior`
    log p(image | caption) - log p(image | no caption). The prior is the same for all captions, so it does not change
    their order; a score above 0 then means that the caption makes the image more likely. `describe`, to be used without
    `prior`, asks which caption the model would write: log p(caption | image), which favours short and common captions.
    Raises DocumentError.
    """
    if not captions:
        raise DocumentError("there are no captions to rank; give at least one")
    documents = [make_document(caption, image) for caption in captions]
    if prior:
        documents.append(make_document("", image))
        if any(isinstance(part, Text) and part.predict for part in documents[-1]):
            raise DocumentError(
                "the prior is the likelihood of an image, but make_document marks a text `predict`; set prior=False"
            )
    totals = [sum(part.nats for part in parts) for parts in score(sampler, documents, batch_size)]
    base = totals[-1] if prior else 0.0
    pairs = [(caption, total - base) for caption, total in zip(captions, totals, strict=False)]
    return sorted(pairs, key=lambda pair: -pair[1])


def layout(sampler: Sampler, document: Document, closed: bool = True) -> dict[str, np.ndarray]:
    """The encoder's features of a document. Raises DocumentError if it is too long, or if a text holds image tokens."""
    require_no_image_tokens(document)
    features = sampler.encoder(document, closed)
    if (length := len(features["tokens"])) > sampler.max_positions:
        raise DocumentError(
            f"a document of {length} positions exceeds the {sampler.max_positions} that the model was made for; "
            f"shorten it"
        )
    return features


def batches(
    sampler: Sampler, features: list[dict], program: tuple, size: int = BATCH
) -> Iterator[tuple[list[int], Sequence]]:
    """Batches of documents of similar length: their indices, and a padded Sequence on the mesh with a row for each.

    Further rows fill up the mesh. `program`: key of the program that takes the batches, its name for the log first.
    """
    order = sorted(range(len(features)), key=lambda i: len(features[i]["tokens"]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        count = power(len(rows))  # so that few shapes are compiled
        count += -count % sharding.row_shards(sampler.mesh)
        given = [features[i] for i in rows + rows[-1:] * (count - len(rows))]
        patches = max(len(f.get("patches", ())) for f in given)
        shape = Shape(
            len(given),
            bucket(max(len(f["tokens"]) for f in given)),
            power(max(len(f["latents"]) for f in given)),
            bucket(patches) if patches else 0,
        )
        sampler.uses((*program, shape), f"{program[0]} of {shape.rows} rows of {shape.length} positions")
        yield rows, jax.device_put(collate(given, shape), sharding.batch_sharding(sampler.mesh))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(
    model: Pretzel, skips: bool, text: bool, params: dict, batch: Sequence
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """z and logdet (B, M, N, D) of the images, and log p (B, S) of the token after each position, 0 without `text`."""
    output = apply(model, params, batch, skips=skips)
    words = jnp.zeros(batch.tokens.shape)
    if text:
        head = apply(model, params, method=Pretzel.text_head)
        words = -text_nll(output.text, head, batch.text_targets()[0], CHUNK)
    return *image_noise(output, batch), words


def _parts(
    sampler: Sampler, document: Document, owner: np.ndarray, images: np.ndarray, words: np.ndarray
) -> list[Score]:
    """The scores of a document's parts. owner (S,): the part of each position; images (M, N), words (S,): log p."""
    found: list[Score] = []
    flow = iter(images)
    bits = level_bits(sampler.codec)
    for i, part in enumerate(document):
        if isinstance(part, Text):
            at = np.flatnonzero(owner == i)
            if part.predict and at.max(initial=0) > 0:
                found.append(Score(i, words[at[at > 0] - 1]))
        elif part.via == "flow":
            tokens = next(flow)
            if part.generate:
                found.append(Score(i, tokens, tokens.size * sampler.model.cfg.channels, bits))
    return found
