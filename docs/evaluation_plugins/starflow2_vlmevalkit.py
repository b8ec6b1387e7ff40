"""VLMEvalKit's model `starflow2`: answers with pictures, as the text {"text": ..., "images": [paths]}.

    python -m starflow2_vlmevalkit --model starflow2 --data MyEdits --mode infer

takes the options of VLMEvalKit's run.py. The environment says where the server is: STARFLOW2_URL
(http://127.0.0.1:8000/v1), STARFLOW2_MODE ("draw", "edit" or "understand") and STARFLOW2_FOLDER (of the pictures).
Data sets with answers in words need no plug-in: use `run.py --base-url`.
"""

import hashlib
import json
import os
from pathlib import Path

from PIL import Image
from starflow2_client import Client
from vlmeval.api.base import BaseAPI

NAME = "starflow2"


class Starflow2(BaseAPI):
    """`base_url`: of the server. `mode`: "draw", "edit" or "understand". `folder`: where pictures are written.

    `options`: fields of each request, such as guidance, seed or max_tokens.
    """

    is_api: bool = True

    def __init__(self, base_url: str, mode: str = "edit", folder: str = "pictures", retry: int = 3, **options):
        options = {name: value for name, value in options.items() if name not in ("verbose", "timeout")}
        super().__init__(retry=retry, verbose=False)
        self.client = Client(base_url, api_key=os.environ.get("STARFLOW2_API_KEY", "none"), options=options)
        self.mode, self.folder = mode, Path(folder)

    def generate_inner(self, inputs: list[dict], **_) -> tuple[int, str, str]:
        """0 for success, the answer, and a word for the log."""
        text = "\n".join(part["value"] for part in inputs if part["type"] == "text")
        images = [Image.open(part["value"]).convert("RGB") for part in inputs if part["type"] == "image"]
        if self.mode == "understand":
            return 0, self.client.understand(text, images, temperature=0).text, "done"
        answer = self.client.edit(text, images) if self.mode == "edit" else self.client.draw(text)
        self.folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256("\n".join(str(part["value"]) for part in inputs).encode()).hexdigest()[:16]
        paths = [self.folder / f"{key}_{number}.png" for number in range(len(answer.images))]
        for path, image in zip(paths, answer.images, strict=True):
            image.save(path)
        return 0, json.dumps({"text": answer.text, "images": [str(path.resolve()) for path in paths]}), "done"


def model(**options) -> Starflow2:
    """The model that the environment describes."""
    url = os.environ.get("STARFLOW2_URL", "http://127.0.0.1:8000/v1")
    mode, folder = os.environ.get("STARFLOW2_MODE", "edit"), os.environ.get("STARFLOW2_FOLDER", "pictures")
    return Starflow2(url, mode, folder, **options)


if __name__ == "__main__":
    from vlmeval import config, run

    config.supported_VLM[NAME] = model
    run.main()
