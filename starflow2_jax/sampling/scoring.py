"""Exact log-likelihoods of the parts of documents, each given all before it, and the ranking of captions by them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from starflow2_jax.data.documents import Document, DocumentError, Image, Text
from starflow2_jax.data.pipeline import collate
from starflow2_jax.models.likelihood import CHUNK, image_noise, text_nll
from starflow2_jax.models.pretzel import Pretzel
from starflow2_jax.parallel import sharding
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.prompts import require_no_image_tokens
from starflow2_jax.sampling.rows import bucket, power
from starflow2_jax.sequence import Sequence, Shape

BATCH = 16  # documents that are read at once
PIXEL_BITS = 7.0  # log2 of 128: what a level of 8 bits in [-1, 1] is narrower than 1


@dataclass(frozen=True, eq=False)
class Score:
    """The log-likelihood of one part of a document given all before it, in nats.

    `tokens` (T,) is a text's log p of each of its tokens, <|im_end|> behind the last part of a document included, as in
    training (nothing predicts the first token of a document: it is not in it). Of an image it is, token by token in
    raster order, log N(z; 0, 1) and the log-determinants of the deep flow, the shallow flow and the codec, each summed
    over the token's D dimensions. Their sum is the density of the whole image, but the shallow flow mixes the tokens: one
    entry says how much of it falls to that token, and is a conditional density of u_n only, not of the token's pixels.
    """

    part: int  # index in the document
    tokens: np.ndarray  # (T,) nats
    dims: int = 0  # of an image: how many numbers the density is of; 0: a text
    level_bits: float = 0.0  # log2 of how much narrower than 1 the levels of the data are

    @property
    def nats(self) -> float:
        """log p of the part. Of an image: a density of what the codec took, so pixels in [-1, 1]; it can be above 0.

        Where the codec is no bijection (`log_volume` is None): a density of the latents that it made.
        """
        return float(np.sum(self.tokens, dtype=np.float64))

    @property
    def nats_per_dim(self) -> float:
        """Negative log-likelihood of an image, per dimension: the training loss on it + 0.5 ln 2 pi - codec.log_volume."""
        return -self.nats / self.dims

    @property
    def bits_per_dim(self) -> float:
        """(nats_per_dim + ln 128) / ln 2 for pixels: the density times the width 1/128 of one of 256 levels in [-1, 1].

        It bounds the code length of 8-bit pixels where uniform noise of one level has been added to them. Latents that no
        pixels were encoded into have no levels: their nats_per_dim / ln 2.
        """
        return self.nats_per_dim / math.log(2) + self.level_bits

    @property
    def perplexity(self) -> float:
        """Of a text: exp of the mean of -log p over its tokens."""
        return math.exp(-self.nats / len(self.tokens))

    def summary(self) -> dict:
        """All of it as JSON values."""
        names = ("nats", "nats_per_dim", "bits_per_dim") if self.dims else ("nats", "perplexity")
        return {"part": self.part, **{n: getattr(self, n) for n in names}, "tokens": self.tokens.tolist()}


def score(sampler: Sampler, documents: list[Document], batch_size: int = BATCH) -> list[list[Score]]:
    """Of each document, the Score of each part that counts: Image(generate=True) and Text(predict=True), in their order.

    A document's scores do not depend on the others. An image is scored as it is: what a model trained with noise was
    fitted to is the image plus noise, which the caller adds. Raises DocumentError where nothing counts or nothing fits.
    """
    features = []
    for number, document in enumerate(documents):
        try:
            features.append(f := layout(sampler, document))
        except DocumentError as error:
            raise DocumentError(f"document {number}: {error}") from None
        if not (f["image_weight"].any() or f["text_weight"][1:].any()):
            raise DocumentError(
                f'document {number}: nothing in it counts; mark an image with "generate" or a text with "predict"'
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
    """A caption, then the image that counts."""
    return [Text(caption), Image(image, generate=True)]


def describe(caption: str, image: np.ndarray) -> Document:
    """The image, then the caption that counts."""
    return [Image(image), Text(caption, predict=True)]


def rank(
    sampler: Sampler,
    image: np.ndarray,
    captions: list[str],
    prior: bool = True,
    make_document: Callable[[str, np.ndarray], Document] = illustrate,
    batch_size: int = BATCH,
) -> list[tuple[str, float]]:
    """The captions and their scores in nats, best first: what counts in make_document(caption, image), summed.

    `illustrate` asks which caption explains the image best: log p(image | caption), less log p(image | no caption) with
    `prior`. The latter is one number for all, so the order stays (that of p(caption | image) where captions are equally
    probable beforehand); it makes the score the evidence for a caption, above 0 where it helps. `describe` asks which
    caption the model would write: log p(caption | image), in favour of short and common ones, without `prior`. Give a
    template of your own for the wording that the model was trained on. Raises DocumentError.
    """
    if not captions:
        raise DocumentError("there are no captions to rank")
    documents = [make_document(caption, image) for caption in captions]
    if prior:
        documents.append(make_document("", image))
        if any(isinstance(part, Text) and part.predict for part in documents[-1]):
            raise DocumentError("the prior is that of an image, but here it is text that counts; rank without prior")
    totals = [sum(part.nats for part in parts) for parts in score(sampler, documents, batch_size)]
    base = totals[-1] if prior else 0.0
    pairs = [(caption, total - base) for caption, total in zip(captions, totals, strict=False)]
    return sorted(pairs, key=lambda pair: -pair[1])


def layout(sampler: Sampler, document: Document, closed: bool = True) -> dict[str, np.ndarray]:
    """The features of one document. Raises DocumentError where the model has no room for it, or a text holds image tokens."""
    require_no_image_tokens(document)
    features = sampler.encoder(document, closed)
    if (length := len(features["tokens"])) > sampler.max_positions:
        raise DocumentError(
            f"a document of {length} positions exceeds the {sampler.max_positions} that the model was made for; shorten it"
        )
    return features


def batches(
    sampler: Sampler, features: list[dict], program: tuple, size: int = BATCH
) -> Iterator[tuple[list[int], Sequence]]:
    """Documents of similar length together, padded, on the sampler's mesh: their indices, and one row for each.

    Rows behind those only fill up the mesh. `program`: a name first, what they are for and what it is specialised to.
    """
    order = sorted(range(len(features)), key=lambda i: len(features[i]["tokens"]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        count = power(len(rows))  # few shapes are compiled, as in sampling
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
def _measure(model: Pretzel, skips: bool, text: bool, params, batch: Sequence):
    """z and logdet (B, M, N, D) of the images; log p (B, S) of the token after each position, 0 without `text`."""
    output = model.apply({"params": params}, batch, skips=skips)
    words = jnp.zeros(batch.tokens.shape)
    if text:
        head = model.apply({"params": params}, method=Pretzel.text_head)
        words = -text_nll(output.text, head, batch.text_targets()[0], CHUNK)
    return *image_noise(output, batch), words


def _parts(sampler, document: Document, owner: np.ndarray, images: np.ndarray, words: np.ndarray) -> list[Score]:
    """owner (S,): the part of each position; images (M, N) and words (S,): log-likelihoods."""
    found: list[Score] = []
    flow = iter(images)
    levels = sampler.codec.is_pixels and sampler.codec.log_volume is not None  # the density is one of 8-bit pixels
    bits = PIXEL_BITS if levels else 0.0
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
