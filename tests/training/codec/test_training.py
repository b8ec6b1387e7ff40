"""A codec trained by the loop, in all four stages at a tiny size: the step's gradients, resuming, meshes, what it
leaves.
"""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_codec_training import CRITIC, config

from starflow2_jax.codecs.fae import read_fae
from starflow2_jax.config import loading
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.parallel import sharding
from starflow2_jax.stages import CODEC_STAGES
from starflow2_jax.training.codec import losses
from starflow2_jax.training.codec.objective import PictureObjective
from starflow2_jax.training.codec.pictures import pixels
from starflow2_jax.training.codec.step import averaged, feature_loss, picture_gradients
from starflow2_jax.training.codec.task import CodecTask
from starflow2_jax.training.codec.trainer import CodecTrainer
from starflow2_jax.training.loop import Trainer


def mesh(count: int, fsdp: int = 1) -> jax.sharding.Mesh:
    return sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:count])


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics" / "metrics.jsonl").read_text().splitlines()]


def run(folder, stop_at: int | None = None, **axes: int) -> None:
    CodecTrainer(config(mesh=axes or dict(data=-1)), folder).run(progress=False, stop_at=stop_at)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def test_the_directory_is_the_codecs_folder_at_the_end(whole):
    codec = read_fae(whole)
    pictures = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 3)).astype(np.float32)
    latents = codec.encode(pictures)
    assert latents.shape == (2, 4, 4, 4) and codec.decode(latents).shape == pictures.shape
    assert set(codec.weights) == {"encoder", "latent_encoder", "feature_decoder", "pixel_decoder"}
    assert all(0 < std != 1 for std in codec.std)


def test_a_vae_takes_the_place_of_the_three(tmp_path):
    CodecTrainer(config(order=("encoder", "vae", "pixels_tuned")), tmp_path).run(progress=False)
    rows = [line for line in lines(tmp_path) if line["stage"] == "vae"]
    assert all("kl_loss" in row and "l1_loss" in row and "feature_loss" not in row for row in rows)
    codec = read_fae(tmp_path)
    assert all(0 < std != 1 for std in codec.std)
    first = CodecTask(loading.complete(config()), CODEC_STAGES["vae"], mesh(1))._fresh()
    for group in CODEC_STAGES["vae"].trains:
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), codec.weights[group], first[group])
        assert any(jax.tree.leaves(moved)), group


def test_the_discriminator_counts_from_its_step(whole):
    weights = [line["generator_weight"] for line in lines(whole) if "generator_weight" in line]
    assert [weight > 0 for weight in weights] == [False, True] * 2
    assert [line["stage"] for line in lines(whole)] == [name for name in config()["order"] for _ in range(2)]


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(whole, tmp_path):
    """Stopped within a stage that has a discriminator, and at the end of one."""
    for stop_at in (5, 6, None):
        run(tmp_path, stop_at)
    assert lines(tmp_path) == lines(whole)
    jax.tree.map(np.testing.assert_array_equal, read_fae(tmp_path).weights, read_fae(whole).weights)


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(tmp_path):
    """Over data and fsdp, a step of each stage from the same state; sums in another order differ in the last bits."""
    found = []
    for name, stage in CODEC_STAGES.items():
        results = []
        for own in (mesh(1), mesh(8, fsdp=2)):
            task = CodecTask(loading.complete(config()), stage, own)
            encoder = task.networks.initial(jax.random.key(1), ("encoder",))
            frozen = {} if name == "encoder" else jax.device_put(encoder, sharding.tree_shardings(encoder, own))
            with jax.set_mesh(own):
                reader = task.batches()
                batch = reader.place(next(reader), sharding.batch_sharding(own))
                _, metrics = task.step()(task.new_state(None), frozen, batch, np.float32(np.inf))
            results.append({key: float(value) for key, value in metrics.items()})
        assert results[0] == pytest.approx(results[1], rel=2e-4, abs=1e-5)
        found.append(results[0]["loss"])
    assert len(set(found)) == len(CODEC_STAGES)


