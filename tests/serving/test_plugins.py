"""The plug-ins of docs/evaluation_plugins that need no harness, against a server."""

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from live import ask, data_url, image_part
from PIL import Image as Pillow

from starflow2_jax.data.images import as_pillow

PLUGINS = Path(__file__).parents[2] / "docs/evaluation_plugins"


@pytest.fixture
def backbone(address, monkeypatch):
    """TorchUMM's, as its runner makes and loads it."""
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("NO_PROXY", "*")
    from starflow2_torchumm import Starflow2Backbone

    backbone = Starflow2Backbone()
    backbone.load({"base_url": f"{address}/v1", "seed": 5})
    yield backbone
    for name in ("starflow2_torchumm", "starflow2_client"):
        del sys.modules[name]


def drawn(message) -> str:
    return message.images[0]["image_url"]["url"]


def test_torchumm(backbone, client, tmp_path):
    """Draws, edits and answers as direct requests do, and writes pictures where it is told."""
    as_pillow(tiny.pixels(3)).save(tmp_path / "scan.png")
    url = data_url(as_pillow(tiny.pixels(3)).convert("RGB"))
    made = backbone.generation("draw an eight", str(tmp_path / "out/eight.png"), {"guidance": 1.5, "max_tokens": 30})
    asked = dict(seed=5, image_first=True, max_images=1, max_tokens=30)
    want = ask(client, guidance=1.5, **asked).choices[0].message
    assert made["saved_paths"] == [str(tmp_path / "out/eight.png")] and made["text"] == want.content
    with Pillow.open(tmp_path / "out/eight.png") as image:
        assert data_url(image) == drawn(want) == data_url(made["image"])
    changed = backbone.editing(
        "mirror it", [str(tmp_path / "scan.png")], str(tmp_path / "mirrored"), {"max_tokens": 30}
    )
    parts = [image_part(url), {"type": "text", "text": "mirror it"}]
    assert data_url(changed["image"]) == drawn(
        ask(client, [{"role": "user", "content": parts}], **asked).choices[0].message
    )
    assert Path(changed["saved_paths"][0]).name == "mirrored.png"
    cfg = {"max_new_tokens": 9, "do_sample": False}
    told = backbone.understanding("read it", [str(tmp_path / "scan.png")], understanding_cfg=cfg)
    parts[1]["text"] = "read it"
    want = ask(client, [{"role": "user", "content": parts}], max_tokens=9, temperature=0, seed=5, max_images=0)
    assert told == {"text": want.choices[0].message.content}
    with pytest.raises(NotImplementedError, match="no videos"):
        backbone.understanding("look", videos=["a.mp4"])
    assert np.asarray(made["image"]).shape == tiny.SIZE
