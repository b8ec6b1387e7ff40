"""Pictures in requests: files of many kinds, labels that are wrong, and pictures that are larger than the row or the
limit.
"""

import base64
import io
import math
from dataclasses import replace

import httpx
import numpy as np
import pytest
import tiny
from live import LIMITS, ask, data_url, image_part, openai_client, served
from PIL import Image as Pillow

from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.serving.errors import ApiError
from starflow2_jax.serving.images import Budget, fitted, upload
from starflow2_jax.serving.request_limits import RequestLimits
from starflow2_jax.serving.requests import chat_request
from starflow2_jax.serving.server import Limits, Server

ROW = 256
TOKEN = (tiny.VISION.patch * tiny.VISION.merge) ** 2  # pixels
QUESTION = {"type": "text", "text": "which digit is this?"}


def url_of(image: Pillow.Image, form: str, label: str = "", **options) -> str:
    file = io.BytesIO()
    image.save(file, form, **options)
    return f"data:{label or 'image/' + form.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def limits_of(sampler: Sampler, **more) -> RequestLimits:
    return RequestLimits.of(sampler, **{"max_pixels": 40_000_000, "max_choices": 1, "images": "vit"} | more)


def noise(size: tuple[int, int]) -> Pillow.Image:
    return Pillow.fromarray(np.random.default_rng(0).integers(0, 255, size[::-1], np.uint8))


def seen(sampler, parts: list[dict], limits: RequestLimits | None = None, **fields) -> list[np.ndarray]:
    """The pixels of a request's images."""
    body = {"messages": [{"role": "user", "content": [*parts, QUESTION]}], **fields}
    [(_, said)] = chat_request(body, limits or limits_of(sampler)).turns
    return [part.pixels for part in said[:-1]]


def tokens(pixels: np.ndarray) -> int:
    return math.prod(tiny.VISION.merged_grid(pixels.shape[:2]))


def test_files_of_all_kinds_whatever_their_label(sampler):
    picture = noise((8, 12))
    first, *_ = seen(sampler, [image_part(data_url(picture))])
    for form in ("PNG", "WEBP", "BMP", "GIF"):
        for label in ("", "image/jpeg", "IMAGE/PNG;charset=utf-8", "image/x-unknown"):
            options = {"lossless": True} if form == "WEBP" else {}
            np.testing.assert_array_equal(
                seen(sampler, [image_part(url_of(picture, form, label, **options))])[0], first
            )
    frames = [noise((8, 12)).point(lambda level, k=k: (level + k) % 256) for k in (0, 99)]
    moving = url_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(seen(sampler, [image_part(moving)])[0], first)  # the first frame
    for other in ("TIFF", "PPM"):
        with pytest.raises(ApiError, match="PNG, JPEG, WEBP, GIF or BMP"):
            seen(sampler, [image_part(url_of(picture, other, "image/png"))])


def test_urls_as_programs_write_them(sampler):
    plain = data_url(noise((8, 12)))
    head, body = plain.split(",")
    broken = "\r\n".join(body[i : i + 76] for i in range(0, len(body), 76)) + "\n"
    for url in (f"{head},{broken}", plain.replace("data:", "DATA:"), plain.replace(";base64", "; BASE64")):
        np.testing.assert_array_equal(seen(sampler, [image_part(url)])[0], seen(sampler, [image_part(plain)])[0])


def test_pictures_share_what_the_row_has_left(sampler):
    """A large picture alone, two of them, and one beside a small one, which is not scaled."""
    text = len(sampler.tokenizer.encode(QUESTION["text"]))
    left = ROW - ROW // 8 - text
    large, small = image_part(data_url(noise((400, 300)))), image_part(data_url(noise((8, 8))))
    [one] = seen(sampler, [large])
    assert 0.8 * (left - 2) < tokens(one) <= left - 2 and one.shape[1] > one.shape[0]
    two = seen(sampler, [large, large])
    assert all(tokens(p) > 0.7 * (left - 4) / 2 for p in two) and sum(map(tokens, two)) <= left - 4
    beside = seen(sampler, [small, large])
    assert beside[0].shape == (8, 8, 1) and 0.8 * (left - 8) < tokens(beside[1]) <= left - 4 - tokens(beside[0])
    [brief] = seen(sampler, [large], max_tokens=1)
    assert tokens(one) <= tokens(brief) <= ROW - text - 3
    [lower] = seen(sampler, [large], mm_processor_kwargs={"max_pixels": 10 * TOKEN, "min_pixels": 1})
    assert tokens(lower) <= 10
    [higher] = seen(sampler, [small], mm_processor_kwargs={"min_pixels": 20 * TOKEN})
    assert 20 <= tokens(higher) <= 30


def test_a_scaled_picture_is_the_towers_own(sampler):
    """By the same filter to the same size, so that answers are those of the reference's processor with these bounds."""
    picture = noise((400, 300)).convert("RGB")
    [pixels] = seen(sampler, [image_part(data_url(picture), via="vit")], mm_processor_kwargs={"max_pixels": 40 * TOKEN})
    cfg = replace(tiny.VISION, max_pixels=40 * TOKEN)
    gray = np.asarray(picture.convert("L"), np.float32)[..., None] / 127.5 - 1
    want, got = cfg.preprocess(gray), tiny.VISION.preprocess(pixels)
    np.testing.assert_allclose(got["patches"], want["patches"], atol=1e-5)


