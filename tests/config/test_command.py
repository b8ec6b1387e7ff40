"""`starflow2 config`, and the chip as an option of the commands that take an experiment."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from starflow2_jax import cli
from starflow2_jax.codecs.patch import PatchCodec, PatchOptions
from starflow2_jax.codecs.table import CODECS
from starflow2_jax.config import loading as configs
from starflow2_jax.config.schema import ExperimentConfig
from starflow2_jax.fields import keys
from starflow2_jax.weights import vlm

COMMANDS = {
    "config": [],
    "train": ["--out", "out"],
    "init": ["--vlm", str(Path(__file__).parent), "--out", "out"],
    "plan": ["--topology", "v5p:4x4x4"],
    "bench": ["train"],
}


def printed(capsys, *arguments: str) -> str:
    assert cli.main(["config", *arguments]) == 0
    return capsys.readouterr().out


def test_the_page_has_every_key_with_its_help_and_says_which_differ(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    text = printed(capsys, "--config", "digits", "--config.seed=0", "--config.model.soft_clip=2")
    config = configs.load("digits", ["model.soft_clip=2"])
    found = {m[2]: (m[1], m[3]) for m in re.finditer(r"^([* ]) (\S+) = \S*\s+(.*)$", text, re.MULTILINE)}
    wanted = [key for key in keys(ExperimentConfig, config.to_dict()) if key.value != {}]
    assert set(found) == {key.path for key in wanted}
    for key in wanted:
        star, notes = found[key.path]
        assert notes.startswith(key.help) and (star == "*") == (key.value != key.default), key.path
    assert found["seed"][0] == " " and found["model.soft_clip"] == ("*", found["model.soft_clip"][1])
    assert "default 0.0" in found["model.soft_clip"][1] and "one of none, full" in found["model.deep.remat"][1]
    stars = sum(star == "*" for star, _ in found.values())
    assert text.startswith(f"{stars} of {len(found)} keys")


def test_what_is_printed_can_be_typed(capsys):
    """All lines of one page, given as overrides of another experiment, make that page."""
    text = printed(capsys, "--config", "digits_quick", "--runlocal", "--config.stages.*.rows=32")
    lines = [m for line in text.splitlines() if (m := re.match(r"[* ] (\S+) = (\S*)", line))]
    given = [f"--config.{m[1]}={m[2]}" for m in lines]
    assert printed(capsys, "--config", "digits", *given) == text


def test_a_page_fits_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = printed(capsys, "--config", "starflow2_7b_t2i").splitlines()
    assert max(map(len, lines)) <= 100 and sum(map(len, lines)) > 9000


@pytest.mark.parametrize("command", COMMANDS)
def test_the_chip_is_an_option(command, capsys, monkeypatch):
    """It reaches the experiment; a wrong one and one that is not needed are one sentence each."""
    seen = []
    load = configs.load
    monkeypatch.setattr(vlm, "load_config", lambda path: None)  # `init` takes the experiment's own VLM
    with monkeypatch.context() as patched:
        patched.setattr(configs, "load", lambda *a, **k: (seen.append(load(*a, **k)), exit(7)))
        with pytest.raises(SystemExit):
            cli.main([command, *COMMANDS[command], "--config", "starflow2_7b_t2i", "--chip", "v5e"])
    assert seen[0].stages.text_to_image.rows == 512 and seen[0].model.deep.kernel == "splash"
    for name, chip, said in (
        ("starflow2_7b_t2i", "v4", "settings for the chips v5e, v5p, v6e, h100, a100-80, h200, b200, not for 'v4'"),
        ("digits_quick", "v5e", "digits_quick.py has the same settings for all chips; leave out --chip v5e"),
        ("starflow2_7b_t2i:v5e", "v5e", "there is no experiment file starflow2_7b_t2i:v5e"),
    ):
        assert cli.main([command, *COMMANDS[command], "--config", name, "--chip", chip]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@dataclass(frozen=True)
class Undeclared(PatchOptions):
    side: int = 3


@pytest.mark.parametrize("command", (["config"], ["train", "--config.codec.side=4"]))
def test_an_option_without_help_is_refused(command, monkeypatch, tmp_path, capsys):
    """A codec from outside with a plain dataclass field: one sentence that names the field."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CODECS, "plain", type("Plain", (PatchCodec,), {"Options": Undeclared}))
    assert cli.main([*command, "--config", "digits_quick", "--config.codec.kind=plain"]) == 2
    said = capsys.readouterr().err
    assert "Undeclared.side has no line of help" in said and said.count("\n") == 1 and "option(HELP, DEFAULT)" in said


@pytest.mark.parametrize(
    ("head", "options", "said"),
    [
        ("", [], None),
        ("", ["--runlocal"], "own.py has no small version, because its get_config takes no runlocal; leave out"),
        ("runlocal, *, chip=None", ["--runlocal"], None),
        ("size", [], "missing a required argument: 'size'; get_config gets runlocal and chip alone, so give"),
        ("runlocal, chip", [], "missing a required argument: 'chip'; get_config gets"),
    ],
)
def test_an_experiment_may_take_no_arguments(head, options, said, tmp_path, capsys):
    """get_config() is called with the arguments that it takes; one that cannot be called is one sentence."""
    file = tmp_path / "own.py"
    file.write_text(
        f"def get_config({head}):\n"
        "    from starflow2_jax.experiments import digits_quick\n    return digits_quick.get_config()\n"
    )
    failed = cli.main(["config", "--config", str(file), *options])
    assert bool(failed) == bool(said) and (said or "") in capsys.readouterr().err
