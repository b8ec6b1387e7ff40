"""A client of `starflow2 serve` for evaluation harnesses: answers with pictures. It needs the packages openai and
pillow.
"""

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from openai import OpenAI
from PIL import Image


@dataclass
class Answer:
    """The text of an answer, and its pictures."""

    text: str
    images: list[Image.Image]


@dataclass
class Client:
    """A model behind `starflow2 serve`. `options`: fields of each request, such as guidance, temperature or
    max_tokens.
    """

    base_url: str = "http://127.0.0.1:8000/v1"
    model: str = ""  # the server's --name; "": the one model that it serves
    api_key: str = "none"
    timeout: float = 600.0  # seconds
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.openai = OpenAI(base_url=self.base_url, api_key=self.api_key, timeout=self.timeout)
        self.model = self.model or self.openai.models.list().data[0].id

    def understand(self, text: str, images: list[Image.Image] = (), **options: Any) -> Answer:
        """An answer in words."""
        return self.ask(text, images, None, modalities=["text"], **options)

    def draw(self, text: str, **options: Any) -> Answer:
        """A drawing of the text."""
        return self.ask(text, [], None, image_first=True, max_images=1, **options)

    def edit(self, text: str, images: list[Image.Image], **options: Any) -> Answer:
        """The pictures, changed as the text says. The model reads them as it reads its own drawings."""
        return self.ask(text, images, "flow", image_first=True, max_images=1, **options)

    def ask(self, text: str, images: list[Image.Image], via: str | None, **options: Any) -> Answer:
        """The answer to pictures and a text. `via`: "flow" or "vit", see the guide of serving; None: as the server was
        started.
        """
        parts = [
            {"type": "image_url", "image_url": {"url": _url(image)} | ({"via": via} if via else {})} for image in images
        ]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
        answer = self.openai.chat.completions.create(
            model=self.model, messages=[message], extra_body=self.options | options
        )
        said = answer.choices[0].message
        drawn = [part["image_url"]["url"] for part in getattr(said, "images", None) or []]
        return Answer(said.content or "", [_opened(url) for url in drawn])


def _url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _opened(url: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    image.load()
    return image
