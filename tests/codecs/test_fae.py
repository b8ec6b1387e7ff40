"""FAE's codec: what it computes, on one device and on several, and what becomes of one that is saved."""

import json
import pickle
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny_fae
from tiny_fae import CHANNELS, GRID, NETWORKS, codec, pictures

from starflow2_jax.checkpoints.codec import write_codec
from starflow2_jax.codecs.fae import FaeCodec, FaeOptions, read_fae
from starflow2_jax.codecs.fingerprint import fingerprint, packed, unpacked
from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.models.fae import FeatureDecoder, LatentEncoder, PixelDecoder
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.parallel import sharding


def test_encode_and_decode_are_the_networks_one_after_the_other():
    made, images = codec(), pictures(3)
    mean, std = np.array(made.mean), np.array(made.std)
    features = ENCODERS["vit"].features(made.encoder, made.weights["encoder"], images, GRID)
    latents, log_variance = LatentEncoder(NETWORKS).apply({"params": made.weights["latent_encoder"]}, features)
    assert np.ptp(log_variance) > 0.1  # it is not what is encoded
    got = np.asarray(made.encode(images))
    assert got.shape == (3, *GRID, CHANNELS)
    np.testing.assert_allclose(got.reshape(3, 16, CHANNELS) * std + mean, latents, atol=1e-5)
    features = FeatureDecoder(NETWORKS).apply({"params": made.weights["feature_decoder"]}, latents)
    pixels = PixelDecoder(NETWORKS).apply({"params": made.weights["pixel_decoder"]}, features)
    np.testing.assert_allclose(made.decode(got), pixels, atol=1e-5)
    assert pixels.shape == (3, 32, 32, 3) and np.ptp(pixels[0] - pixels[1]) > 0.1
    with pytest.raises(
        ValueError, match="an image of 16x32x3 was given, but the codec takes 32x32x3 pixels; resize it"
    ):
        made.encode(images[:, :16])


def test_features_alone_are_the_latents_of_a_codec_without_channels():
    made = codec()
    bare = replace(made, networks=replace(NETWORKS, channels=0), mean=(0.5,) * 16, std=(2.0,) * 16)
    images = pictures(2)
    features = np.asarray(made.features_of(made.weights, images))
    np.testing.assert_allclose(bare.encode(images).reshape(2, 16, 16), (features - 0.5) / 2, atol=1e-5)
    pixels = PixelDecoder(NETWORKS).apply({"params": made.weights["pixel_decoder"]}, features)
    np.testing.assert_allclose(bare.decode(bare.encode(images)), pixels, atol=1e-4)


def test_a_mesh_shares_the_batch():
    made, images = codec(), pictures(8)
    latents = np.asarray(made.encode(images))
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread, shown = made.encode(images), made.decode(latents)
        odd = made.decode(latents[:3])  # which 4 devices do not divide
    for out in (spread, shown):
        assert len(out.sharding.device_set) == 4 and out.addressable_shards[0].data.shape[0] == 2
    np.testing.assert_allclose(spread, latents, atol=1e-5)
    np.testing.assert_allclose(shown, made.decode(latents), atol=1e-5)
    np.testing.assert_allclose(odd, shown[:3], atol=1e-5)


def test_bfloat16_stays_near():
    made, images = codec(), pictures(2)
    half = made.computing("bfloat16")
    latents, near = made.encode(images), half.encode(images)
    assert near.dtype == np.float32 and 1e-4 < np.abs(latents - near).max() < 0.1
    assert 1e-4 < np.abs(made.decode(latents) - half.decode(latents)).max() < 0.1


def test_larger_pictures():
    large = codec().for_grid((6, 8))
    latents = large.encode(np.random.default_rng(0).uniform(-1, 1, (1, 48, 64, 3)).astype(np.float32))
    assert latents.shape == (1, 6, 8, CHANNELS) and large.decode(latents).shape == (1, 48, 64, 3)


