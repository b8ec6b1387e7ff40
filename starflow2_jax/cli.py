"""`starflow2`: plumbing from the command line to the library."""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from starflow2_jax.commands import chat, serve
from starflow2_jax.errors import UserError


def main(argv: list[str] | None = None) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it need not tell that there is no PyTorch
    parser = argparse.ArgumentParser(prog="starflow2", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (
        _add_train, _add_init, _add_sample, _add_score, _add_rank, _add_invert, _add_calibrate, _add_eval, _add_convert, _add_quickstart,
        chat.add, serve.add,
    ):  # fmt: skip
        add(commands)
    args, rest = parser.parse_known_args(argv)
    overridden = [r for r in rest if r.startswith("--config.")]
    overrides = [r.removeprefix("--config.") for r in overridden]
    if unknown := [r for r in rest if r not in overridden or not hasattr(args, "config")]:
        parser.error(f"unknown argument {unknown[0]!r}")
    try:
        args.run(args, overrides)
    except UserError as error:
        print(f"starflow2: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        stands = "the last checkpoint stands" if args.command in ("train", "quickstart") else "nothing was written"
        print(f"starflow2: interrupted; {stands}", file=sys.stderr)
        return 130
    return 0


def _add_train(commands) -> None:
    p = commands.add_parser("train", help="run an experiment's stages, or go on with them", allow_abbrev=False)
    p.add_argument("--config", required=True, help="experiment file; --config.KEY=VALUE overrides a key")
    p.add_argument("--out", default=None, help="checkpoint directory (default: runs/NAME of the experiment)")
    p.add_argument("--runlocal", action="store_true", help="shrink it to a few steps")
    p.set_defaults(run=_train)


def _train(args, overrides) -> None:
    from starflow2_jax import config as configs

    config = configs.load(args.config, overrides, args.runlocal)
    out = args.out or f"runs/{Path(args.config).stem}"
    _devices(config.cpu_devices)
    from starflow2_jax.training.loop import Trainer

    Trainer(config, out).run()
    print(f"checkpoint: {out}")


def _devices(cpu_devices: int) -> None:
    """Before JAX starts: that many CPU devices, where there is no accelerator."""
    import jax

    jax.config.update("jax_num_cpu_devices", cpu_devices)


def _add_init(commands) -> None:
    p = commands.add_parser("init", help="begin a run on a converted VLM", allow_abbrev=False)
    p.add_argument("--vlm", required=True, help="checkpoint that `starflow2 convert` made")
    p.add_argument("--config", required=True, help="experiment file; --config.key=value overrides a key")
    p.add_argument("--out", required=True, help="new checkpoint directory")
    p.set_defaults(run=_init)


def _init(args, overrides) -> None:
    from starflow2_jax import config as configs

    config = configs.load(args.config, overrides)
    _devices(config.cpu_devices)
    from starflow2_jax.training.loop import Trainer

    Trainer.begin(config, args.out, args.vlm)
    print(f"ready: starflow2 train --config {args.config} --out {args.out}")


def _add_sample(commands) -> None:
    p = commands.add_parser("sample", help="continue a prompt with text and images", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="text")
    what.add_argument("--document", help='JSON file: a list of {"text": ...} and {"image": path} parts')
    p.add_argument(
        "--chat", action="store_true", help="it is what a user says; the tokenizer's chat template goes round it"
    )
    p.add_argument("--num", type=int, default=1, help="samples of it")
    p.add_argument("--guidance", type=float, default=1.0, help="0: none")
    p.add_argument("--temperature", type=float, default=0.9, help="of the images; text is the most likely one")
    p.add_argument("--text-temperature", type=float, default=0.0, help="0: the most likely token")
    p.add_argument("--max-tokens", type=int, default=128, help="positions to write, image tokens included")
    p.add_argument("--image-first", action="store_true", help="begin the answer with an image")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="samples")
    p.set_defaults(run=_sample)


def _sample(args, _) -> None:
    from starflow2_jax.data.documents import DocumentError, Image, Text, read_document, write_image
    from starflow2_jax.data.tokenizer import chat
    from starflow2_jax.sampling.engine import SampleOptions, Sampler

    if args.num < 1 or args.max_tokens < 1 or args.guidance < 0 or args.temperature < 0 or args.text_temperature < 0:
        raise DocumentError("--num and --max-tokens are at least 1, --guidance and temperatures at least 0")
    sampler = Sampler.restore(args.checkpoint)
    channels = sampler.codec.image_channels
    prompt = [Text(args.prompt)] if args.prompt is not None else read_document(args.document, channels)
    if args.chat:
        prompt = chat(sampler.tokenizer, [("user", prompt)])
    options = SampleOptions(args.text_temperature, args.temperature, args.guidance, args.max_tokens, args.image_first)
    documents = sampler.generate([prompt] * args.num, options, args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    listing = []
    for i, document in enumerate(documents):
        parts = []
        for k, part in enumerate(document):
            if isinstance(part, Image):
                parts.append({"image": write_image(out / f"{i:03d}_{k}", part.pixels).name})
            else:
                parts.append({"text": part.text})
        listing.append(parts)
        print(f"{i:03d}", *(p.get("text") or f"[{out / p['image']}]" for p in parts))
    (out / "samples.json").write_text(json.dumps(listing, indent=1))


def _add_score(commands) -> None:
    p = commands.add_parser("score", help="log-likelihood of each part that counts", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--document", required=True, help='JSON, or JSONL of many: parts with "predict" or "generate" count')
    p.add_argument("--out", help="JSONL file, one part a line (default: printed)")
    p.set_defaults(run=_score)


def _score(args, _) -> None:
    from starflow2_jax.data.documents import JsonlDocuments, read_document
    from starflow2_jax.sampling.engine import Sampler
    from starflow2_jax.sampling.scoring import score

    sampler = Sampler.restore(args.checkpoint)
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
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--image", required=True)
    p.add_argument("--captions", required=True, help="text file, one a line")
    p.add_argument("--by", choices=("image", "text"), default="image", help="p(image | caption), or p(caption | image)")
    p.set_defaults(run=_rank)


def _rank(args, _) -> None:
    from starflow2_jax.data.documents import read_image, read_text
    from starflow2_jax.sampling.engine import Sampler
    from starflow2_jax.sampling.scoring import describe, illustrate, rank

    captions = [line for line in read_text(Path(args.captions)).splitlines() if line.strip()]
    sampler = Sampler.restore(args.checkpoint)
    image = read_image(args.image, sampler.codec.image_channels)
    by_image = args.by == "image"
    for caption, nats in rank(sampler, image, captions, by_image, illustrate if by_image else describe):
        print(json.dumps({"caption": caption, "nats": nats}))


def _add_invert(commands) -> None:
    p = commands.add_parser("invert", help="an image's noise under one prompt as another's image", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--prompt", required=True, help="what the image is")
    p.add_argument("--image", required=True)
    p.add_argument("--as-prompt", required=True, help="what it is to be")
    p.add_argument("--out", required=True, help="image file; its suffix becomes that of what is written")
    p.set_defaults(run=_invert)


def _invert(args, _) -> None:
    from starflow2_jax.data.documents import Text, read_image, write_image
    from starflow2_jax.sampling.engine import Sampler
    from starflow2_jax.sampling.exact import decode, encode

    sampler = Sampler.restore(args.checkpoint)
    z = encode(sampler, [[Text(args.prompt)]], [read_image(args.image, sampler.codec.image_channels)])
    [image] = decode(sampler, [[Text(args.as_prompt)]], z)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    print(f"written: {write_image(Path(args.out), image)}")


def _add_calibrate(commands) -> None:
    p = commands.add_parser("calibrate", help="measure the fastest inverse of the shallow flow", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, help="it gets inversion.json, and samples by it from then on")
    p.add_argument("--tolerance", type=float, default=1e-3, help="relative squared error of a block's output at most")
    p.add_argument("--batch", type=int, default=16, help="images decoded at a time")
    p.set_defaults(run=_calibrate)


def _calibrate(args, _) -> None:
    from starflow2_jax.sampling.inversion import calibrate_checkpoint, table

    if args.batch < 1 or not args.tolerance >= 0:
        raise UserError("--batch is at least 1, --tolerance at least 0")
    print(table(calibrate_checkpoint(args.checkpoint, args.tolerance, args.batch)))
    print(f"written: {Path(args.checkpoint) / 'inversion.json'}")


def _add_eval(commands) -> None:
    p = commands.add_parser("eval", help="the digits report's numbers of a checkpoint", allow_abbrev=False)
    p.add_argument("--checkpoint", required=True)
    p.add_argument("--limit", type=int, default=300, help="documents a task at most")
    p.set_defaults(run=_eval)


def _eval(args, _) -> None:
    from starflow2_jax.evaluation.digits import evaluate
    from starflow2_jax.sampling.engine import Sampler

    numbers, _ = evaluate(Sampler.restore(args.checkpoint), args.limit)
    print(json.dumps(numbers, indent=1))


def _add_convert(commands) -> None:
    p = commands.add_parser("convert", help="other people's weights <-> a checkpoint", allow_abbrev=False)
    p.add_argument("model", choices=("qwen2_5_vl",))
    p.add_argument("--from", dest="source", required=True, help="folder of the reference; with --to-hf a checkpoint")
    to = p.add_mutually_exclusive_group(required=True)
    to.add_argument("--to", help="new checkpoint of the frozen VLM")
    to.add_argument("--to-hf", help="new folder of safetensors files, as the reference library saves it")
    p.add_argument("--shard-gb", type=float, default=4.0, help="size of a safetensors file at most (with --to-hf)")
    p.set_defaults(run=_convert)


def _convert(args, _) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # it is all reading and writing
    from starflow2_jax.weights import convert

    if args.to:
        convert.to_checkpoint(args.source, args.to)
    else:
        convert.to_reference(args.source, args.to_hf, int(args.shard_gb * 10**9))
    print(f"written: {args.to or args.to_hf}")


def _add_quickstart(commands) -> None:
    p = commands.add_parser("quickstart", help="train, sample and evaluate on real digits", allow_abbrev=False)
    p.add_argument("--out", default="quickstart")
    p.add_argument("--smoke", action="store_true", help="the same path, a few steps of each stage")
    p.set_defaults(run=_quickstart)


def _quickstart(args, _) -> None:
    from starflow2_jax import config as configs

    begin = time.time()
    experiment = Path(__file__).parent.parent / "experiments" / "digits_quick.py"
    config = configs.load(experiment, runlocal=args.smoke)
    _devices(config.cpu_devices)
    from starflow2_jax.evaluation.digits import AIMS, evaluate
    from starflow2_jax.evaluation.report import write_report
    from starflow2_jax.sampling.engine import Sampler
    from starflow2_jax.training.loop import Trainer

    out = Path(args.out)
    Trainer(config, out / "checkpoint").run()
    trained = time.time()
    print("sampling and evaluating ...")
    numbers, samples = evaluate(Sampler.restore(out / "checkpoint"), limit=20 if args.smoke else 300)
    times = {"train_seconds": trained - begin, "total_seconds": time.time() - begin}
    report = {**numbers, **{k: round(v, 1) for k, v in times.items()}, "smoke": args.smoke, "aims": AIMS}
    write_report(out, report, samples, out / "checkpoint" / "metrics" / "metrics.jsonl")
    print(json.dumps({k: v for k, v in report.items() if k != "aims"}, indent=1))
    print(f"open {out / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
