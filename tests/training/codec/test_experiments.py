"""The experiments that train codecs: sizes by shape, one step each when shrunk, and what is refused without weights."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers

from starflow2_jax.checkpoints.codec import write_codec
from starflow2_jax.codecs.fae import FaeCodec, read_fae
from starflow2_jax.config import loading
from starflow2_jax.config.codec import CodecStageConfig, encoder_config, networks_config
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.experiments import fae_dinov2_g
from starflow2_jax.fields import build
from starflow2_jax.models.dinov2 import DinoConfig
from starflow2_jax.planning.plan import codec_settings
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.stages import CODEC_STAGES
from starflow2_jax.training.codec.flops import codec_flops
from starflow2_jax.training.codec.networks import Networks
from starflow2_jax.training.codec.task import started
from starflow2_jax.training.codec.trainer import CodecTrainer, frozen_encoder
from starflow2_jax.training.loop import Trainer
from starflow2_jax.weights.dinov2 import dinov2_config
from starflow2_jax.weights.rae import rae_config
from starflow2_jax.weights.siglip import load_siglip

KEPT = Path(__file__).parents[3] / "docs/benchmarks/plans"
load = partial(loading.load, kinds=(loading.CODEC,))
# What the published config.json files say.
GIANT = dict(
    model_type="dinov2", hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, image_size=518, patch_size=14,
    mlp_ratio=4, layer_norm_eps=1e-6, qkv_bias=True, use_swiglu_ffn=True, hidden_act="gelu", num_channels=3,
)  # fmt: skip
RAE = dict(
    _class_name="AutoencoderRAE", encoder_type="dinov2", num_channels=3, encoder_hidden_size=768, encoder_patch_size=14,
    encoder_num_hidden_layers=12, encoder_input_size=224, decoder_hidden_size=1152, decoder_num_hidden_layers=28,
    decoder_num_attention_heads=16, decoder_intermediate_size=4096, patch_size=16,
)  # fmt: skip
IMAGENET = {
    "encoder_mean": np.float32([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1),
    "encoder_std": np.float32([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1),
}


def networks(config) -> Networks:
    return Networks(networks_config(config), config.encoder.kind, encoder_config(config))


def counts(config) -> dict[str, int]:
    names = ("encoder", "latent_encoder", "feature_decoder", "pixel_decoder")
    shapes = jax.eval_shape(lambda: networks(config).initial(jax.random.key(0), names))
    return {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in shapes.items()}


def plain(cfg: DinoConfig) -> DinoConfig:
    return replace(cfg, dtype="float32", remat="none")


def test_the_giant_has_the_published_sizes():
    config = load("fae_dinov2_g")
    found = counts(config)
    assert found.pop("encoder") == pytest.approx(1.1365e9, rel=1e-3)
    assert found == dict(latent_encoder=38_166_592, feature_decoder=170_428_416, pixel_decoder=305_360_896)
    assert plain(encoder_config(config)) == dinov2_config(GIANT)
    assert {name: (s.steps, s.rows) for name, s in config.stages.items()} == dict(
        features=(10**6, 1024), pixels=(10**6, 512), pixels_tuned=(10**5, 512)
    )


SIGLIP2 = RAE | dict(encoder_type="siglip2", encoder_patch_size=16, encoder_input_size=256)
HALVES = {name: np.full((1, 3, 1, 1), 0.5, np.float32) for name in IMAGENET}


@pytest.mark.parametrize("name, rae, pixels", [("fae_dinov2_b", RAE, IMAGENET), ("fae_siglip2_b", SIGLIP2, HALVES)])
def test_the_bases_fit_raes_autoencoders(name, rae, pixels):
    config = load(name)
    there, encoder = rae_config(rae, pixels)
    assert plain(encoder_config(config)) == encoder
    assert networks_config(config).pixel_decoder == there.pixel_decoder and networks_config(config).grid == there.grid
    assert 4e8 < counts(config)["pixel_decoder"] < 4.3e8 and counts(config)["feature_decoder"] < 5e7


def test_an_encoder_in_a_folder_of_transformers(tmp_path):
    """SigLIP's, for a codec that begins with it; another size than the config's is named."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=16)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, patch_size=4)).save_pretrained(tmp_path)
    cfg, wanted = load_siglip(tmp_path)
    config = fae_dinov2_g.get_config(runlocal=True)
    config.encoder, config.order = dict(kind="siglip", path=str(tmp_path), **asdict(cfg)), ("features",)
    found = frozen_encoder(loading.complete(config))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    config.encoder.mlp_hidden = 64
    with pytest.raises(ConfigError, match="holds another encoder than the config: its encoder.mlp_hidden"):
        frozen_encoder(loading.complete(config))


@pytest.mark.parametrize("chip, accumulate", (("", 1), ("v5e", 1), ("h100", 4)))
def test_settings_of_chips(chip, accumulate):
    config = load("fae_dinov2_g", chip=chip) if chip else load("fae_dinov2_g")
    assert config.stages.pixels.accumulate == config.stages.pixels_tuned.accumulate == accumulate
    with pytest.raises(
        ConfigError, match="settings for the chips v5e, v5p, v6e, h100, a100-80, h200, b200, not for 'v4'"
    ):
        load("fae_dinov2_g", chip="v4")


