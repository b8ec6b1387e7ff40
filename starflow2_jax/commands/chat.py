"""`starflow2 chat`: a conversation in the terminal."""

import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from starflow2_jax.commands.arguments import Commands, OutputFolder
from starflow2_jax.commands.model import SEED, add_model, restore
from starflow2_jax.commands.sampling_options import add_images, add_sampling, sample_options
from starflow2_jax.data.documents import Document, Text
from starflow2_jax.data.images import ImageReader, reader_of, write_image
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.events import Event, Picture, Words

if TYPE_CHECKING:
    from starflow2_jax.sampling.chat import Chat

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")


def add(commands: Commands) -> None:
    """Add `starflow2 chat` to the command line."""
    p = commands.add_parser("chat", help="chat with a model in the terminal")
    add_model(p)
    p.add_argument(
        "--out",
        type=OutputFolder(),
        default="chat",
        metavar="DIR",
        help="folder for the images that the model draws (default: chat)",
    )
    add_sampling(p, ("temperature", "image_temperature", "guidance", "max_tokens"))
    add_images(p, "your images")
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="random seed (default: 0)")
    p.set_defaults(run=run, kept="the images that were drawn are kept in --out")


def run(args: Namespace, _: list[str]) -> None:
    """Chat until the user ends it. `args`: the command's options."""
    from starflow2_jax.sampling.chat import Chat

    options = sample_options(args)
    converse(Chat(restore(args), options, args.seed), Path(args.out), args.images)


def converse(chat: "Chat", out: Path, via: str = "flow") -> None:
    """Read lines and print answers until /quit, the end of the input, or Ctrl-C.

    `out`: folder for the images that the model draws. `via`: how the model sees the user's images, "flow" or "vit".
    """
    print('Say something. To show an image, write "/image PATH" or just its path, in "quotes" if it has spaces.')
    print("/quit ends the chat.")
    reader = reader_of(chat.sampler.codec)
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
            answer = chat.stream(parse(line, reader, via))
            number += show(answer, out, number, chat.sampler.codec.makes_pixels)
        except UserError as error:
            print(f"! {error}")
        except KeyboardInterrupt:
            print("\ninterrupted")
            return


def show(answer: Iterator[Event], out: Path, number: int, is_pixels: bool = True) -> int:
    """Print an answer while the model writes it, and save its images in `out`. Returns the number of images.

    `number`: of the first image, in the names of the files.
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


def parse(line: str, reader: ImageReader, via: str = "flow") -> Document:
    """The document that a line stands for. "/image PATH", or a word that is an image's path, is an image; the rest is
    text.

    A path with spaces is in double quotes. `reader`: of the images; `via`: see `converse`.
    Raises DocumentError for a file that is no image.
    """
    parts: Document = []
    words: list[str] = []
    given = iter(re.split(r' (?=(?:[^"]*"[^"]*")*[^"]*$)', line))  # at spaces outside of quotes
    for word in given:
        path = (next(given, "") if word == "/image" else word).strip('"')
        if word == "/image" or (path.lower().endswith(SUFFIXES) and Path(path).is_file()):
            parts += [Text(" ".join(words))] if any(words) else []
            words.clear()
            parts.append(reader.file(path, via))
        else:
            words.append(word)
    return parts + ([Text(" ".join(words))] if any(words) else [])
