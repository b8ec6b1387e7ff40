"""`starflow2 chat`: a conversation in the terminal."""

import re
from collections.abc import Iterator
from pathlib import Path

from starflow2_jax.commands.arguments import Number, OutputFolder, Whole
from starflow2_jax.commands.model import SEED, add_model, restore
from starflow2_jax.data.documents import Document, Image, Text, read_image, write_image
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.events import Event, Picture, Words

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")


def add(commands) -> None:
    p = commands.add_parser("chat", help="chat with a model in the terminal")
    add_model(p)
    p.add_argument(
        "--out",
        type=OutputFolder(),
        default="chat",
        metavar="DIR",
        help="folder for the images that the model draws (default: chat)",
    )
    p.add_argument(
        "--temperature",
        type=Number(0),
        default=0.0,
        metavar="T",
        help="temperature of text; 0 takes the most likely token (default: 0)",
    )
    p.add_argument(
        "--image-temperature", type=Number(0), default=0.9, metavar="T", help="temperature of images (default: 0.9)"
    )
    p.add_argument(
        "--guidance",
        type=Number(0),
        default=1.0,
        metavar="W",
        help="guidance weight of images; 0 turns guidance off (default: 1)",
    )
    p.add_argument(
        "--max-tokens",
        type=Whole(1),
        metavar="N",
        help="length of an answer in tokens, image tokens included (default: enough for two images, at least 128)",
    )
    p.add_argument(
        "--images",
        choices=("flow", "vit"),
        default="flow",
        help="how the model sees your images: as flow tokens (default), or through its vision tower, to understand only",
    )
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="random seed (default: 0)")
    p.set_defaults(run=run)


def run(args, _) -> None:
    from starflow2_jax.sampling.chat import Chat
    from starflow2_jax.sampling.rows import SampleOptions

    options = SampleOptions(args.temperature, args.image_temperature, args.guidance, args.max_tokens)
    converse(Chat(restore(args), options, args.seed), Path(args.out), args.images)


def converse(chat, out: Path, via: str = "flow") -> None:
    """Read lines and print answers until /quit, the end of the input, or Ctrl-C. `via`: how the model sees the user's images."""
    print("Say something; an image is /image PATH or a path to one, in quotes where it has spaces; /quit ends it.")
    number = 1 + max((int(file.stem) for file in out.glob("*") if file.stem.isdigit()), default=-1)
    while True:
        try:
            line = input("> ").strip()
            line.encode()  # bytes that are not UTF-8 arrive as lone surrogates
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeError:
            print("! the line is not valid UTF-8; check the terminal's encoding")
            continue
        if line == "/quit":
            return
        if not line:
            continue
        try:
            answer = chat.stream(parse(line, chat.sampler.codec.image_channels, via))
            number += show(answer, out, number, chat.sampler.codec.is_pixels)
        except UserError as error:
            print(f"! {error}")
        except KeyboardInterrupt:
            print("\ninterrupted")
            return


def show(answer: Iterator[Event], out: Path, number: int, is_pixels: bool = True) -> int:
    """Print an answer while the model writes it, and save its images in `out`, numbered from `number` on.

    Returns the number of images.
    """
    images, begun = 0, False  # begun: whether the current line has words
    for event in answer:
        if isinstance(event, Words) and (text := event.text if begun else event.text.lstrip()):
            print(text, end="", flush=True)
            begun = True
        elif isinstance(event, Picture):
            out.mkdir(parents=True, exist_ok=True)
            path = write_image(out / f"{number + images:03d}", event.pixels, is_pixels)
            print(f"\n[{path}]" if begun else f"[{path}]")
            images, begun = images + 1, False
    if begun:
        print()
    return images


def parse(line: str, channels: int, via: str = "flow") -> Document:
    """A line -> a document. "/image PATH", or a word that is the path of an image, becomes an image; other words are text.

    A path with spaces stands in double quotes. `channels`: of the model's images. Raises DocumentError.
    """
    parts: Document = []
    words: list[str] = []
    given = iter(re.split(r' (?=(?:[^"]*"[^"]*")*[^"]*$)', line))  # at spaces outside of quotes
    for word in given:
        path = (next(given, "") if word == "/image" else word).strip('"')
        if word == "/image" or (path.lower().endswith(SUFFIXES) and Path(path).is_file()):
            parts += [Text(" ".join(words))] if any(words) else []
            words.clear()
            parts.append(Image(read_image(path, channels), via=via))
        else:
            words.append(word)
    return parts + ([Text(" ".join(words))] if any(words) else [])
