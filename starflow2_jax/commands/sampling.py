"""sample, score, rank, invert, calibrate."""

import hashlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from starflow2_jax.commands.model import add_model, restore
from starflow2_jax.errors import UserError


def add(commands) -> None:
    for command in (_add_sample, _add_score, _add_rank, _add_invert, _add_calibrate):
        command(commands)


def _add_sample(commands) -> None:
    p = commands.add_parser("sample", help="continue prompts with text and images", allow_abbrev=False)
    add_model(p)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text")
    what.add_argument("--document", help='JSON file: a list of {"text": ...} and {"image": path} parts')
    what.add_argument("--documents", help="JSONL file, such a list a line; what is in --out already is not done again")
    p.add_argument(
        "--chat", action="store_true", help="it is what a user says; the tokenizer's chat template goes round it"
    )
    p.add_argument("--num", type=int, default=1, help="samples of each")
    p.add_argument("--batch", type=int, default=16, help="prompts of --documents at a time")
    p.add_argument("--guidance", type=float, default=1.0, help="of images; 0: none")
    p.add_argument(
        "--image-guidance", type=float, help="given: --guidance is of the text alone, this of the images before"
    )
    p.add_argument("--linear", action="store_true", help="guidance by extrapolation instead of Gaussian mixing")
    p.add_argument("--annealed", action="store_true", help="guidance grows over an image's tokens")
    p.add_argument("--temperature", type=float, default=0.9, help="of the images")
    p.add_argument("--text-temperature", type=float, default=0.0, help="0: the most likely token")
    p.add_argument("--top-k", type=int, default=0, help="draw text from the k most likely tokens; 0: from all")
    p.add_argument("--top-p", type=float, default=1.0, help="draw text from the fewest tokens of this probability")
    p.add_argument(
        "--max-tokens", type=int, help="positions to write, image tokens included (default: two images' worth)"
    )
    p.add_argument("--max-images", type=int, help="of an answer; 0: text only")
    p.add_argument("--image-first", action="store_true", help="begin the answer with an image")
    p.add_argument("--stop", action="append", default=[], help="text that ends the answer; may be given several times")
    p.add_argument("--jacobi", type=int, default=0, help="image tokens solved for at once; 0: as calibrated, else 1")
    p.add_argument(
        "--tolerance", type=float, default=1e-3, help="of --jacobi above 1: mean squared change over mean square"
    )
    p.add_argument("--denoise", action="store_true", help="remove the training noise from the images, by the score")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="samples")
    p.set_defaults(run=_sample, kept="the samples that are finished stand in --out")


def _sample(args, _) -> None:
    from starflow2_jax.data.documents import Text, read_document
    from starflow2_jax.data.jsonl import JsonlDocuments
    from starflow2_jax.sampling import batch_files

    options = _options(args)
    sampler, out = restore(args), Path(args.out)
    options = options.sized(sampler.model.cfg.tokens)
    channels = sampler.codec.image_channels
    if args.documents:
        documents = JsonlDocuments(args.documents, channels)
        prompts = [
            _prompt(args, sampler, options, partial(documents.__getitem__, i), i, f"{args.documents}, document {i}: ")
            for i in range(len(documents))
        ]
        batch_files.begin(out, _run(args, options, sampler))
        batch_files.write(sampler, prompts, out, args.batch, args.denoise)
    else:
        document = [Text(args.prompt)] if args.prompt is not None else read_document(args.document, channels)
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
    """What makes the answers to a file of documents."""
    from starflow2_jax.sampling import batch_files

    return asdict(options) | batch_files.about(sampler, args.checkpoint, args.dtype, args.seed) | {
        "documents": hashlib.sha256(Path(args.documents).read_bytes()).hexdigest()[:16],
        "num": args.num, "chat": args.chat, "denoise": args.denoise,
    }  # fmt: skip


def _options(args):
    """The command line as SampleOptions. Raises UserError for numbers that mean nothing."""
    from starflow2_jax.sampling.rows import SampleOptions

    least = dict(num=1, batch=1, max_tokens=1, jacobi=0, guidance=0, image_guidance=0, temperature=0, text_temperature=0,
                 top_k=0, top_p=0, max_images=0, tolerance=0)  # fmt: skip
    if wrong := [n for n, low in least.items() if getattr(args, n) is not None and not getattr(args, n) >= low]:
        raise UserError(f"--{wrong[0].replace('_', '-')} is at least {least[wrong[0]]}")
    return SampleOptions(
        args.text_temperature, args.temperature, args.guidance, args.max_tokens, args.image_first, args.top_k,
        args.top_p, args.image_guidance, args.linear, args.annealed, args.max_images, tuple(args.stop), args.jacobi,
        args.tolerance,
    )  # fmt: skip


