"""`starflow2 chat`: a conversation in the terminal."""

from pathlib import Path

from starflow2_jax.commands.model import add_model, restore
from starflow2_jax.data.documents import Document, DocumentError, Image, Text, read_image, write_image
from starflow2_jax.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".npy")


def add(commands) -> None:
    p = commands.add_parser("chat", help="talk with a model in the terminal", allow_abbrev=False)
    add_model(p)
    p.add_argument("--out", default="chat", help="folder for the images that it writes")
    p.add_argument("--temperature", type=float, default=0.0, help="of text; 0: the most likely token")
    p.add_argument("--image-temperature", type=float, default=0.9)
    p.add_argument("--guidance", type=float, default=1.0, help="of images; 0: none")
    p.add_argument("--max-tokens", type=int, default=128, help="positions of an answer, image tokens included")
    p.add_argument("--seed", type=int, default=0)
    p.set_defaults(run=run)


def run(args, _) -> None:
    from starflow2_jax.sampling.chat import Chat
    from starflow2_jax.sampling.engine import SampleOptions

    if args.max_tokens < 1 or min(args.temperature, args.image_temperature, args.guidance) < 0:
        raise DocumentError("--max-tokens is at least 1, --guidance and temperatures at least 0")
    sampler = restore(args)
    options = SampleOptions(args.temperature, args.image_temperature, args.guidance, args.max_tokens)
    converse(Chat(sampler, options, args.seed), Path(args.out))


def converse(chat, out: Path) -> None:
    """Line by line until /quit, the end of the input, or Ctrl-C."""
    print("Say something; an image is /image PATH or a path to one; /quit ends it.")
    number = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if not line:
            continue
        try:
            for part in chat.say(parse(line, chat.sampler.codec.image_channels)):
                if isinstance(part, Text):
                    print(part.text.strip())
                else:
                    out.mkdir(parents=True, exist_ok=True)
                    print(f"[{write_image(out / f'{number:03d}', part.pixels)}]")
                    number += 1
        except UserError as error:
            print(f"! {error}")
        except KeyboardInterrupt:
            print("\ninterrupted")
            return


def parse(line: str, channels: int) -> Document:
    """A line -> a document: words, and images as /image PATH or as words that are paths of images. Raises DocumentError."""
    parts: Document = []
    words: list[str] = []
    given = iter(line.split(" "))
    for word in given:
        path = next(given, "") if word == "/image" else word
        if word == "/image" or (path.lower().endswith(SUFFIXES) and Path(path).is_file()):
            parts += [Text(" ".join(words))] if any(words) else []
            words.clear()
            parts.append(Image(read_image(path, channels)))
        else:
            words.append(word)
    return parts + ([Text(" ".join(words))] if any(words) else [])
