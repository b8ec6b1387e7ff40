"""What a stage will see of its data: numbers for each source, and a page of documents as the model reads them."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from itertools import islice
from typing import Any

import numpy as np

from starflow2_jax import sequence
from starflow2_jax.codecs.protocol import Codec
from starflow2_jax.data.documents import Image
from starflow2_jax.data.mixture import GroupRows, Loaded, Stream, loaded
from starflow2_jax.data.pipeline import RowEncoder
from starflow2_jax.evaluation.report import html_page, image_element
from starflow2_jax.stages import Stage

WHOLE = 2**31  # sources with more documents than this make them up and have no end
DRAWN = 40  # documents of each source that the page shows at most


def look(streams: Sequence[Stream], encode: RowEncoder, count: int) -> list[Loaded]:
    """The first `count` documents of a mixture, in the order in which a run with one group of rows reads them."""
    return list(islice(iter(loaded(streams, encode)), count))


def summary(streams: Sequence[Stream], found: Sequence[Loaded], encode: RowEncoder) -> dict[str, Any]:
    """Numbers about documents that `look` gave: of each source, and of the rows that they are packed into."""
    rows = GroupRows(streams, encode, 0, 1, 0)
    blocks = [next(rows).rows]
    while (read := sum(_documents(block) for block in blocks)) and read < len(found) and len(blocks) < len(found):
        blocks.append(next(rows).rows)
    filled = sum(int(np.sum(block.modality != sequence.PAD)) for block in blocks)
    total = sum(stream.weight for stream in streams)
    return {
        "read": len(found),
        "sources": {
            stream.name: _of_source(stream, [each for each in found if each.source == stream.name], total)
            for stream in streams
        },
        "rows": {
            "filled": filled / sum(block.modality.size for block in blocks),
            "documents": sum(_documents(block) for block in blocks) / sum(len(block.tokens) for block in blocks),
        },
    }


def _documents(block: sequence.Sequence) -> int:
    """Documents in packed rows; the segments of each row count them from 1."""
    return int(np.max(block.segments, axis=1).sum())


def _of_source(stream: Stream, found: Sequence[Loaded], total: float) -> dict[str, Any]:
    features = [each.features for each in found if each.features is not None]
    skipped = Counter(each.kind for each in found if each.features is None)
    first = {each.kind: each.message for each in reversed(found) if each.features is None}
    lengths = [len(f["tokens"]) for f in features] or [0]
    sound = max(len(features), 1)
    return {
        "documents": len(stream.source) if len(stream.source) < WHOLE else "endless",
        "weight": stream.weight / total,
        "read": len(found),
        "positions": {
            "least": min(lengths),
            "median": float(np.median(lengths)),
            "95 %": float(np.quantile(lengths, 0.95)),
            "most": max(lengths),
        },
        "flow images": sum(len(f["image_weight"]) for f in features) / sound,
        "generated images": sum(float(np.sum(f["image_weight"])) for f in features) / sound,
        "predicted tokens": sum(float(np.sum(f["text_weight"])) for f in features) / sound,
        "skipped": {kind: {"count": count, "first": first[kind]} for kind, count in skipped.items()},
    }


def as_text(numbers: dict[str, Any]) -> str:
    """The numbers of `summary` as lines for a terminal."""
    lines = [f"{numbers['read']} documents read"]
    for name, values in numbers["sources"].items():
        share = values["read"] / max(numbers["read"], 1)
        lines.append(
            f"{name}: {values['read']} read, {share:.1%} (weight {values['weight']:.1%}) of {values['documents']}"
        )
        lengths = ", ".join(f"{key} {value:g}" for key, value in values["positions"].items())
        lines.append(f"    positions: {lengths}")
        means = ", ".join(f"{values[key]:.2f} {key}" for key in ("flow images", "generated images", "predicted tokens"))
        lines.append(f"    a document has on average {means}")
        for kind, fault in values["skipped"].items():
            lines.append(f"    skipped for its {kind}: {fault['count']}; {fault['first']}")
    rows = numbers["rows"]
    lines.append(f"rows: {rows['filled']:.1%} of the positions are filled; {rows['documents']:.2f} documents a row")
    return "\n".join(lines)


def page(stage: Stage, numbers: dict[str, Any], found: Sequence[Loaded], tokenizer: Any, codec: Codec) -> str:
    """An HTML page: the numbers, and documents of each source token by token, with what the stage predicts marked."""
    body = [
        f'<pre class="soft">{escape(as_text(numbers))}</pre>',
        '<p class="soft">Tokens are set apart by dotted lines. What the stage predicts is <span class="made">marked '
        "like "
        "this</span>; images that it learns to generate have a frame of that colour.</p>",
    ]
    for name in numbers["sources"]:
        body.append(f"<h2>{escape(name)}</h2>")
        sound = [each for each in found if each.source == name and each.features is not None]
        body += [_example(stage, each, tokenizer, codec) for each in sound[:DRAWN]]
    return html_page(f"What stage {stage.name} sees", "\n".join(body))


def _example(stage: Stage, found: Loaded, tokenizer: Any, codec: Codec) -> str:
    """A document as the model reads it: every token, and each image in place of its tokens."""
    assert found.features is not None and found.document is not None
    images = iter(part for part in found.document if isinstance(part, Image))
    features, parts, inside = found.features, [], False
    for token, kind, weight in zip(features["tokens"], features["modality"], features["text_weight"], strict=True):
        if kind == sequence.TEXT:
            parts.append(_token(tokenizer.decode([int(token)]), bool(weight) and stage.text_loss))
        elif not inside:
            part = next(images)
            parts.append(_image(part, codec, part.generate and stage.image_loss))
        inside = kind != sequence.TEXT
    return f'<div class="example">{"".join(parts)}</div>'


def _token(text: str, predicted: bool) -> str:
    return f'<span class="token{" made" if predicted else ""}">{escape(text)}</span>'


def _image(part: Image, codec: Codec, predicted: bool) -> str:
    if part.via == "flow" and not (codec.makes_pixels if part.encoded else codec.is_pixels):
        return _token(f"[{'x'.join(map(str, part.pixels.shape))} latents]", predicted)
    pixels = np.asarray(codec.decode(part.pixels[None].astype(np.float32)))[0] if part.encoded else part.pixels
    return image_element(pixels, f"{'generated' if part.generate else 'given'} image, via {part.via}", predicted)
