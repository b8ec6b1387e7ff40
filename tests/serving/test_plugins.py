"""The plug-ins of docs/evaluation_plugins that need no harness, against a server."""

import sys
from pathlib import Path

import pytest
import tiny
from live import ask, data_url, image_part
from PIL import Image as Pillow

from starflow2_jax.data.images import as_pillow
from starflow2_jax.evaluation.protocol import seed_of

PLUGINS = Path(__file__).parents[2] / "docs/evaluation_plugins"


def made(address: str):
    """TorchUMM's backbone, as its pipeline makes and loads it."""
    from starflow2_torchumm import Starflow2Backbone

    backbone = Starflow2Backbone()
    defaults = {"generation_cfg": {"max_tokens": 30}, "editing_cfg": {"max_tokens": 30}}
    backbone.load({"base_url": f"{address}/v1", "seed": 5, **defaults})
    return backbone


@pytest.fixture
def backbone(address, monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("NO_PROXY", "*")
    yield made(address)
    for name in ("starflow2_torchumm", "starflow2_client"):
        del sys.modules[name]


def drawn(message) -> str:
    return message.images[0]["image_url"]["url"]


ASKED = dict(image_first=True, max_images=1, max_tokens=30)


def test_torchumm_draws(backbone, client, address, tmp_path):
    """As a direct request does; each picture of a prompt has a seed of its own, the same in every run."""
    path = str(tmp_path / "out/eight.png")
    found = backbone.generation(prompt="draw an eight", output_path=path, generation_cfg={"guidance": 1.5})
    want = ask(client, guidance=1.5, seed=seed_of(5, "draw an eight/eight.png", 0), **ASKED).choices[0].message
    assert found["saved_paths"] == [path] and found["text"] == want.content and "image" not in found
    with Pillow.open(path) as image:
        assert data_url(image) == drawn(want) == data_url(found["images"][0]) and image.size == tiny.SIZE[::-1]
    several = [backbone.generation("draw an eight")["images"][0] for _ in range(3)]  # as DPG's runner asks
    again = made(address)
    assert [data_url(again.generation("draw an eight")["images"][0]) for _ in range(3)] == list(map(data_url, several))
    assert len(set(map(data_url, several))) == 3
    others = [backbone.generation("draw an eight", str(tmp_path / f"{k}.png"))["images"][0] for k in range(2)]
    assert len(set(map(data_url, [*several, *others]))) == 5
    fixed = backbone.generation("draw an eight", generation_cfg={"seed": 6})["images"][0]
    assert data_url(fixed) == drawn(ask(client, seed=seed_of(6, "draw an eight/", 3), **ASKED).choices[0].message)


def test_torchumm_edits(backbone, client, tmp_path):
    """Pictures by their paths, as objects (GEdit's runner), or named in the parameters."""
    as_pillow(tiny.pixels(3)).save(tmp_path / "scan.png")
    scan = as_pillow(tiny.pixels(3)).convert("RGB")
    parts = [image_part(data_url(scan)), {"type": "text", "text": "mirror it"}]
    messages = [{"role": "user", "content": parts}]
    ways = [
        ("mirror it", [str(tmp_path / "scan.png")], {}),
        ("mirror it", [scan], {}),
        (None, [], {"instruction": "mirror it", "image_path": str(tmp_path / "scan.png")}),
    ]
    for k, (prompt, images, cfg) in enumerate(ways):
        found = backbone.editing(prompt=prompt, images=images, output_path=str(tmp_path / "mirrored"), editing_cfg=cfg)
        want = ask(client, messages, seed=seed_of(5, "mirror it/mirrored", k), **ASKED).choices[0].message
        assert data_url(found["images"][0]) == drawn(want)
        assert found["saved_paths"] == [str(tmp_path / "mirrored.png")]


def test_torchumm_answers(backbone, client, tmp_path):
    as_pillow(tiny.pixels(3)).save(tmp_path / "scan.png")
    parts = [image_part(data_url(as_pillow(tiny.pixels(3)).convert("RGB"))), {"type": "text", "text": "read it"}]
    messages = [{"role": "user", "content": parts}]
    for cfg, temperature in (
        ({"max_new_tokens": 9, "do_sample": False, "use_cache": True}, 0),
        ({"max_tokens": 9, "do_sample": True, "temperature": 2}, 2),
    ):
        found = backbone.understanding("read it", [str(tmp_path / "scan.png")], [], cfg)
        want = ask(client, messages, max_tokens=9, temperature=temperature, seed=5, max_images=0)
        assert found == {"text": want.choices[0].message.content}
    with pytest.raises(NotImplementedError, match="no videos"):
        backbone.understanding("look", videos=["a.mp4"])
