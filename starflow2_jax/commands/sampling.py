"""`starflow2 sample`, `score`, `rank`, `invert` and `calibrate`."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

from starflow2_jax.commands.arguments import (
    Commands,
    InputFile,
    Number,
    OutputFile,
    OutputFolder,
    Whole,
    Words,
    require_writable,
)
from starflow2_jax.commands.model import SEED, add_model, image_reader, restore
from starflow2_jax.commands.sampling_options import add_sampling, sample_options
from starflow2_jax.errors import UserError


def add(commands: Commands) -> None:
    """Add `starflow2 sample`, `score`, `rank`, `invert` and `calibrate` to the command line."""
    for command in (_add_sample, _add_score, _add_rank, _add_invert, _add_calibrate):
        command(commands)


def _add_sample(commands: Commands) -> None:
    p = commands.add_parser("sample", help="let a model answer prompts with text and images")
    add_model(p)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=Words(), metavar="TEXT", help="prompt of text alone")
    what.add_argument(
        "--document",
        type=InputFile(),
        metavar="FILE",
        help='JSON file with one prompt: a list of {"text": ...} and {"image": PATH} parts',
    )
    what.add_argument(
        "--documents",
        type=InputFile(),
        metavar="FILE",
        help="JSONL file with one such prompt per line; if --out holds answers to some of them, only the rest are run",
    )
    p.add_argument(
        "--chat", action="store_true", help="put the prompt into the tokenizer's chat template, as a user's message"
    )
    p.add_argument("--num", type=Whole(1, 10**6), default=1, metavar="N", help="answers per prompt (default: 1)")
    p.add_argument(
        "--batch", type=Whole(1), default=16, metavar="N", help="prompts of --documents to run at a time (default: 16)"
    )
    add_sampling(p, names={"image_temperature": "--temperature", "temperature": "--text-temperature"})
    p.add_argument(
        "--denoise", action="store_true", help="remove the training noise from the images by one step along the score"
    )
    p.add_argument("--seed", type=SEED, default=0, metavar="N", help="random seed of the first answer (default: 0)")
    p.add_argument(
        "--out", type=OutputFolder(), default="samples", metavar="DIR", help="folder for the answers (default: samples)"
    )
    p.set_defaults(run=_sample, kept="finished answers are kept in --out")


def _sample(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.data.documents import Text
    from starflow2_jax.data.json_documents import read_document
    from starflow2_jax.data.jsonl import JsonlDocuments
    from starflow2_jax.sampling import batch_files

    options = sample_options(args)
    images, out = image_reader(args), Path(args.out)
    documents = document = None
    if args.documents:
        documents = JsonlDocuments(args.documents)
        documents.read(0, images)  # a file of another kind is refused before the model is loaded
    else:
        document = read_document(args.document, images) if args.document else [Text(args.prompt)]
    sampler = restore(args)
    options = options.sized(sampler.model.cfg.tokens)
    if documents is not None:
        prompts = [
            _prompt(args, sampler, options, partial(documents.read, i, images), i, f"{args.documents}, document {i}: ")
            for i in range(len(documents))
        ]
        batch_files.begin(out, _run(args, options, sampler))
        batch_files.write(sampler, prompts, out, args.batch, args.denoise)
    else:
        lines = batch_files.write_anew(sampler, _prompt(args, sampler, options, lambda: document), out, args.denoise)
        for i, line in enumerate(lines):
            print(f"{i:03d}", *(part.get("text") or f"[{out / part['image']}]" for part in line["parts"]))
    print(f"compiled {len(sampler.programs)} programs", file=sys.stderr)


def _prompt(args, sampler, options, read, index: int = 0, where: str = ""):
    from starflow2_jax.data.tokenizer import chat
    from starflow2_jax.sampling.batch_files import Prompt
    from starflow2_jax.sampling.prompts import spoken

    def prompt():
        said = spoken(sampler.tokenizer, read())
        return chat(sampler.tokenizer, [("user", said)]) if args.chat else said

    first = args.seed + index * args.num
    return Prompt(index, prompt, options, tuple(range(first, first + args.num)), where)


def _run(args, options, sampler) -> dict:
    """Everything that determines the answers to a file of documents."""
    from starflow2_jax.evaluation.user_files import sha256
    from starflow2_jax.sampling import batch_files

    own = {
        "documents": sha256(Path(args.documents))[:16],
        "num": args.num,
        "chat": args.chat,
        "denoise": args.denoise,
    }
    return asdict(options) | batch_files.about(sampler, args.checkpoint, args.dtype, args.seed) | own


def _add_score(commands: Commands) -> None:
    p = commands.add_parser("score", help="compute the exact log-likelihood of the marked parts of documents")
    add_model(p)
    p.add_argument(
        "--document",
        type=InputFile(),
        required=True,
        metavar="FILE",
        help='JSON file with one document, or JSONL file with one per line; parts marked "predict" or "generate" are '
        "scored",
    )
    p.add_argument(
        "--out",
        type=OutputFile(),
        metavar="FILE",
        help="write to this JSONL file, one part per line (default: print)",
    )
    p.set_defaults(run=_score)


def _score(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.data.json_documents import read_document
    from starflow2_jax.data.jsonl import JsonlDocuments
    from starflow2_jax.sampling.scoring import score

    images = image_reader(args)
    if args.document.endswith(".jsonl"):
        lines = JsonlDocuments(args.document)
        documents = [lines.read(i, images) for i in range(len(lines))]
    else:
        documents = [read_document(args.document, images)]
    scores = score(restore(args), documents)
    written = [json.dumps({"document": i, **part.summary()}) for i, parts in enumerate(scores) for part in parts]
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("\n".join(written) + "\n", encoding="utf-8")
        print(f"written: {args.out}")
    else:
        print("\n".join(written))


def _add_rank(commands: Commands) -> None:
    p = commands.add_parser("rank", help="rank captions by how well they fit an image")
    add_model(p)
    p.add_argument("--image", type=InputFile(), required=True, metavar="FILE", help="image file")
    p.add_argument(
        "--captions", type=InputFile(), required=True, metavar="FILE", help="text file with one caption per line"
    )
    p.add_argument(
        "--by",
        choices=("image", "text"),
        default="image",
        help="image: rank by p(image | caption) / p(image), the default; text: by p(caption | image)",
    )
    p.set_defaults(run=_rank)


def _rank(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.sampling.scoring import describe, illustrate, rank
    from starflow2_jax.text_files import read_lines

    captions = read_lines(args.captions)
    if not captions:
        raise UserError(f"{args.captions} has no captions; write one per line")
    image = image_reader(args).file(args.image).pixels
    by_image = args.by == "image"
    for caption, nats in rank(restore(args), image, captions, by_image, illustrate if by_image else describe):
        print(json.dumps({"caption": caption, "nats": nats}))


def _add_invert(commands: Commands) -> None:
    p = commands.add_parser(
        "invert",
        help="turn an image into noise under one prompt, and that noise into an image under another",
    )
    add_model(p)
    p.add_argument("--prompt", type=Words(), required=True, metavar="TEXT", help="prompt that describes the image")
    p.add_argument("--image", type=InputFile(), required=True, metavar="FILE", help="image file")
    p.add_argument(
        "--as-prompt", type=Words(), required=True, metavar="TEXT", help="prompt that describes the new image"
    )
    p.add_argument(
        "--out",
        type=OutputFile(),
        required=True,
        metavar="FILE",
        help="file for the new image; the suffix becomes .png, or .npy for latents",
    )
    p.set_defaults(run=_invert)


def _invert(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.data.images import write_image
    from starflow2_jax.sampling.noise_space import decode, encode
    from starflow2_jax.sampling.prompts import spoken

    pixels = image_reader(args).file(args.image).pixels
    sampler = restore(args)
    here, there = (spoken(sampler.tokenizer, prompt) for prompt in (args.prompt, args.as_prompt))
    z = encode(sampler, [here], [pixels])
    [image] = decode(sampler, [there], z)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    print(f"written: {write_image(Path(args.out), image, sampler.codec.makes_pixels)}")


def _add_calibrate(commands: Commands) -> None:
    about = "find the fastest way to sample on this machine, and store it in the checkpoint"
    p = commands.add_parser("calibrate", help=about)
    add_model(p, fsdp=False)
    p.add_argument(
        "--prompt",
        type=Words(),
        action="append",
        default=[],
        metavar="TEXT",
        help="prompt that asks for an image; may be repeated",
    )
    p.add_argument(
        "--guidance",
        type=Number(0, 100),
        default=1.0,
        metavar="W",
        help="guidance weight of images; has no effect without --prompt (default: 1)",
    )
    p.add_argument(
        "--tolerance",
        type=Number(0),
        default=1e-3,
        metavar="E",
        help="largest relative squared error of a block's output (default: 0.001)",
    )
    p.add_argument(
        "--batch", type=Whole(1, 10**4), default=16, metavar="N", help="images to draw at a time (default: 16)"
    )
    p.set_defaults(run=_calibrate)


def _calibrate(args: Namespace, _: list[str]) -> None:
    from starflow2_jax.sampling.calibration import calibrate_checkpoint, table
    from starflow2_jax.sampling.prompts import spoken

    require_writable("--checkpoint", args.checkpoint)
    sampler = restore(args, data=1)
    prompts = [spoken(sampler.tokenizer, prompt) for prompt in args.prompt or [""]]
    print(table(calibrate_checkpoint(sampler, args.checkpoint, prompts, args.guidance, args.tolerance, args.batch)))
    print(f"written: {Path(args.checkpoint) / 'inversion.json'}")
