"""The paper-size experiments: their shapes and counts without memory, and one step of each when shrunk."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from starflow2_jax import config as configs
from starflow2_jax.models.pretzel import Pretzel, init_params, split
from starflow2_jax.training.loop import Trainer

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STAGES = {"t2i": "text_to_image", "adapter": "image_to_text", "joint": "joint"}
FROZEN = {"7b": 8.292, "3b": 3.755}  # billions of parameters of the published VLMs, tied head once


pytestmark = pytest.mark.usefixtures("compile_once")


def count(tree) -> float:
    return sum(np.prod(x.shape, dtype=float) for x in jax.tree.leaves(tree)) / 1e9


@pytest.mark.parametrize("size", FROZEN)
@pytest.mark.parametrize("stage", STAGES)
def test_builds_at_full_size(size, stage):
    config = configs.load(EXPERIMENTS / f"starflow2_{size}_{stage}.py")
    assert config.order[-1] == STAGES[stage]
    model = Pretzel(configs.pretzel(config))
    frozen, trainable = split(jax.eval_shape(lambda: init_params(model, jax.random.key(0))))
    assert count(frozen) == pytest.approx(FROZEN[size], abs=1e-3)
    layers = count(
        [trainable["shallow"]["block_0"]["stack"], trainable["shallow"]["block_1"]["stack"], trainable["deep"]]
    )
    assert layers == pytest.approx(3.63, abs=0.01)  # 2 x 4 + 24 layers of width 3072
    assert 3.63 < count(trainable) < 3.72


@pytest.mark.parametrize("size", FROZEN)
def test_shrunk_every_stage_takes_a_step(tmp_path, size):
    """One after the other in one directory, as the experiments' commands say."""
    for number, stage in enumerate(STAGES, start=2):
        config = configs.load(EXPERIMENTS / f"starflow2_{size}_{stage}.py", runlocal=True)
        trainer = Trainer(config, tmp_path / "run")
        trainer.run(progress=False)
        assert trainer.checkpoints.latest() == number
        assert trainer.checkpoints.meta(number)["stage"] == STAGES[stage]
        lines = (tmp_path / "run/metrics/metrics.jsonl").read_text().splitlines()
        assert np.isfinite(json.loads(lines[-1])["loss"]) and json.loads(lines[-1])["stage"] == STAGES[stage]
