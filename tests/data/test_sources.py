"""One's own documents: the codec and the tokenizer that are fitted to them, and the captions that are left out."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax.config import loading as configs
from starflow2_jax.data import sources
from starflow2_jax.data.documents import Document, Image, Text, without_caption
from starflow2_jax.data.images import write_image
from starflow2_jax.data.pipeline import Encoder, batches
from starflow2_jax.errors import UserError
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES

QUICK = Path(__file__).parents[2] / "starflow2_jax/experiments" / "digits_quick.py"


def config_of(folder: Path, images: list[np.ndarray], via: str = "flow", **codec):
    """A config whose source has one captioned image a document."""
    documents = []
    for i, pixels in enumerate(images):
        file = write_image(folder / str(i), pixels)
        documents.append([{"text": f"zebra {i}"}, {"image": file.name, "via": via}])
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    config = configs.load(QUICK, [f"data.source={folder / 'data.jsonl'}"]).unlock()
    config.codec.update(codec)
    return config


def test_patches_are_fitted_to_the_images(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, (4, 6, 3)).astype(np.float32) for _ in range(20)]
    codec = sources.make_codec(config_of(tmp_path, images, image_channels=3))
    assert (codec.image_size, codec.grid, codec.channels) == ((4, 6), (2, 3), 12)
    latents = codec.encode(np.stack(images)).reshape(-1, 12)
    np.testing.assert_allclose(latents.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(latents.std(0), 1, atol=0.02)


def test_blank_images_have_finite_latents(tmp_path):
    blank = np.full((4, 4, 1), -1, np.float32)
    codec = sources.make_codec(config_of(tmp_path, [blank, blank]))
    latents = codec.encode(blank[None])
    assert np.isfinite(latents).all() and np.isfinite(codec.log_volume)
    np.testing.assert_allclose(codec.decode(latents)[0], blank, atol=1e-6)


def test_the_tokenizer_learns_the_documents_words(tmp_path):
    config = config_of(tmp_path, [np.zeros((4, 4, 1), np.float32)] * 9)
    tokenizer = sources.make_tokenizer(config)
    assert len(tokenizer) <= config.model.vlm.vocabulary
    assert len(tokenizer.encode("zebra")) == 1 and tokenizer.decode(tokenizer.encode("zebra 3, yak")) == "zebra 3, yak"


@pytest.mark.parametrize(
    "sides, via, codec, saying",
    [
        ((4, 4), "vit", {}, 'no images via "flow"'),
        ((4, 6), "flow", {}, r"sizes \[\(4, 4\), \(4, 6\)\]; bring them to one size"),
        ((4, 4), "flow", {"patch": 3}, "codec.patch=3 does not divide an image's side of 4 pixels"),
        ((4, 4), "flow", {"kind": "vae"}, "codec.kind is 'patch' or 'latents', not 'vae'"),
    ],
)
def test_images_that_no_codec_fits(tmp_path, sides, via, codec, saying):
    images = [np.zeros((4, side, 1), np.float32) for side in sides]
    with pytest.raises(UserError, match=saying):
        sources.make_codec(config_of(tmp_path, images, via, **codec))


def captioned(folder: Path, drop: float, stage: str = "text_to_image"):
    """A stage's documents: seven of a file, every one a caption and its image, but for the last, which is read."""
    image = write_image(folder / "image", tiny.pixels(0)).name
    lines = [[{"text": f"zebra {i}"}, {"image": image, "generate": True}] for i in range(6)]
    lines.append([{"image": image}, {"text": "what is it?"}, {"text": "a zebra", "predict": True}])
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = configs.load(QUICK, [f"data.source={folder / 'data.jsonl'}", f"stages.{stage}.caption_drop={drop}"])
    return sources.documents(config, STAGES[stage], 1)


def captions(source, first: int, count: int) -> list[str]:
    openings = [source[i][0] for i in range(first, count)]
    return [part.text if isinstance(part, Text) else "" for part in openings]


