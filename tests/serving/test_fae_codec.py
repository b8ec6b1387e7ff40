"""A server whose model draws with FAE's codec: clients send pictures of any size, and get PNG files of the codec's."""

import base64
import io
from dataclasses import replace

import numpy as np
import openai
import pytest
import tiny
import tiny_fae
from live import LIMITS, ask, data_url, image_part, openai_client, served
from PIL import Image as Pillow

from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.images import as_pillow
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.serving.server import Server


def test_pictures_in_and_out():
    codec = tiny_fae.codec().for_grid(tiny.GRID)
    sampler = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), codec, max_positions=256)
    photo = Pillow.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    with served(sampler) as (_, address):
        client = openai_client(address)
        draw = dict(max_tokens=tiny.CONFIG.tokens + 2, image_first=True, max_images=1, seed=1)
        said = [image_part(data_url(photo), via="flow"), {"type": "text", "text": "mirror it"}]
        [first], [second] = (
            ask(client, [{"role": "user", "content": content}], **draw).choices[0].message.images
            for content in ("draw an eight", said)
        )
    pictures = [Pillow.open(io.BytesIO(base64.b64decode(p["image_url"]["url"].split(",")[1]))) for p in (first, second)]
    for picture in pictures:
        assert picture.format == "PNG" and picture.size == (24, 16) and picture.mode == "RGB"
    assert np.ptp(np.asarray(pictures[0], int) - np.asarray(pictures[1], int)) > 5


def test_a_decoder_makes_pictures_of_latents():
    """The model writes pictures, which it cannot read: what clients send goes through the vision tower."""
    codec = LatentCodec(tiny.GRID, tiny.CHANNELS, 0.5, 2.0, tiny_fae.codec().for_grid(tiny.GRID))
    sampler = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), codec, max_positions=256)
    with served(sampler, warm=True) as (_, address):
        client = openai_client(address)
        assert client.models.list().data[0].drawing
        draw = dict(max_tokens=tiny.CONFIG.tokens + 2, image_first=True, max_images=1, seed=1)
        said = [{"role": "user", "content": "draw an eight"}]
        message = ask(client, said, **draw).choices[0].message
        again = [*said, {"role": "assistant", "images": message.images}, {"role": "user", "content": "and now?"}]
        assert ask(client, again, max_tokens=2, max_images=0).usage.prompt_tokens > 10
        with pytest.raises(openai.BadRequestError, match="reads latents, not pictures; leave via out"):
            ask(client, [{"role": "user", "content": [image_part(message.images[0]["image_url"]["url"], via="flow")]}])
    shown = Pillow.open(io.BytesIO(base64.b64decode(message.images[0]["image_url"]["url"].split(",")[1])))
    assert shown.format == "PNG" and shown.size == (24, 16) and shown.mode == "RGB"
    options = SampleOptions(max_tokens=tiny.CONFIG.tokens + 2, image_first=True, max_images=1)
    [[picture, *_]] = sampler.generate([[Text("draw an eight")]], options, [1])
    assert isinstance(picture, Image)
    wanted = np.asarray(as_pillow(picture.pixels), int)
    assert np.abs(np.asarray(shown, int) - wanted).max() <= 1 and np.ptp(wanted) > 5
    with pytest.raises(UserError, match="this one reads latents"):
        Server(sampler, "tiny", replace(LIMITS, editing=True), "127.0.0.1", ())
