"""TorchUMM's backbone `starflow2`: generation, editing and understanding by a model behind `starflow2 serve`.

TorchUMM has no hook for plug-ins. `pip install` this folder, and add two lines to the end of TorchUMM's
src/umm/inference/pipeline.py, which all of its programs import:

    from starflow2_torchumm import Starflow2Backbone
    registry.register("backbone", "starflow2", Starflow2Backbone)
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image
from starflow2_client import Answer, Client

Picture = str | Path | Image.Image


class Starflow2Backbone:
    """A client of the server. `load` reads base_url, model, api_key, timeout, seed, and the defaults of requests:
    generation_cfg, editing_cfg and understanding_cfg.

    TorchUMM asks for several pictures of a prompt by the same request. So the seed of a request depends on `seed`, the
    prompt, the name of the output file, and how often both were asked before.
    """

    name = "starflow2"

    def __init__(self, **cfg: Any):
        self.cfg, self.client = cfg, None
        self.asked: Counter[str] = Counter()

    def load(self, cfg: dict[str, Any]) -> None:
        """Connect to the server. The model itself is loaded there."""
        self.cfg = self.cfg | cfg
        known = {name: self.cfg[name] for name in ("base_url", "model", "api_key", "timeout") if self.cfg.get(name)}
        self.client = Client(**known)

    def generation(self, prompt: str, output_path: str | None = None, generation_cfg: dict | None = None) -> dict:
        """A drawing of the prompt. `generation_cfg`: fields of the request."""
        options = self._options("generation_cfg", generation_cfg)
        seed = self._seed(options, prompt, output_path)
        return _saved(self._client().draw(prompt, **options | seed), output_path)

    def editing(
        self,
        prompt: str | None,
        images: list[Picture],
        output_path: str | None = None,
        editing_cfg: dict | None = None,
    ) -> dict:
        """The pictures, changed as the prompt says. `editing_cfg`: fields of the request; instruction and image_path
        may stand there, too."""
        options = self._options("editing_cfg", editing_cfg)
        instruction, path = options.pop("instruction", None), options.pop("image_path", None)
        text, seen = prompt or instruction or "", images or [path]
        seed = self._seed(options, text, output_path)
        return _saved(self._client().edit(text, _read(seen), **options | seed), output_path)

    def understanding(
        self,
        prompt: str | None = None,
        images: list[Picture] | None = None,
        videos: list[str] | None = None,
        understanding_cfg: dict | None = None,
    ) -> dict:
        """An answer in words: the most likely one, unless do_sample is set. max_new_tokens limits its length."""
        if videos:
            raise NotImplementedError("starflow2 sees pictures, no videos")
        options = {"seed": self.cfg.get("seed", 0), **self._options("understanding_cfg", understanding_cfg)}
        options.pop("use_cache", None)
        if not options.pop("do_sample", False):
            options["temperature"] = 0
        if most := options.pop("max_new_tokens", None):
            options["max_tokens"] = most
        return {"text": self._client().understand(prompt or "Describe the image.", _read(images or []), **options).text}

    def _client(self) -> Client:
        if self.client is None:
            self.load({})
        assert self.client
        return self.client

    def _options(self, name: str, given: dict | None) -> dict:
        self._client()  # loads self.cfg
        return {**(self.cfg.get(name) or {}), **(given or {})}

    def _seed(self, options: dict, prompt: str, output_path: str | None) -> dict:
        """The seed of a request for a picture, as a field of it."""
        key = f"{prompt}/{Path(output_path).name if output_path else ''}"
        base, k = int(options.get("seed", self.cfg.get("seed", 0))), self.asked[key]
        self.asked[key] += 1
        return {"seed": int.from_bytes(hashlib.sha256(f"{base}/{k}/{key}".encode()).digest()[:4], "big")}


def _read(pictures: list[Picture]) -> list[Image.Image]:
    opened = (each if isinstance(each, Image.Image) else Image.open(Path(each).expanduser()) for each in pictures)
    return [image.convert("RGB") for image in opened]


def _saved(answer: Answer, path: str | None) -> dict:
    """What TorchUMM expects of an answer with pictures; several are written as NAME_0.png, NAME_1.png, ...

    There is no "image" beside "images", because DPG's runner would count the same picture twice.
    """
    paths = []
    for number, image in enumerate(answer.images if path else []):
        target = Path(path).expanduser().with_suffix(Path(path).suffix or ".png")
        paths.append(target if len(answer.images) == 1 else target.with_stem(f"{target.stem}_{number}"))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        image.save(paths[-1])
    return {"images": answer.images, "saved_paths": [str(path) for path in paths], "text": answer.text}
