"""lmms-eval's model `starflow2`: tasks that generate or edit pictures, answered with {"text": ..., "images": [paths]}.

    lmms-eval --model starflow2 --model_args base_url=http://127.0.0.1:8000/v1,mode=edit,folder=edits --tasks
    gedit_bench

Tasks with answers in words need no plug-in: use `--model openai`.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from starflow2_client import Client

MANIFEST = ModelManifest(model_id="starflow2", simple_class_path="starflow2_lmms_eval.Starflow2")


class Starflow2(lmms):
    """`mode`: "draw", "edit" or "understand". `folder`: where pictures are written, as TASK/ID.png. `concurrent`:
    requests at a time.

    `seed`: of every answer. `guidance`, `image_guidance`, `image_temperature`: of the pictures; None: the server's.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str = "",
        api_key: str = "none",
        mode: str = "edit",
        folder: str = "pictures",
        concurrent: int = 32,
        seed: int = 0,
        guidance: float | None = None,
        image_guidance: float | None = None,
        image_temperature: float | None = None,
        batch_size: int = 1,
        **_: object,
    ):
        super().__init__()
        given = {"guidance": guidance, "image_guidance": image_guidance, "image_temperature": image_temperature}
        options = {"seed": seed} | {name: value for name, value in given.items() if value is not None}
        self.client = Client(base_url, model, api_key, options=options)
        self.mode, self.folder, self.concurrent = mode, Path(folder), int(concurrent)

    def generate_until(self, requests: list) -> list[str]:
        """The answers, in the order of the requests."""
        with ThreadPoolExecutor(self.concurrent) as pool:
            return list(pool.map(lambda request: self._answer(*request.args), requests))

    def _answer(self, text: str, options: dict, to_images, key, task: str, split: str) -> str:
        found = to_images(self.task_dict[task][split][key]) if to_images else []
        images = [image for image in found or [] if image is not None]
        if self.mode == "understand":
            most = options.get("max_new_tokens", 128)
            return self.client.understand(text, images, temperature=options.get("temperature", 0), max_tokens=most).text
        answer = self.client.edit(text, images) if self.mode == "edit" else self.client.draw(text)
        paths = []
        for number, image in enumerate(answer.images):
            paths.append(self.folder / task / f"{key}{f'_{number}' if number else ''}.png")
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            image.save(paths[-1])
        return json.dumps({"text": answer.text, "images": [str(path.resolve()) for path in paths]})

    def loglikelihood(self, requests: list) -> list:
        """Not offered: use `starflow2 score`, or /v1/rank for captions."""
        raise NotImplementedError("the server ranks captions by POST /v1/rank; it scores no continuations")

    def generate_until_multi_round(self, requests: list) -> list[str]:
        """Not offered."""
        raise NotImplementedError("tasks of several rounds are not supported; use --model openai for those in words")
