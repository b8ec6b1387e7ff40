"""Options by which several commands say how an answer is drawn: one row for each field of `SampleOptions`."""

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from starflow2_jax.commands.arguments import Number, Whole, Words

if TYPE_CHECKING:
    from starflow2_jax.sampling.rows import SampleOptions

# Field of SampleOptions -> what argparse needs to know about its option, which is named after the field.
OPTIONS: dict[str, dict[str, Any]] = {
    "guidance": dict(
        type=Number(0, 100),
        default=1.0,
        metavar="W",
        help="guidance weight of images; 0 turns guidance off (default: 1)",
    ),
    "image_guidance": dict(
        type=Number(0, 100),
        metavar="W",
        help="guidance weight of the images in the prompt; --guidance then weighs the text alone",
    ),
    "linear": dict(action="store_true", help="extrapolate linearly for guidance, instead of mixing Gaussians"),
    "annealed": dict(action="store_true", help="let guidance grow from an image's first token to its last"),
    "image_temperature": dict(
        type=Number(0, 10), default=0.9, metavar="T", help="temperature of images (default: 0.9)"
    ),
    "temperature": dict(
        type=Number(0, 10),
        default=0.0,
        metavar="T",
        help="temperature of text; 0 takes the most likely token (default: 0)",
    ),
    "top_k": dict(
        type=Whole(0),
        default=0,
        metavar="K",
        help="draw text from the K most likely tokens; 0 draws from all (default: 0)",
    ),
    "top_p": dict(
        type=Number(0, 1),
        default=1.0,
        metavar="P",
        help="draw text from the fewest tokens whose probability adds up to P (default: 1)",
    ),
    "presence_penalty": dict(
        type=Number(-2, 2),
        default=0.0,
        metavar="P",
        help="taken off the logits of tokens that the answer holds already (default: 0)",
    ),
    "frequency_penalty": dict(
        type=Number(-2, 2),
        default=0.0,
        metavar="P",
        help="taken off a token's logit for each time that the answer holds it (default: 0)",
    ),
    "repetition_penalty": dict(
        type=Number(0.01, 100),
        default=1.0,
        metavar="P",
        help="above 1: makes the tokens of prompt and answer less likely (default: 1)",
    ),
    "max_tokens": dict(
        type=Whole(1),
        metavar="N",
        help="length of an answer in tokens, image tokens included (default: enough for two images, at least 128)",
    ),
    "max_images": dict(type=Whole(0), metavar="N", help="most images in an answer; 0: text only (default: no limit)"),
    "image_first": dict(action="store_true", help="begin the answer with an image"),
    "stop": dict(
        type=Words(),
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer at this text; may be repeated",
    ),
    "jacobi": dict(
        type=Whole(0, 10**6),
        default=0,
        metavar="N",
        help="image tokens to solve for at once (default: as `starflow2 calibrate` measured, or else 1)",
    ),
    "tolerance": dict(
        type=Number(0),
        default=1e-3,
        metavar="E",
        help="with --jacobi above 1: stop when the mean squared change over the mean square is below this (default: "
        "0.001)",
    ),
}


def add_sampling(
    parser: argparse.ArgumentParser, fields: Iterable[str] = OPTIONS, names: Mapping[str, str] | None = None
) -> None:
    """Add the options of these fields. `names`: names of options that differ from --FIELD."""
    for field in fields:
        name = (names or {}).get(field, f"--{field.replace('_', '-')}")
        parser.add_argument(name, dest=field, **OPTIONS[field])


def add_overrides(parser: argparse.ArgumentParser, names: Mapping[str, str]) -> None:
    """Add the options of the fields in `names` under these names, with None as their default: something else chooses
    then.
    """
    for field, name in names.items():
        help = OPTIONS[field]["help"].partition(" (default")[0] + " (default: the task's own)"
        parser.add_argument(name, dest=field, **OPTIONS[field] | {"default": None, "help": help})


def add_images(parser: argparse.ArgumentParser, whose: str, more: str = "") -> None:
    """Add --images. `whose`: the images that it is about. `more`: the end of its help."""
    parser.add_argument(
        "--images",
        choices=("flow", "vit"),
        default="flow",
        help=f"how the model sees {whose}: as flow tokens (default), or through its vision tower, to understand "
        f"only{more}",
    )


def sample_options(args: argparse.Namespace) -> "SampleOptions":
    """The command line's SampleOptions, with their own defaults for options that the command does not take."""
    from starflow2_jax.sampling.rows import SampleOptions

    return SampleOptions(**{field: value for field, value in vars(args).items() if field in OPTIONS})