def test_pictures_that_cannot_fit(sampler):
    large = image_part(data_url(noise((40, 40))))
    with pytest.raises(
        ApiError, match=rf"a picture of 40x40 pixels takes at least \d+ positions, and of the {ROW} positions"
    ):
        seen(sampler, [large] * 120)
    bounded = replace(tiny.VISION, min_pixels=30 * TOKEN)
    request_limits = replace(limits_of(sampler), vision=bounded)
    with pytest.raises(
        ApiError, match="takes at least 3. positions, and of the 99 positions of a row 7 are left for 1 picture;"
    ):
        fitted(bounded, bounded, [upload(large["image_url"]["url"], "vit", request_limits, "where")], 7, 99)


def test_a_large_picture_through_http(sampler):
    """A server for understanding answers a question about a picture that is larger than its rows."""
    with served(sampler, replace(LIMITS, images="vit", max_pixels=200_000)) as (server, address):
        message = {"role": "user", "content": [image_part(data_url(noise((400, 300)))), QUESTION]}
        answer = ask(openai_client(address), [message], max_tokens=4, modalities=["text"])
        assert ROW - ROW // 8 - 20 < answer.usage.prompt_tokens <= ROW - 4
        assert isinstance(answer.choices[0].message.content, str)


def test_limits_are_of_decoded_memory():
    """By the header: a JPEG that is too large to decode whole is drafted; pictures of any kind are decoded one by
    one.
    """
    model = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    assert Limits().max_pixels == 40_000_000
    large, page = Pillow.new("L", (7680, 4320), 200), Pillow.new("L", (2000, 2600), 30)
    few = limits_of(model, max_pixels=16_000_000)
    for parts, limits in (
        ([image_part(url_of(large, "JPEG"))], few),
        ([image_part(url_of(page, "JPEG"))] * 4, few),
        ([image_part(data_url(page))] * 4, few),
        ([image_part(data_url(large))], limits_of(model)),
    ):
        found = seen(model, parts, limits)
        levels = [200 if p.shape[1] > p.shape[0] else 30 for p in found]
        assert len(found) == len(parts) and all(sum(map(tokens, found)) < ROW for _ in found)
        for pixels, level in zip(found, levels, strict=True):
            np.testing.assert_allclose(pixels, level / 127.5 - 1, atol=0.02)
    with pytest.raises(ApiError, match="16000000 pixels together"):
        seen(model, [image_part(data_url(large))], few)


def test_drafted_and_turned(sampler):
    """A JPEG on its side, too large to be decoded whole: it is upright, and has the size that was computed."""
    exif = Pillow.Exif()
    exif[0x0112] = 6
    picture = Pillow.linear_gradient("L").resize((800, 400))
    [pixels] = seen(sampler, [image_part(url_of(picture, "JPEG", exif=exif))], limits_of(sampler, max_pixels=200_000))
    assert pixels.shape[0] > pixels.shape[1] and tokens(pixels) < ROW
    assert pixels[:, 0].mean() > 0.8 > -0.8 > pixels[:, -1].mean()  # dark above became dark on the right


def test_bounds_of_the_server():
    model = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    limits = replace(LIMITS, images="vit", vit_max_pixels=9 * TOKEN, vit_min_pixels=5 * TOKEN, max_pixels=200_000)
    with served(model, limits) as (server, address):
        for size, least, most in (((400, 300), 6, 9), ((2, 2), 5, 9)):
            message = {"role": "user", "content": [image_part(data_url(noise(size))), {"type": "text", "text": "!"}]}
            answer = ask(openai_client(address), [message], max_tokens=1)
            assert least <= answer.usage.prompt_tokens - 3 <= most
        body = {"messages": [message], "mm_processor_kwargs": {"min_pixels": 10 * TOKEN}}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, trust_env=False)
        assert answer.status_code == 400 and "must not be above max_pixels" in answer.json()["error"]["message"]
    with pytest.raises(UserError, match="must not be above"):
        Server(model, "tiny", replace(limits, vit_min_pixels=10**6), "127.0.0.1", ())
    blind = replace(tiny.CONFIG, vlm=replace(tiny.CONFIG.vlm, vision=None))
    blind = Sampler(tiny.MODEL.clone(cfg=blind), tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    with pytest.raises(UserError, match="need a vision tower"):
        Server(blind, "tiny", replace(LIMITS, vit_max_pixels=10**6), "127.0.0.1", ())


def test_pictures_are_counted_together(sampler):
    """Each as it is decoded, beside those before it as they are kept."""
    budget = Budget(limits_of(sampler, max_pixels=3000))
    budget.take((50, 50), "flow", "where")  # kept with the model's size
    budget.take((50, 50), "flow", "where")
    budget.take((50, 50), "vit", "where")
    with pytest.raises(ApiError, match="3000 pixels together"):
        budget.take((50, 50), "flow", "where")
    with pytest.raises(ApiError, match="3000 pixels together"):
        Budget(limits_of(sampler, max_pixels=3000)).take((51, 60), "flow", "where")
