"""Options of all commands that take an experiment."""

from argparse import ArgumentParser

from starflow2_jax.commands.arguments import Shipped, Words


def add_config(parser: ArgumentParser) -> None:
    """Add --config and --chip. Every command with --config also takes --config.KEY=VALUE, see cli.py."""
    parser.add_argument(
        "--config",
        type=Shipped(),
        required=True,
        metavar="FILE",
        help="experiment file, or the name of one that ships, such as digits_quick; --config.KEY=VALUE overrides a key "
        "(`starflow2 config` lists them)",
    )
    add_chip(parser)


def add_chip(parser: ArgumentParser) -> None:
    """Add --chip."""
    parser.add_argument(
        "--chip",
        type=Words(),
        metavar="NAME",
        help="TPU or GPU, such as v5p or h100: use the settings that the experiment has for it",
    )
