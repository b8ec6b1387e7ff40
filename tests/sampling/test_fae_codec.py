"""The sampler with FAE's codec: pictures in and out, on one device and on several, and arrays that a decoder makes
pictures of.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
import tiny_fae
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.commands import sampling as commands
from starflow2_jax.commands.chat import converse
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.images import as_pillow, reader_of
from starflow2_jax.parallel.sharding import make_mesh
from starflow2_jax.sampling import noise_space
from starflow2_jax.sampling.batch_files import Prompt, write_anew
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.scoring import describe, illustrate, rank, score

N, D = tiny.CONFIG.tokens, tiny.CHANNELS
CODEC = tiny_fae.codec().for_grid(tiny.GRID)  # 2 x 3 tokens: pictures of 16 x 24
ARRAYS = LatentCodec(tiny.GRID, D, 0.5, 2.0, CODEC)
DRAW = SampleOptions(max_tokens=N + 2, image_first=True)


def sampler(codec=CODEC, mesh=None) -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), codec, max_positions=256, mesh=mesh)


def drawn(model: Sampler) -> np.ndarray:
    """The pictures of three answers."""
    answers = model.generate([[Text("draw")]], DRAW, [1, 2, 3], 3)
    return np.stack([next(part.pixels for part in answer if isinstance(part, Image)) for answer in answers])


def test_pictures_are_the_codecs():
    """The same latents as another codec of this grid is given, decoded by this one; on four devices as on one."""
    arrays = drawn(sampler(LatentCodec(tiny.GRID, D)))
    pictures = drawn(sampler())
    assert pictures.shape == (3, 16, 24, 3) and np.ptp(pictures[0] - pictures[1]) > 0.1
    np.testing.assert_allclose(pictures, CODEC.decode(arrays), atol=1e-4)
    shared = drawn(sampler(mesh=make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])))
    np.testing.assert_allclose(shared, pictures, atol=1e-3)
    np.testing.assert_allclose(drawn(sampler(ARRAYS)), CODEC.decode(arrays * 2.0 + 0.5), atol=1e-4)


def test_a_conversation_about_pictures(tmp_path, monkeypatch, capsys):
    """A picture of another size is resized, and the answer's picture is a PNG file; the next turn goes on from it."""
    Pillow.fromarray(np.full((50, 40, 3), 200, np.uint8)).save(tmp_path / "photo.png")
    lines = iter([f"mirror /image {tmp_path / 'photo.png'}", "and again"])

    def line(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    chat = Chat(sampler(), DRAW)
    converse(chat, tmp_path / "out")
    assert "!" not in capsys.readouterr().out
    files = sorted((tmp_path / "out").glob("*.png"))
    assert len(files) == 2
    for file in files:
        with Pillow.open(file) as picture:
            assert picture.size == (24, 16) and picture.mode == "RGB"


@pytest.mark.parametrize("codec", [CODEC, ARRAYS])
def test_files_of_answers(codec, tmp_path):
    """Both codecs write PNG files, although one of them reads arrays."""
    (tmp_path / "out").mkdir()
    prompt = Prompt(0, lambda: [Text("draw")], DRAW, (1, 2))
    lines = write_anew(sampler(codec), prompt, tmp_path / "out")
    assert len(lines) == 2 and len(list((tmp_path / "out").glob("*.png"))) == 2


def test_likelihoods_are_of_latents():
    """Nats per dimension of the latents, the same as when the latents themselves are given."""
    model, picture = sampler(), tiny_fae.pictures(1, 24)[0, :16]
    latents = np.asarray(CODEC.encode(picture[None]))[0]
    documents = [[Text("a"), Image(picture, generate=True)], [Text("a"), Image(latents, generate=True, encoded=True)]]
    (given,), (encoded,) = score(model, documents)
    assert given.dims == N * D and given.level_bits == 0
    assert given.nats_per_dim == pytest.approx(encoded.nats_per_dim, rel=1e-4)
    assert given.nats_per_dim * N * D == pytest.approx(-given.nats)


def test_noise_of_a_picture_makes_what_the_codec_keeps_of_it():
    model, picture = sampler(), tiny_fae.pictures(1, 24)[0, :16]
    prompt = [Text("a")]
    z = noise_space.encode(model, [prompt], [picture])
    kept = CODEC.decode(CODEC.encode(picture[None]))
    np.testing.assert_allclose(noise_space.decode(model, [prompt], z), kept, atol=1e-3)
    assert np.abs(kept - picture).mean() > 0.1  # it is no bijection


def test_a_picture_is_no_array():
    with pytest.raises(DocumentError, match="given, but the codec takes 2x3x4 latents"):
        sampler(ARRAYS).generate([[Image(tiny_fae.pictures(1)[0]), Text("a")]], replace(DRAW, image_first=False))


def test_edits_and_ranks_are_those_of_the_pictures_latents():
    """With guidance from the picture; the model that is given latents writes latents, which the codec decodes."""
    pictured, plain = sampler(), sampler(LatentCodec(tiny.GRID, D))
    picture = tiny_fae.pictures(1, 24)[0, :16]
    latents = np.asarray(CODEC.encode(picture[None]))[0]
    found = {}
    for weight in (0.0, 0.7):
        options = replace(DRAW, guidance=1.0, image_guidance=weight)
        [answer] = pictured.generate([[Image(picture), Text("mirror it")]], options, [1])
        [arrays] = plain.generate([[Image(latents), Text("mirror it")]], options, [1])
        found[weight] = next(part.pixels for part in answer if isinstance(part, Image))
        wanted = next(part.pixels for part in arrays if isinstance(part, Image))
        np.testing.assert_allclose(found[weight], CODEC.decode(wanted[None])[0], atol=1e-3)
    assert np.abs(found[0.0] - found[0.7]).max() > 0.01
    captions = ["a", "a zebra", "zz"]
    for by_image, layout in ((True, illustrate), (False, describe)):
        ranks = [rank(m, x, captions, by_image, layout) for m, x in ((pictured, picture), (plain, latents))]
        assert [caption for caption, _ in ranks[0]] == [caption for caption, _ in ranks[1]]
        np.testing.assert_allclose([n for _, n in ranks[0]], [n for _, n in ranks[1]], rtol=1e-3, atol=1e-3)


def test_invert_takes_a_picture_of_any_size_and_writes_a_png(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "restore", lambda args: sampler())
    monkeypatch.setattr(commands, "image_reader", lambda args: reader_of(CODEC))
    photo = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    photo.save(tmp_path / "photo.png")
    command = ["invert", "--checkpoint", str(tmp_path), "--prompt", "a", "--as-prompt", "a"]
    assert cli.main([*command, "--image", str(tmp_path / "photo.png"), "--out", str(tmp_path / "new.npy")]) == 0
    assert "new.png" in capsys.readouterr().out
    pixels = reader_of(CODEC).file(tmp_path / "photo.png").pixels
    kept = as_pillow(
        np.asarray(CODEC.decode(CODEC.encode(pixels[None])))[0]
    )  # the same prompt: only the codec changes it
    assert np.abs(np.asarray(Pillow.open(tmp_path / "new.png"), int) - np.asarray(kept, int)).max() <= 1
