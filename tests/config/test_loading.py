"""Overrides that a user types, what they refuse, and configs whose parts cannot work together."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from refused import refused

from starflow2_jax.config import loading as configs
from starflow2_jax.errors import ConfigError
from starflow2_jax.stages import STAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("starflow2_7b_t2i", "model.deep.dropout", 0.1),
        ("starflow2_7b_t2i", "model.soft_clip", 3.0),
        ("starflow2_7b_joint", "model.deep.activation", "silu"),
        ("starflow2_3b_adapter", "model.shallow.unroll", 2),
        ("digits_quick", "model.deep.remat", "full"),
        ("digits", "model.deep.dtype", "bfloat16"),
        ("digits_quick", "model.deep_rotary_theta", 1e5),
    ],
)
def test_what_an_experiment_does_not_write_can_be_overridden(name, key, value):
    assert key.rpartition(".")[2] not in (configs.EXPERIMENTS / f"{name}.py").read_text()
    _, group, *rest = key.split(".")
    node = configs.load(name, [f"{key}={value}"]).model[group]
    assert (node[rest[0]] if rest else node) == value


def test_a_star_sets_all_stages():
    before = configs.load("digits_quick")
    config = configs.load("digits_quick", ["stages.*.rows=8", "stages.*.optimizer.clip=2", "stages.joint.rows=24"])
    assert {name: s.rows for name, s in config.stages.items()} == dict.fromkeys(STAGES, 8) | {"joint": 24}
    assert {s.optimizer.clip for s in config.stages.values()} == {2.0}
    assert {s.steps for s in config.stages.values()} == {s.steps for s in before.stages.values()}


def test_a_stage_or_a_weight_can_be_added():
    given = ["stages.pretrain.steps=7", "order=pretrain,text_to_image", "stages.pretrain.mix.caption=0.5"]
    given += ["data.source=None", "data.sources.caption.path=digits"]
    config = configs.load("starflow2_7b_t2i", given)
    assert config.order == ("pretrain", "text_to_image") and config.stages.pretrain.steps == 7
    assert config.stages.pretrain.rows == 256 and config.stages.pretrain.mix.caption == 0.5
    assert config.data.sources.caption.kind == "caption"  # a default of that source
    assert config.is_locked and config.stages.pretrain.optimizer.is_locked


def test_the_options_of_another_kind_go_with_it(tmp_path):
    """In whichever order they are typed; what an experiment says of its own kind is not in the way."""
    latents = ["codec.grid=4,4", "codec.channels=4", "codec.kind=latents", "data.sources.*.path=mine.jsonl"]
    for given in (latents, latents[::-1]):
        config = configs.load("digits", given)
        assert config.codec.to_dict() == dict(kind="latents", grid=(4, 4), channels=4, shift=0.0, scale=1.0, decoder="")
        assert config.data.sources.read.path == "mine.jsonl" and "warp" not in config.data.sources.read
    file = tmp_path / "odd.py"
    file.write_text(
        (configs.EXPERIMENTS / "digits_quick.py").read_text().replace("c.noise", "c.codec.grd = 1\n    c.noise")
    )
    file.write_text(
        file.read_text()
        .replace('c.codec = dict(kind="patch"', 'c.codec = dict(pach=1, kind="patch"')
        .replace("c.codec.grd = 1", "")
    )
    refused(ConfigError, configs.load, file, ["codec.patch=2"], saying=("codec", "'pach'", "'patch'"))


@pytest.mark.parametrize(
    "name, overrides, saying",
    [
        ("starflow2_7b_t2i", ["codec.kind=patch"], ("'patch'", "12 channels", "model.channels is 32", "model.channels=12")),
        ("starflow2_7b_t2i", ["codec.kind=vae"], ("codec.kind", "'vae'", "patch", "latents")),
        ("starflow2_7b_t2i", ["codec.channels=16"], ("16 channels", "model.channels is 32")),
        ("starflow2_7b_t2i", ["codec.grid=8,8"], ("codec.grid is (8, 8)", "model.grid is (16, 16)")),
        ("digits_quick", ["codec.kind=latents"], ("codec", "lacks grid")),
        ("starflow2_7b_t2i", ["order=pretrain"], ("order", "stages.pretrain", "steps")),
        ("starflow2_7b_t2i", ["stages.pretrain.rows=64"], ("stages.pretrain", "lacks steps")),
        ("digits_quick", ["order=joint,joint"], ("order", "once")),
        ("digits_quick", ["order=()"], ("order", "at least one stage")),
        ("digits_quick", ["data.groups=3"], ("stage pretrain", "data.groups=3", "16 rows")),
        ("digits_quick", ["stages.joint.accumulate=3"], ("stages.joint.rows=16", "multiple of 3")),
        ("digits_quick", ["mesh.data=4", "mesh.fsdp=8"], ("rows=16", "multiple of 32", "mesh.fsdp")),
        ("digits_quick", ["mesh.sequence=-1"], ("mesh", "only one axis")),
        ("digits_quick", ["mesh.tensor=0"], ("mesh", "tensor must be at least 1", "-1")),
        ("digits_quick", ["stages.joint.optimizer.moments=bfloat16", "stages.joint.optimizer.b2=0.999"], ("stages.joint", "at most 0.99")),
        ("digits_quick", ["stages.*.optimizer.moments=bfloat16", "stages.*.optimizer.name=adafactor"], ("adafactor", "'float32'")),
        ("digits_quick", ["stages.joint.vlm_length=9"], ("stages.joint.vlm_length must be 0",)),
        ("digits_quick", ["stages.text_to_image.vlm_length=200"], ("vlm_length=200", "length=128")),
        ("digits_quick", ["stages.pretrain.patches=161"], ("stages.pretrain.patches=161", "multiple of 4")),
        ("digits_quick", ["model.vlm.vision=None"], ("stages.pretrain.patches=160", "model.vlm.vision is None")),
        ("digits_quick", ["model.vlm.vision.out_width=64"], ("vlm.vision.out_width=64", "vlm.width=128")),
        ("digits_quick", ["model.vlm.vision.channels=1"], ("model.vlm.vision", "mean and std", "1 channels")),
        ("digits_quick", ["model.vlm.vision.max_pixels=9"], ("model.vlm.vision", "min_pixels=64", "max_pixels=9")),
        ("digits_quick", ["stages.joint.mix.read=-1"], ("stages.joint.mix.read", "at least 0")),
        ("digits_quick", ["stages.*=3"], ("'stages.*' is a group", "stages.pretrain.steps")),
        ("digits_quick", ["stages.jiont.rows=3"], ("'stages.jiont.rows'", "'stages.joint.rows'")),
        ("digits_quick", ["model.*.rows=3"], ("'model.*.rows'", "mean")),
        ("digits_quick", ["data.source.more=3"], ("'data.source.more'", "'data.source'")),
        ("digits_quick", ["seed=" + "x" * 9000], ("'seed' takes an int such as 0",)),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_when_the_config_is_loaded(name, overrides, saying):
    refused(ConfigError, configs.load, name, overrides, saying=saying)


@pytest.mark.parametrize("old, new, saying", [
    ("c.noise = 0.1", "c.noise = 'loud'", ("noise takes a float such as 0.0", "'loud'")),
    ("c.noise = 0.1", "c.niose = 0.1", ("'niose'", "'noise'")),
    ("rows=16", "row=16", ("stages.", "'row'", "'rows'")),
    ("rows=16", "rows=16.0", (".rows takes an int", "16.0")),
    ("joint=stage", "jiont=stage", ("'jiont'", "'joint'")),
    ('c.data = dict(sources=sources | held_out)', "c.data = 3", ("data", "group", "3")),
    ("def get_config", "def config", ("has no get_config",)),
    ("vocabulary=416, ", "", ("model.vlm", "lacks vocabulary", "tokens")),
])  # fmt: skip
def test_a_mistake_in_an_experiment_is_named(tmp_path, old, new, saying):
    text = (configs.EXPERIMENTS / "digits_quick.py").read_text()
    assert old in text
    (tmp_path / "mine.py").write_text(text.replace(old, new))
    refused(ConfigError, configs.load, tmp_path / "mine.py", saying=saying)


def test_a_file_that_is_no_python(tmp_path):
    (tmp_path / "page.toml").write_text("seed = 1")
    refused(ConfigError, configs.load, tmp_path / "page.toml", saying=("page.toml", "Python file"))
    refused(ConfigError, configs.load, "digits_quik", saying=("no experiment file digits_quik", "digits_quick"))


def test_no_device_is_touched():
    """With a platform that there is not, a good config is printed and a bad one is refused all the same."""
    environment = {**os.environ, "JAX_PLATFORMS": "none_such", "PYTHONPATH": str(ROOT)}

    def starflow2(*arguments):
        command = [sys.executable, "-m", "starflow2_jax.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    done = starflow2("config", "--config", "starflow2_7b_t2i", "--chip", "v5p")
    assert done.returncode == 0 and "* model.deep.kernel = splash" in done.stdout, done.stderr
    done = starflow2("train", "--config", "starflow2_7b_t2i", "--config.codec.kind=patch")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "model.channels=12" in done.stderr