def test_captions_of_a_file_are_dropped_as_often_as_asked(tmp_path):
    said = captions(captioned(tmp_path, 0.1), 0, 7 * 300)
    assert {len(set(said[i::7]) - {""}) for i in range(6)} == {1} and said[3] in ("zebra 3", "")
    dropped = np.array([[text == "" for text in said[i::7]] for i in range(6)])
    assert 0.07 < dropped.mean() < 0.13
    assert dropped.any(1).all() and not dropped.all(1).any()  # each of them some time, none always
    assert len(captioned(tmp_path, 0.1)[6]) == 3
    assert captions(captioned(tmp_path, 0.0), 0, 3) == [f"zebra {i}" for i in range(3)]


def test_which_captions_are_dropped_depends_on_seed_stage_and_place_alone(tmp_path):
    one, again, other = (captioned(tmp_path, 0.3, stage) for stage in ("text_to_image", "text_to_image", "joint"))
    again[70]
    assert captions(one, 0, 70) == captions(one, 0, 70) == captions(again, 0, 70)
    assert captions(one, 0, 70) != captions(other, 0, 70)


def test_a_saved_position_drops_the_same_captions(tmp_path):
    def reader():
        encoder = Encoder(tiny.tokenizer(), tiny.CODEC)
        return iter(batches(captioned(tmp_path, 0.3), encoder, Shape(2, 40, 2), group=1, groups=2))

    data, resumed = reader(), reader()
    for _ in range(5):
        next(data)
    position = data.get_state()
    wanted = [jax.tree.leaves(next(data)) for _ in range(4)]
    next(resumed)
    resumed.set_state(position)
    for leaves in wanted:
        assert all(np.array_equal(a, b) for a, b in zip(leaves, jax.tree.leaves(next(resumed)), strict=True))
    assert len({leaves[0].tobytes() for leaves in wanted}) > 1


PICTURE = Image(tiny.pixels(0), generate=True)
SEEN = Image(tiny.pixels(0))


@pytest.mark.parametrize(
    "document, kept",
    [
        ([Text("a"), PICTURE], [PICTURE]),
        ([Text("a"), Text("b"), PICTURE], [PICTURE]),
        ([Text("as"), SEEN, Text("but mirrored"), PICTURE], [SEEN, Text("but mirrored"), PICTURE]),
        ([PICTURE], [PICTURE]),
        ([Text("a"), SEEN], None),
        ([Text("a"), Text("b", predict=True), PICTURE], None),
        ([Text("a"), PICTURE, PICTURE], None),
        ([Text("a"), PICTURE, Text("b")], None),
    ],
)
def test_what_a_caption_is(document: Document, kept: Document | None):
    """Text that opens a document which predicts the image at its end and nothing else."""
    left = without_caption(document)
    wanted = document if kept is None else kept
    assert len(left) == len(wanted) and all(a is b or a == b for a, b in zip(left, wanted, strict=True))


def test_a_source_is_found_by_name_scheme_or_suffix(monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "cloud://", sources.Digits)
    assert sources.find("digits") is sources.find("cloud://bucket/rows.jsonl") is sources.Digits
    assert sources.find("folder/digits.jsonl") is sources.JsonlDocuments
    for wrong in ("digit", "rows.json", "file://rows", ""):
        with pytest.raises(
            UserError, match=f"data.source='{wrong}' names no source; there are digits, .jsonl, cloud://"
        ):
            sources.find(wrong)


def test_options_of_a_source_are_keys_of_the_data_section():
    config = configs.load(QUICK, ["data.warp=0.5"])
    assert sources.open_source(config, 1).options.warp == 0.5


def test_who_trains_on_other_data_needs_no_scikit_learn():
    code = (
        "import sys; import starflow2_jax.training.loop, starflow2_jax.sampling.engine, starflow2_jax.evaluation.table\n"
        "print(*[name for name in ('sklearn', 'scipy.ndimage') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
