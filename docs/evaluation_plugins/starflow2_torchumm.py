"""TorchUMM's backbone `starflow2`: generation, editing and understanding by a model behind `starflow2 serve`.

Copy this file and starflow2_client.py where TorchUMM can import them, and register the class:

    from umm.core.registry import register
    from starflow2_torchumm import Starflow2Backbone

    register("backbone", "starflow2", Starflow2Backbone)
"""

from pathlib import Path
from typing import Any

from PIL import Image
from starflow2_client import Answer, Client


class Starflow2Backbone:
    """A client of the server; `load` reads base_url, model, api_key, timeout and seed."""

    name = "starflow2"

    def __init__(self, **cfg: Any):
        self.cfg, self.client = cfg, None

    def load(self, cfg: dict[str, Any]) -> None:
        """Connect to the server. The model itself is loaded there."""
        cfg = self.cfg | cfg
        known = {name: cfg[name] for name in ("base_url", "model", "api_key", "timeout") if cfg.get(name)}
        self.client = Client(**known, options={"seed": int(cfg.get("seed", 0))})

    def generation(self, prompt: str, output_path: str | None = None, generation_cfg: dict | None = None) -> dict:
        """A drawing of the prompt. `generation_cfg`: fields of the request."""
        return _saved(self._client().draw(prompt, **(generation_cfg or {})), output_path)

    def editing(
        self, prompt: str, images: list[str], output_path: str | None = None, editing_cfg: dict | None = None
    ) -> dict:
        """The pictures, changed as the prompt says."""
        return _saved(self._client().edit(prompt, _read(images), **(editing_cfg or {})), output_path)

    def understanding(
        self,
        prompt: str | None = None,
        images: list[str] | None = None,
        videos: list[str] | None = None,
        understanding_cfg: dict | None = None,
    ) -> dict:
        """An answer in words, the most likely one unless `understanding_cfg` sets a temperature."""
        if videos:
            raise NotImplementedError("starflow2 sees pictures, no videos")
        cfg = {"temperature": 0, **(understanding_cfg or {})}
        most = cfg.pop("max_new_tokens", None)
        if not cfg.pop("do_sample", False):
            cfg["temperature"] = 0
        options = cfg | ({"max_tokens": most} if most else {})
        return {"text": self._client().understand(prompt or "Describe the image.", _read(images or []), **options).text}

    def _client(self) -> Client:
        if self.client is None:
            self.load({})
        assert self.client
        return self.client


def _read(paths: list[str]) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in paths]


def _saved(answer: Answer, path: str | None) -> dict:
    """What TorchUMM expects of an answer with pictures. Several are written as NAME_0.png, NAME_1.png, ..."""
    paths = []
    for number, image in enumerate(answer.images if path else []):
        target = Path(path).with_suffix(Path(path).suffix or ".png")
        paths.append(target if len(answer.images) == 1 else target.with_stem(f"{target.stem}_{number}"))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        image.save(paths[-1])
    images = answer.images
    return {
        "image": images[0] if images else None,
        "images": images,
        "saved_paths": [str(p) for p in paths],
        "text": answer.text,
    }
