"""The digits: their split, documents that depend on (seed, i) alone, the pipeline's position, the tokenizer's files."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.reading import CheckpointError
from starflow2_jax.data import digits, tokenizer
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.evaluation.digits import classify


def documents(kind: str, **options) -> digits.Digits:
    return digits.Digits(options=digits.DigitOptions(kind=kind, **options))


def mixed(count: int) -> list:
    """Documents of all kinds in turn."""
    sources = [documents(kind) for kind in digits.KINDS]
    return [sources[i % len(sources)][i] for i in range(count)]


def keys(pixels) -> set[bytes]:
    return {np.ascontiguousarray(p, np.float32).tobytes() for p in pixels}


def images(document) -> list[np.ndarray]:
    return [part.pixels for part in document if isinstance(part, Image)]


def same(a, b) -> bool:
    def plain(document):
        return [
            (p.text, p.predict) if isinstance(p, Text) else (p.pixels.tobytes(), p.generate, p.via) for p in document
        ]

    return plain(a) == plain(b)


def test_the_split_is_the_permutation_of_seed_zero():
    data, order = load_digits(), np.random.RandomState(0).permutation(1797)
    for name, part in (("train", order[:1500]), ("held_out", order[1500:])):
        pixels, labels = digits.split(name)
        assert pixels.shape == (len(part), 8, 8, 1) and pixels.dtype == np.float32
        assert np.array_equal(pixels[..., 0], data.images[part] / 8 - 1) and np.array_equal(labels, data.target[part])
    assert len(digits.split("train")[0]) == 1500 and len(digits.split("held_out")[0]) == 297
    assert digits.scans()[0].min() == -1 and digits.scans()[0].max() == 1


@pytest.mark.parametrize("name", ("train", "held_out"))
def test_no_document_mixes_the_splits(name):
    theirs = digits.split(name)[0]
    allowed = keys(theirs) | keys(theirs[:, :, ::-1])
    foreign = digits.split({"train": "held_out", "held_out": "train"}[name])[0]
    assert not keys(foreign) & keys(theirs)
    sources = [documents(kind, part=name) for kind in digits.KINDS]
    seen = keys(p for source in sources for i in range(80) for p in images(source[i]))
    assert len(seen) > 200 and seen <= allowed


@pytest.mark.parametrize("kind", digits.KINDS)
def test_document_i_depends_on_the_options_and_i_alone(kind):
    source, again = (documents(kind, warp=0.3) for _ in range(2))
    backwards = {i: again[i] for i in reversed(range(50))}
    assert all(same(source[i], backwards[i]) for i in range(50))
    other = documents(digits.KINDS[digits.KINDS.index(kind) - 1], warp=0.3)
    assert not any(same(source[i], other[i]) for i in range(50))
    assert sum(same(source[i], source[i + 1]) for i in range(50)) < 3


def test_what_the_documents_say_is_true():
    """Words against labels, of each kind alone."""
    pixels, labels = digits.split("train")
    label_of = {p.tobytes(): int(label) for p, label in zip(pixels, labels, strict=True)}

    def told(kind):
        source = documents(kind)
        for i in range(100):
            document = source[i]
            words = [p.text.strip() for p in document if isinstance(p, Text) and p.predict]
            yield document, words, images(document)

    for document, _, (scan,) in told("caption"):
        assert digits.WORDS[label_of[scan.tobytes()]] in document[0].text.split() and document[1].generate
    for document, words, (scan,) in told("read"):
        assert words == [digits.WORDS[label_of[scan.tobytes()]]] and not document[0].generate
    for document, words, scans in told("sum"):
        values = [label_of[s.tobytes()] for s in scans]
        a, b, total = (digits.WORDS[v] for v in (values[0], values[1], values[0] + values[1]))
        assert words == [f"{a} plus {b} is {total}"]
        assert len(values) == (3 if values[0] + values[1] < 10 else 2) and values[2:] in ([], [values[0] + values[1]])
        assert [p.generate for p in document if isinstance(p, Image)] == [False, False, True][: len(values)]
    for document, _, (scan, mirrored) in told("mirror"):
        assert np.array_equal(scan[:, ::-1], mirrored) and document[-1].generate and not document[0].generate
    for document, words, scans in told("count"):
        values = [label_of[s.tobytes()] for s in scans]
        assert values == list(range(values[0], values[0] + len(values))) and words == [digits.WORDS[v] for v in values]
        assert document[0].text.split()[-1] == words[-1] and 2 <= len(values) <= 5


def test_the_tokenizer_survives_its_files(tmp_path):
    made = tokenizer.train(digits.texts(), 416)
    made.save_pretrained(str(tmp_path / "tokenizer"))
    read = CheckpointDirectory(tmp_path).tokenizer()
    assert tokenizer.TokenIds.of(read) == tokenizer.TokenIds.of(made) and len(read) == len(made) <= 416
    texts = [p.text for document in mixed(100) for p in document if isinstance(p, Text)]
    for text in [*texts, "Grüße, 42 <tags> and\nlines", " two  blanks"]:
        ids = made.encode(text, add_special_tokens=False)
        assert read.encode(text, add_special_tokens=False) == ids
        assert read.decode(ids) == text
    assert read.encode("<|vision_start|>", add_special_tokens=False) == [tokenizer.TokenIds.of(read).vision_start]
    with pytest.raises(CheckpointError, match="no readable tokenizer"):
        CheckpointDirectory(tmp_path / "tokenizer").tokenizer()


def test_warped_scans_stay_near_and_readable():
    """Every document differs, no scan moves far, and an independent classifier still reads most of them."""
    plain, bent = (documents("caption", warp=w) for w in (0.0, 1.0))
    pairs = [(plain[i][-1].pixels, bent[i][-1].pixels) for i in range(200)]
    correlations = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]
    assert 0.75 < np.mean(correlations) < 0.99 and all(b.min() >= -1 and b.max() <= 1 for _, b in pairs)
    read = [classify([p[k] for p in pairs]) for k in (0, 1)]
    assert np.mean(read[0] == read[1]) > 0.8
    half = documents("caption", warp=0.5)
    scans = {p.tobytes() for p in digits.split("train")[0]}
    as_it_was = [half[i][-1].pixels.tobytes() in scans for i in range(200)]
    assert 0.4 < np.mean(as_it_was) < 0.6
    assert [not half[i][0].text.endswith(digits.ASKEW) for i in range(200)] == as_it_was  # the caption tells
