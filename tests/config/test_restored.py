"""The config that a checkpoint directory holds: one of an older page, one that is no page."""

import json

import pytest
import tiny
from refused import refused

from starflow2_jax.checkpoints.directory import CheckpointDirectory, CheckpointError
from starflow2_jax.config import loading as configs


@pytest.fixture
def saved(tmp_path):
    """A directory, and a function that changes its config.json."""
    directory = CheckpointDirectory(tmp_path / "run")
    directory.create(configs.load("digits_quick"), tiny.CODEC, tiny.tokenizer())

    def change(edit):
        path = tmp_path / "run/config.json"
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))

    return directory, change


def test_new_keys_of_an_older_page_get_their_defaults(saved):
    directory, change = saved
    whole = configs.load("digits_quick").to_dict()

    def age(values):
        for group, key in (("model", "soft_clip"), ("faults", "most"), ("mesh", "sequence")):
            del values[group][key]
        del values["peak_flops"], values["model"]["deep"]["dropout"], values["stages"]["joint"]["text_weight"]

    change(age)
    assert directory.config().to_dict() == whole
    change(lambda values: values.pop("log_every"))
    assert directory.config().to_dict() == whole | {"log_every": 50}


@pytest.mark.parametrize(
    "edit, saying",
    [
        (lambda v: v["model"]["deep"].update(widht=3), ("model.deep", "'widht'", "'width'")),
        (lambda v: v["model"]["deep"].pop("width"), ("model.deep", "lacks width")),
        (lambda v: v.update(seed="one"), ("seed takes an int", "'one'")),
        (lambda v: v.update(stages=[]), ("stages",)),
    ],
)
def test_a_page_that_is_none_is_refused_with_its_file(saved, edit, saying):
    directory, change = saved
    change(edit)
    refused(CheckpointError, directory.config, saying=("run/config.json", *saying))
