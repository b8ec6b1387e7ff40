"""The shapes in which prompts are read: few, named in the log, and compiled while other answers are written."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import tiny
from live import LIMITS, ask, data_url, image_part, openai_client, served, wait_until
from PIL import Image as Pillow

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.serving.reader import Reader

ROW = 2048


def sampler(positions: int = ROW) -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=positions)


def test_few_shapes():
    """Pictures of 300 sizes and prompts of all lengths: a handful of shapes, which hold them."""
    model = sampler()
    reader, found = Reader(model, ROW + 32, lambda: None), set()
    for k in range(300):
        picture = Image(np.zeros((4 + 3 * (k % 40), 4 + 2 * (k % 97), 1), np.float32), via="vit")
        flow = [Image(tiny.pixels(k))] * (k % 4)
        piece = model.encoder([Text("!" * (k % 50)), picture, *flow], closed=False)
        shape = reader.shape(piece, 0)
        found.add(shape)
        assert shape.length >= len(piece["tokens"]) and shape.images >= len(piece["latents"])
        assert shape.patches >= len(piece["patches"])
    assert len(found) <= 8
    words = {reader.shape(model.encoder([Text("!" * n)], closed=False), 0) for n in range(1, 257)}
    assert {(s.length, s.images, s.patches) for s in words} == {(n, 1, 0) for n in (32, 64, 128, 256)}
    last = reader.shape(model.encoder([Text("!" * 40)], closed=False), ROW)
    assert last.length == 64 and reader.shape(model.encoder([Text("!" * 30)], closed=False), ROW).length == 32


def test_rows_write_on_while_a_picture_is_compiled(monkeypatch, caplog):
    """The compilation is held back until a stream that runs has ended; then the picture is answered, and known."""
    model, compiled, may = sampler(512), threading.Event(), threading.Event()
    with served(model, replace(LIMITS, rows=2, images="vit", max_pixels=10**6)) as (server, address):
        client, reader = openai_client(address), server.worker.reader
        ask(client, max_tokens=2, max_images=0)
        read = reader._read

        def slowly(*arguments):
            if threading.current_thread().name.startswith("compiler"):
                compiled.set()
                assert may.wait(120)
            return read(*arguments)

        monkeypatch.setattr(reader, "_read", slowly)
        picture = [image_part(data_url(Pillow.new("L", (30, 20)))), {"type": "text", "text": "which?"}]
        with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO, "starflow2_jax"):
            stream = ask(client, stream=True, max_tokens=150, max_images=0, temperature=3.0, stop="never")
            next(iter(stream))
            seen = pool.submit(ask, client, [{"role": "user", "content": picture}], max_tokens=2)
            assert compiled.wait(120)
            reasons = [c.choices[0].finish_reason for c in stream]
            assert reasons[-1] and not seen.done()
            may.set()
            assert seen.result(120).usage.prompt_tokens > 30
        assert "read of 256 positions, 1 images and 1024 patches for 1 rows" in caplog.text
        may.clear()  # no other compilation may be waited for
        count = len(model.programs)
        picture[0] = image_part(data_url(Pillow.new("L", (45, 25))))
        assert ask(client, [{"role": "user", "content": picture}], max_tokens=2).usage
        wait_until(lambda: not server.worker.entering)
        assert len(model.programs) == count
