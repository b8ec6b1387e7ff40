"""A server whose model draws with FAE's codec: clients send pictures of any size, and get PNG files of the codec's."""

import base64
import io

import numpy as np
import tiny
import tiny_fae
from live import ask, data_url, image_part, openai_client, served
from PIL import Image as Pillow

from starflow2_jax.sampling.engine import Sampler


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