PLANS = [tuple(file.stem.split("_", 1)[1].rsplit("_", 1)) for file in sorted(KEPT.glob("fae_*.json"))]


@pytest.mark.parametrize("stage, chip", PLANS)
def test_what_is_planned_is_what_is_trained(stage, chip):
    """Settings, steps and FLOP of the kept plans are the experiment's own for that chip, and they fit."""
    [kept] = json.loads((KEPT / f"fae_{stage}_{chip}.json").read_text())
    config = load("fae_dinov2_g", chip=chip)
    row, chips = CODEC_STAGES[stage], kept["chips"]
    assert codec_settings(config, row) == kept["settings"] and kept["steps"] == config.stages[stage].steps
    cfg = build(CodecStageConfig, config.stages[stage].to_dict(), "stage")
    hand = codec_flops(networks(config), row, cfg)
    assert kept["flops_by_hand"] == pytest.approx({part: value / chips for part, value in hand.model.items()})
    assert kept["flops_compiled"] == pytest.approx(hand.executed / chips, rel=0.05)
    assert kept["fits"] and kept["topology"].startswith(chip) and kept["mesh"]["fsdp"] == min(chips, 64)


@pytest.mark.parametrize("name, key", (("fae_dinov2_g", "encoder.path=dinov2-giant"), ("fae_dinov2_b", "start=rae")))
def test_missing_weights_are_refused_in_a_sentence(tmp_path, monkeypatch, name, key):
    monkeypatch.chdir(tmp_path)
    folder = key.partition("=")[2]
    config = load(name, ["data.source=scenes", "mesh.data=1", "mesh.fsdp=-1"])
    with pytest.raises(UserError, match=folder) as refused:
        CodecTrainer(config, tmp_path / "run").run(progress=False)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_starts_from_the_networks_of_a_codec_without_latents(tmp_path):
    """As fae_dinov2_b does from RAE: the decoder is there from the first step and `features` leaves it as it is."""
    config = load("fae_dinov2_g", runlocal=True)
    n = networks(config)
    weights = jax.tree.map(
        lambda x: np.asarray(x) + np.float32(0.01), n.initial(jax.random.key(7), ("encoder", "pixel_decoder"))
    )
    codec = FaeCodec(replace(n.cfg, channels=0), "dinov2", n.encoder, n.cfg.grid, (0.0,) * 32, (1.0,) * 32, weights)
    (tmp_path / "rae").mkdir()
    write_codec(tmp_path / "rae", codec)
    config = fae_dinov2_g.get_config(runlocal=True)
    config.start, config.order, config.encoder.kind = str(tmp_path / "rae"), ("features",), "dinov2"
    config.data = dict(sources={name: dict(path="scenes") for name in ("train", "val")})
    config.evals = dict(reconstruction=dict(mix=dict(val=1.0), batches=2))
    config = loading.complete(config).unlock()
    CodecTrainer(config, tmp_path / "run").run(progress=False)
    made = read_fae(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, made.weights["pixel_decoder"], weights["pixel_decoder"])
    jax.tree.map(np.testing.assert_array_equal, made.weights["encoder"], weights["encoder"])
    assert made.channels == 4 and (tmp_path / "run/evals/reconstruction/00000002.png").exists()

    config.networks.pixel_decoder.width = 16
    with pytest.raises(ConfigError, match="holds another codec than the config: its networks.pixel_decoder.width"):
        started(config)


def test_what_no_device_can_hold_is_refused_before_anything_is_made(tmp_path):
    config = load("fae_dinov2_g", ["networks.pixel_decoder.mlp_hidden=100000000"], runlocal=True)
    with pytest.raises(ConfigError, match="stage features: parameters, optimizer and batch need"):
        CodecTrainer(config, tmp_path / "run").run(progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("fae_dinov2_g", "fae_scenes")), "fae_dinov2_b"]
)
def test_shrunk_every_stage_takes_its_steps(tmp_path, name):
    config = load(name, runlocal=True)
    assert config.order == tuple(name for name in CODEC_STAGES if name != "vae")
    CodecTrainer(config, tmp_path / "run").run(progress=False)
    assert read_fae(tmp_path / "run").channels == config.networks.channels


@pytest.mark.slow
def test_scenes_are_drawn_through_the_codec_of_scenes(tmp_path):
    CodecTrainer(load("fae_scenes", runlocal=True), tmp_path / "codec").run(progress=False)
    config = loading.load("scenes_fae", [f"codec.path={tmp_path / 'codec'}"], runlocal=True)
    Trainer(config, tmp_path / "run").run(progress=False)
    options = SampleOptions(image_first=True, max_tokens=config.model.grid[0] * config.model.grid[1] + 2, max_images=1)
    [answer] = Sampler.restore(tmp_path / "run").generate([[Text("a cat")]], options)
    assert [part.pixels.shape for part in answer if isinstance(part, Image)] == [(32, 32, 3)]
