"""The options of the commands that take an experiment."""


def add_config(parser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="experiment file, or the name of one of this package, such as digits_quick; --config.KEY=VALUE overrides a key "
        "(`starflow2 config` lists them)",
    )
    add_chip(parser)


def add_chip(parser) -> None:
    parser.add_argument(
        "--chip", help="TPU generation, such as v5p: the settings that the experiment keeps for its slices"
    )
