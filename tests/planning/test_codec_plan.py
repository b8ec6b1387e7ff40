"""Plans of a codec's stages, of steps that encode pictures, and of the decoder, for CPU devices in a TPU's place."""

import json
from pathlib import Path

import jax
import pytest

from starflow2_jax import cli
from starflow2_jax.config import loading as configs
from starflow2_jax.errors import ConfigError
from starflow2_jax.parallel import hardware
from starflow2_jax.planning import compiling, plan, report
from starflow2_jax.planning.codec import planned_codec
from starflow2_jax.stages import CODEC_STAGES
from starflow2_jax.training.program import find_codec_stage, find_stage

TOPOLOGY = hardware.Topology(hardware.CHIPS["v5e"], (2, 4))
SMALL = """
from starflow2_jax.experiments import fae_dinov2_g

def get_config(runlocal=False):
    c = fae_dinov2_g.get_config(runlocal=True)
    c.encoder.patch, c.mesh.fsdp = 8, 4
    c.networks.dtype = c.encoder.dtype = "float32"
    return c
"""
FAE = ["codec.kind=fae", "codec.grid=4,4", "codec.channels=4", "codec.patch=8", "mesh.fsdp=8"]


@pytest.fixture
def experiment(tmp_path) -> Path:
    (tmp_path / "small.py").write_text(SMALL)
    return tmp_path / "small.py"


@pytest.mark.parametrize("name", ("features", "pixels_tuned"))
def test_a_stage_of_a_codec(experiment, name):
    config = configs.load(experiment, kinds=(configs.CODEC,))
    made = plan.plan_codec_step(config, CODEC_STAGES[name], TOPOLOGY, jax.devices()[:8])
    assert made.fits and made.mesh["data"] == 2 and made.mesh["fsdp"] == 4 and not made.unknown_loops
    assert made.flops_compiled == pytest.approx(made.hardware_by_hand, rel=0.1)  # small arrays are gathered by products
    assert made.arguments["optimizer"] == pytest.approx(2 * made.arguments["trained"], rel=0.01)
    assert ("discriminator" in made.flops_by_hand) == (name == "pixels_tuned")
    assert made.tokens_per_second == pytest.approx(8 * 16 / made.seconds)
    assert "fits" in report.text(made) and "convolutions" in report.text(made)
    assert json.loads(json.dumps(made.json()))["settings"]["networks.remat"] == "full"


def test_a_step_that_encodes_its_pictures(experiment):
    config = configs.load("starflow2_7b_t2i", FAE, runlocal=True)
    stage, devices = find_stage(config, "1"), jax.devices()[:8]
    codec = planned_codec(config, str(experiment))
    read, encoded = (plan.plan_step(config, stage, TOPOLOGY, devices, c) for c in (None, codec))
    assert "codec" not in read.flops_by_hand and encoded.flops_by_hand["codec"] > 0
    more = encoded.flops_compiled - read.flops_compiled
    assert more == pytest.approx(encoded.flops_by_hand["codec"], rel=0.1)
    pictures = 4 * 32 * 32 * 3  # of the one row that a chip has
    assert encoded.arguments["batch"] - read.arguments["batch"] == pictures + 4
    assert encoded.arguments["frozen"] > read.arguments["frozen"] and "encoded in the step" in report.text(encoded)


def test_the_decoder_of_a_sampler(experiment):
    config = configs.load("starflow2_7b_t2i", FAE, runlocal=True)
    codec = planned_codec(config, str(experiment))
    made = plan.plan_decoder(config, codec, TOPOLOGY, jax.devices()[:8], rows=8)
    assert made.fits and made.flops_compiled == pytest.approx(made.hardware_by_hand, rel=0.1) and made.seconds > 0


def test_a_codec_that_does_not_fit_or_is_none(experiment, tmp_path):
    config = configs.load("starflow2_7b_t2i", [*FAE[:3], "codec.patch=16"], runlocal=True)
    with pytest.raises(ConfigError, match="codec.channels|codec.patch is 16, but the codec has 8"):
        planned_codec(config, str(experiment))
    with pytest.raises(ConfigError, match="leave out --codec"):
        planned_codec(configs.load("starflow2_7b_t2i", runlocal=True), str(experiment))


def test_the_command(experiment, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(compiling, "described_devices", lambda topology: jax.devices()[:8])
    command = ["plan", "--config", str(experiment), "--topology", "v5e:2x4"]
    assert cli.main([*command, "--stage", "features", "--json", str(tmp_path / "plan.json")]) == 0
    assert "training step of a codec, stage features" in capsys.readouterr().out
    assert cli.main([*command, "--sampler"]) == 2 and "leave them out for a codec's" in capsys.readouterr().err
    assert cli.main([*command, "--stage", "joint"]) == 2
    assert "there is no stage 'joint' in this config" in capsys.readouterr().err
    config = configs.load(experiment, kinds=(configs.CODEC,))
    assert find_codec_stage(config, None).name == "pixels_tuned"
