"""What every lossless codec in the table keeps to, and what becomes of one that is saved; test_fae.py has the other
one.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.fft import dctn

from starflow2_jax.checkpoints.codec import restore_codec, write_codec
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.errors import ConfigError, UserError

GRID = (2, 3)
RNG = np.random.default_rng(0)
OPTIONS = {
    "patch": CODECS["patch"].Options(patch=2, image_channels=3),
    "patch, cosine": CODECS["patch"].Options(patch=2, image_channels=3, basis="cosine"),
    "patch, least": CODECS["patch"].Options(patch=2, image_channels=3, basis="cosine", least_std=0.6),
    "latents": CODECS["latents"].Options(grid=GRID, channels=5, shift=0.5, scale=2.0),
}


@pytest.fixture(params=sorted(OPTIONS))
def codec(request):
    return made(request.param)


def made(name: str):
    shape = OPTIONS[name].image_shape(GRID)
    return CODECS[name.split(",")[0]].make(OPTIONS[name], iter(RNG.uniform(-1, 1, (9, *shape)).astype(np.float32)))


def test_shapes_are_as_it_says(codec):
    images = RNG.uniform(-1, 1, (4, *codec.image_shape)).astype(np.float32)
    latents = codec.encode(images)
    assert latents.shape == (4, *codec.grid, codec.channels) and codec.grid == GRID
    assert codec.image_shape == OPTIONS[codec.kind].image_shape(GRID)
    assert len(codec.mean) == len(codec.std) == codec.channels
    np.testing.assert_allclose(codec.decode(latents), images, atol=1e-5)
    with pytest.raises(ValueError, match="the codec takes"):
        codec.encode(images[:, 1:])


def test_the_log_volume_is_that_of_encode(codec):
    """By automatic differentiation: log |det d latents / d images| over the number of dimensions."""
    image = jnp.asarray(RNG.uniform(-1, 1, codec.image_shape), jnp.float32)
    size = image.size
    jacobian = jax.jacobian(lambda x: codec.encode(x[None])[0].ravel())(image).reshape(size, size)
    assert codec.log_volume == pytest.approx(float(np.linalg.slogdet(np.asarray(jacobian))[1]) / size, abs=1e-4)


def test_channels_below_the_least_deviation_are_divided_by_it():
    images = RNG.uniform(-1, 1, (9, *OPTIONS["patch"].image_shape(GRID))).astype(np.float32)
    own, least = (CODECS["patch"].make(OPTIONS[name], iter(images)) for name in ("patch, cosine", "patch, least"))
    assert min(own.std) < 0.6
    np.testing.assert_allclose(least.std, np.maximum(own.std, 0.6))


def test_it_is_the_same_after_it_was_saved(codec, tmp_path):
    write_codec(tmp_path, codec)
    assert [path.name for path in tmp_path.iterdir()] == ["codec.json"]  # no weights
    values = json.loads((tmp_path / "codec.json").read_text())
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    assert values["kind"] == codec.kind and restore_codec(tmp_path, values) == codec


def test_a_kind_that_there_is_not(tmp_path):
    with pytest.raises(UserError, match="'vae', but the known kinds are patch, latents, fae.*--import"):
        restore_codec(tmp_path, {"kind": "vae"})


def test_the_cosine_basis():
    """A flat patch has one channel for each colour; the transform is SciPy's of two dimensions, and keeps distances."""
    patch, codec = RNG.uniform(-1, 1, (1, 4, 4, 3)).astype(np.float32), cosine(4)
    wanted = dctn(patch[0].transpose(2, 0, 1), axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(codec.encode(patch).reshape(3, 4, 4), wanted, atol=1e-5)
    flat = codec.encode(np.tile(patch[:, :1, :1], (1, 4, 4, 1))).reshape(3, 16)
    assert (np.abs(flat) > 1e-5).sum(1).tolist() == [1, 1, 1]


def cosine(patch: int):
    """A codec of patches that neither centres nor scales."""
    D = 3 * patch * patch
    return CODECS["patch"]((patch, patch), 3, patch, (0.0,) * D, (1.0,) * D, "cosine")


def test_latents_need_no_images():
    def none():
        raise AssertionError("read")
        yield

    CODECS["latents"].make(OPTIONS["latents"], none())


def test_images_of_other_channels_than_the_config_says():
    images = [np.zeros((4, 4, 1), np.float32)]
    with pytest.raises(ConfigError, match="1 channel .gray.; set codec.image_channels to 1"):
        CODECS["patch"].make(OPTIONS["patch"], images)