def test_it_is_the_same_after_it_was_saved(tmp_path):
    made = codec()
    write_codec(tmp_path, made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec.json", "codec.safetensors"]
    for again in (read_fae(tmp_path), unpacked(*packed(made)), pickle.loads(pickle.dumps(made))):
        assert again == made and jax.tree.structure(again.weights) == jax.tree.structure(made.weights)
        pairs = zip(jax.tree.leaves(again.weights), jax.tree.leaves(made.weights), strict=True)
        assert all(a.tobytes() == b.tobytes() and a.dtype == b.dtype for a, b in pairs)
        assert np.array_equal(again.encode(pictures(2)), made.encode(pictures(2)))
    half = replace(made, weights=jax.tree.map(lambda x: x.astype("bfloat16"), made.weights))
    write_codec(tmp_path, half)
    same = read_fae(tmp_path)
    assert all(x.dtype == "bfloat16" for x in jax.tree.leaves(same.weights)) and fingerprint(same) == fingerprint(half)


def test_the_fingerprint_is_that_of_the_latents():
    made = codec()
    assert fingerprint(made.computing("bfloat16")) == fingerprint(made)
    others = [codec(1), replace(made, mean=(0.0,) * 4), made.for_grid((8, 8))]
    assert len({fingerprint(each) for each in (made, *others)}) == 4


@pytest.fixture
def folder(tmp_path):
    write_codec(tmp_path, codec())
    return tmp_path


def test_options_name_a_folder(folder):
    made = FaeCodec.make(FaeOptions(path=str(folder), **tiny_fae.OPTIONS), iter(()))
    assert made == codec() and made.image_shape == FaeOptions(**tiny_fae.OPTIONS).image_shape(GRID)
    larger = FaeCodec.make(FaeOptions(path=str(folder), **tiny_fae.OPTIONS | {"grid": (8, 8), "dtype": "bfloat16"}), ())
    assert larger == codec().for_grid((8, 8)).computing("bfloat16")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"path": ""}, "codec.path names no folder of a codec"),
        ({"channels": 32}, "codec.channels is 32, but the codec in .* has 4; set the config to that"),
        ({"patch": 16}, "codec.patch is 16, but the codec in .* has 8"),
    ],
)
def test_options_that_do_not_fit(folder, change, message):
    with pytest.raises(ConfigError, match=message):
        FaeCodec.make(FaeOptions(**{"path": str(folder)} | tiny_fae.OPTIONS | change), iter(()))


def test_folders_that_are_refused(folder, tmp_path_factory):
    def refused(message, **changes):
        values = json.loads(description)
        (folder / "codec.json").write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not None}))
        with pytest.raises(UserError, match=message):
            read_fae(folder)

    description = (folder / "codec.json").read_text()
    refused("holds a codec of the kind 'patch', not 'fae'", kind="patch")
    refused("content hash differs", content_hash="0")
    refused("encoder_kind must be one of dinov2, siglip, vit, vlm, not 'dino2'", encoder_kind="dino2")
    refused("codec.json in .* is damaged .'mean'", mean=None)
    refused("mean and std must have one entry for each of the 4 channels", mean=[0.0])
    with pytest.raises(UserError, match="holds no codec, because it has no codec.json"):
        read_fae(tmp_path_factory.mktemp("empty"))


def test_a_decoder_of_latents_in_files(folder):
    """Arrays go in, pictures come out: those that the decoder makes of the arrays."""
    options = dict(grid=GRID, channels=CHANNELS, shift=0.5, scale=2.0)
    plain, made = (LatentCodec.make(LatentCodec.Options(**options, decoder=path), ()) for path in ("", str(folder)))
    assert (plain.makes_pixels, made.makes_pixels, made.is_pixels) == (False, True, False)
    arrays = np.random.default_rng(0).standard_normal((2, *GRID, CHANNELS)).astype(np.float32)
    latents = made.encode(arrays)
    np.testing.assert_array_equal(latents, plain.encode(arrays))
    np.testing.assert_allclose(made.decode(latents), codec().decode(arrays), atol=1e-5)
    again = unpacked(*packed(made))
    assert again == made and fingerprint(again) == fingerprint(made) != fingerprint(plain)
    np.testing.assert_array_equal(again.decode(latents), made.decode(latents))
    with pytest.raises(ConfigError, match="codec.channels is 5, but the codec in .* has 4"):
        LatentCodec.make(LatentCodec.Options(**options | {"channels": 5}, decoder=str(folder)), ())