def begun(name: str) -> tuple[CodecTask, dict, jax.Array, jax.Array]:
    """A task, all its parameters, pictures and their keys."""
    task = CodecTask(loading.complete(config()), CODEC_STAGES[name], mesh(1))
    params = task.networks.initial(jax.random.key(1), ("encoder", *CODEC_STAGES["pixels"].groups))
    reader = task.batches()
    batch = reader.place(next(reader), sharding.batch_sharding(task.mesh))
    return task, params, pixels(batch, task.networks.cfg), jax.random.split(jax.random.key(2), 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("pixels", "pixels_tuned", "vae"))
def test_the_pictures_gradient_is_that_of_one_loss_with_the_weight_held_fixed(name):
    """Autograd of reconstruction + weight * generator's loss, with the weight that the step found."""
    task, params, pictures, keys = begun(name)
    adversary = task.adversary
    critic = adversary.initial(jax.random.key(3))
    objective = PictureObjective(task.networks, task.cfg, name)
    moving = {group: params[group] for group in task.stage.trains}
    found = jax.jit(partial(picture_gradients, objective, adversary))
    gradients, critics, metrics = found(moving, params, critic, pictures, keys, jnp.int32(1))
    x, layers = objective.seen(params, pictures)

    def terms(moving):
        given, kl = objective.decoder_input(params | moving, x, keys)
        made = task.networks.pictures(moving, given)
        generator = losses.generator(adversary.logits(critic["network"], params, made, keys[0]))
        return objective.loss(made, pictures, layers, params)[0] + task.cfg.beta * kl, generator

    last = [jax.grad(lambda m, i=i: terms(m)[i])(moving)["pixel_decoder"]["pixels"]["kernel"] for i in (0, 1)]
    weight = 0.5 * losses.adaptive_weight(*last)
    np.testing.assert_allclose(metrics["generator_weight"], weight, rtol=1e-4)
    wanted = jax.grad(lambda m: terms(m)[0] + weight * terms(m)[1])(moving)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), gradients, wanted)
    assert jax.tree.structure(critics) == jax.tree.structure(critic["network"])
    assert float(metrics["critic_loss"]) > 0
    np.testing.assert_allclose(metrics["loss"], terms(moving)[0], rtol=1e-5)
    assert ("kl_loss" in metrics) == (name == "vae")


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    task, params, pictures, keys = begun("features")
    moving = {name: params[name] for name in ("latent_encoder", "feature_decoder")}

    def found(pictures, keys):
        gradients, metrics = jax.grad(feature_loss, has_aux=True)(
            moving, task.networks, task.cfg, params, pictures, keys
        )
        return gradients, {}, metrics

    one, two = (jax.jit(lambda parts=parts: averaged(found, pictures, keys, parts))() for parts in (1, 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, two)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(networks=dict(features=8)), "networks.features is 8, but the encoder makes features of 16 channels"),
        (dict(order=("features", "encoder")), "the stage encoder comes first"),
        (dict(stages=dict(features=dict(steps=1, critic=CRITIC)), order=("features",)), "makes no pictures"),
        (dict(stages=dict(pixels=dict(steps=1, losses=dict(lpips=1.0))), order=("pixels",)), "lpips_vgg"),
        (
            dict(
                stages=dict(pixels=dict(steps=1, losses=dict(perceptual=1.0, perceptual_layers=(3,)))),
                order=("pixels",),
            ),
            "from 1 to 2",
        ),
    ],
)
def test_what_cannot_work_together_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        loading.complete(config(**changes))


def test_a_run_without_an_encoder_and_a_run_of_another_kind_are_refused(tmp_path, whole):
    with pytest.raises(ConfigError, match="there is no encoder"):
        CodecTrainer(config(order=("features",)), tmp_path / "new").run(progress=False)
    with pytest.raises(UserError, match="run of the kind 'fae'"):
        Trainer(loading.load("digits_quick", runlocal=True), whole)