def _add_score(commands) -> None:
    p = commands.add_parser("score", help="log-likelihood of each part that counts", allow_abbrev=False)
    add_model(p)
    p.add_argument("--document", required=True, help='JSON, or JSONL of many: parts with "predict" or "generate" count')
    p.add_argument("--out", help="JSONL file, one part a line (default: printed)")
    p.set_defaults(run=_score)


def _score(args, _) -> None:
    from starflow2_jax.data.documents import read_document
    from starflow2_jax.data.jsonl import JsonlDocuments
    from starflow2_jax.sampling.scoring import score

    sampler = restore(args)
    read = JsonlDocuments if args.document.endswith(".jsonl") else lambda *a: [read_document(*a)]
    scores = score(sampler, list(read(args.document, sampler.codec.image_channels)))
    lines = [json.dumps({"document": i, **part.summary()}) for i, parts in enumerate(scores) for part in parts]
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("\n".join(lines) + "\n")
        print(f"written: {args.out}")
    else:
        print("\n".join(lines))


def _add_rank(commands) -> None:
    p = commands.add_parser("rank", help="captions by how well they explain an image", allow_abbrev=False)
    add_model(p)
    p.add_argument("--image", required=True)
    p.add_argument("--captions", required=True, help="text file, one a line")
    p.add_argument("--by", choices=("image", "text"), default="image", help="p(image | caption), or p(caption | image)")
    p.set_defaults(run=_rank)


def _rank(args, _) -> None:
    from starflow2_jax.data.documents import read_image, read_text
    from starflow2_jax.sampling.scoring import describe, illustrate, rank

    captions = [line for line in read_text(Path(args.captions)).splitlines() if line.strip()]
    sampler = restore(args)
    image = read_image(args.image, sampler.codec.image_channels)
    by_image = args.by == "image"
    for caption, nats in rank(sampler, image, captions, by_image, illustrate if by_image else describe):
        print(json.dumps({"caption": caption, "nats": nats}))


def _add_invert(commands) -> None:
    p = commands.add_parser("invert", help="an image's noise under one prompt as another's image", allow_abbrev=False)
    add_model(p)
    p.add_argument("--prompt", required=True, help="what the image is")
    p.add_argument("--image", required=True)
    p.add_argument("--as-prompt", required=True, help="what it is to be")
    p.add_argument("--out", required=True, help="image file; its suffix becomes that of what is written")
    p.set_defaults(run=_invert)


def _invert(args, _) -> None:
    from starflow2_jax.data.documents import read_image, write_image
    from starflow2_jax.sampling.noise_space import decode, encode
    from starflow2_jax.sampling.prompts import spoken

    sampler = restore(args)
    here, there = (spoken(sampler.tokenizer, prompt) for prompt in (args.prompt, args.as_prompt))
    z = encode(sampler, [here], [read_image(args.image, sampler.codec.image_channels)])
    [image] = decode(sampler, [there], z)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    print(f"written: {write_image(Path(args.out), image, sampler.codec.is_pixels)}")


def _add_calibrate(commands) -> None:
    about = (
        "measure the fastest inverse of both flows: the checkpoint gets inversion.json, and samples by it from then on"
    )
    p = commands.add_parser("calibrate", help=about, allow_abbrev=False)
    add_model(p, fsdp=False)
    p.add_argument(
        "--prompt", action="append", default=[], help="what images are asked for with; may be given several times"
    )
    p.add_argument("--guidance", type=float, default=1.0, help="of the images; nothing changes by it without a prompt")
    p.add_argument("--tolerance", type=float, default=1e-3, help="relative squared error of a block's output at most")
    p.add_argument("--batch", type=int, default=16, help="images drawn at a time")
    p.set_defaults(run=_calibrate)


def _calibrate(args, _) -> None:
    from starflow2_jax.sampling.calibration import calibrate_checkpoint, table
    from starflow2_jax.sampling.prompts import spoken

    if args.batch < 1 or not args.tolerance >= 0 or not args.guidance >= 0:
        raise UserError("--batch is at least 1, --tolerance and --guidance at least 0")
    sampler = restore(args, data=1)
    prompts = [spoken(sampler.tokenizer, prompt) for prompt in args.prompt or [""]]
    print(table(calibrate_checkpoint(sampler, args.checkpoint, prompts, args.guidance, args.tolerance, args.batch)))
    print(f"written: {Path(args.checkpoint) / 'inversion.json'}")
