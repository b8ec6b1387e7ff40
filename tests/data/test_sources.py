"""One's own documents: the codec and the tokenizer that are fitted to them."""

import json
from pathlib import Path

import numpy as np
import pytest

from starflow2_jax import config as configs
from starflow2_jax.data import sources
from starflow2_jax.data.documents import write_image
from starflow2_jax.errors import UserError

QUICK = Path(__file__).parents[2] / "experiments" / "digits_quick.py"


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
        ((4, 4), "vit", {}, 'no image via "flow"'),
        ((4, 6), "flow", {}, r"sizes \[\(4, 4\), \(4, 6\)\]; bring them to one size"),
        ((4, 4), "flow", {"patch": 3}, "codec.patch=3 does not divide an image's side of 4 pixels"),
        ((4, 4), "flow", {"kind": "vae"}, "codec.kind is 'patch' or 'latents', not 'vae'"),
    ],
)
def test_images_that_no_codec_fits(tmp_path, sides, via, codec, saying):
    images = [np.zeros((4, side, 1), np.float32) for side in sides]
    with pytest.raises(UserError, match=saying):
        sources.make_codec(config_of(tmp_path, images, via, **codec))
