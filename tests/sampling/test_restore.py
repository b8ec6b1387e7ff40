"""A sampler restored from a checkpoint directory in a given type and on a given mesh."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny_experiment import tiny_config

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.patch import PatchCodec
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.models import layers
from starflow2_jax.models.pretzel import Pretzel, init_params, split
from starflow2_jax.parallel import sharding
from starflow2_jax.parallel.sharding import make_mesh
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.noise_space import decode, denoise, encode
from starflow2_jax.sampling.scoring import score
from starflow2_jax.stages import STAGES

PICTURE = tiny.pixels(1, (8, 8))
OPTIONS = SampleOptions(max_tokens=5, image_first=True, image_temperature=0.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights, none of them zero."""
    config = tiny_config()
    shapes = jax.eval_shape(lambda: init_params(Pretzel(configs.pretzel(config)), jax.random.key(0)))
    rng = np.random.default_rng(0)

    def leaf(path, x):
        name = sharding.path_name(path)
        center = float(name.startswith("vlm") and name.endswith("scale"))
        return jnp.asarray(center + (0.3 if "embedding" in name else 0.1) * rng.standard_normal(x.shape), jnp.float32)

    frozen, trainable = split(jax.tree_util.tree_map_with_path(leaf, shapes))
    folder = CheckpointDirectory(tmp_path_factory.mktemp("restore") / "run")
    folder.create(config, PatchCodec((8, 8), 1, 4, (0.0,) * 16, (0.5,) * 16), tiny.tokenizer())
    folder.frozen.save(frozen)
    folder.steps.save(3, {"params": trainable, "ema": {}}, {"stage": "joint", "stage_step": 3})
    folder.steps.wait()
    return folder.folder


def said_and_seen(sampler: Sampler):
    """The answers of a sampler, the scores that it gives, and the session that wrote the answers."""
    session = sampler.session(OPTIONS, [1])
    session.read([[Image(PICTURE), Text("mirror it")]])
    session.write()
    return np.asarray(session.rows.u)[0, 1:5], encode(sampler, [[Text("draw")]], [PICTURE]), session


def test_the_moving_average_is_what_is_sampled(checkpoint, tmp_path):
    """The average holds only the groups that the stage trains, when the newest step is in the middle of a stage."""
    folder = shutil.copytree(checkpoint, tmp_path / "run")
    params = Sampler.restore(folder).params
    saved = CheckpointDirectory(folder)
    shapes = jax.eval_shape(lambda: init_params(Pretzel(configs.pretzel(saved.config())), jax.random.key(0)))
    trainable = jax.tree.map(lambda x: jnp.full(x.shape, 1.0), split(shapes)[1])
    average = {name: jax.tree.map(lambda x: x + 1, trainable[name]) for name in STAGES["image_to_text"].trains}
    saved.steps.save(4, {"params": trainable, "ema": average}, {"stage": "image_to_text", "stage_step": 1})
    saved.steps.close()
    found = Sampler.restore(folder).params
    values = {name: {float(v) for x in jax.tree.leaves(found[name]) for v in np.unique(x)} for name in found}
    assert {name for name, numbers in values.items() if numbers == {2.0}} == set(average)
    assert {name for name, numbers in values.items() if numbers == {1.0}} == set(trainable) - set(average)
    assert jax.tree.all(jax.tree.map(np.array_equal, found["vlm"], params["vlm"]))


def test_bfloat16_is_near_what_float32_is(checkpoint):
    plain, small = Sampler.restore(checkpoint), Sampler.restore(checkpoint, dtype="bfloat16")
    assert plain.step == small.step == 3
    types = {True: set(), False: set()}
    for path, x in jax.tree_util.tree_leaves_with_path(small.params):
        name = sharding.path_name(path)
        stacked = "/layers_" in name and name.endswith("kernel")
        types[stacked or name.endswith("embedding")].add(str(x.dtype))
    assert types == {True: {"bfloat16"}, False: {"float32"}}
    assert {str(x.dtype) for x in jax.tree.leaves(plain.params)} == {"float32"}
    (u, z, session), (near_u, near_z, near) = map(said_and_seen, (plain, small))
    for cache in (near.rows.caches.vlm, near.rows.caches.deep):
        assert {str(x.dtype) for x in (*cache.keys, *cache.values)} == {"bfloat16"}
    assert session.rows.caches.vlm.keys[0].dtype == jnp.float32
    for exact, close in ((u, near_u), (z, near_z)):
        error = np.sqrt(np.mean((exact - close) ** 2) / np.mean(exact**2))
        assert close.dtype == np.float32 and 1e-5 < error < 0.02
    with pytest.raises(UserError, match="dtype must be float32 or bfloat16"):
        Sampler.restore(checkpoint, dtype="float16")


@pytest.mark.parametrize("dtype", [None, pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_mesh_gives_the_same(checkpoint, dtype, monkeypatch):
    """A mesh cuts rows and heads without changing answers and scores; every program runs on the sampler's mesh."""
    on_meshes = []

    def constrain(x, *names):
        on_meshes.append(dict(jax.sharding.get_abstract_mesh().shape))
        return sharding.constrain(x, *names)

    one, cut = (
        Sampler.restore(checkpoint, mesh, dtype)
        for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(fsdp=2, tensor=2))
    )
    monkeypatch.setattr(layers, "constrain", constrain)
    jax.clear_caches()  # what another file has compiled would not be traced here
    kernel = cut.params["deep"]["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0] // 2, kernel.shape[1] // 2)
    (u, z, _), (same_u, same_z, session) = map(said_and_seen, (one, cut))
    keys = session.rows.caches.deep.keys[0]
    assert keys.sharding.shard_shape(keys.shape) == (keys.shape[0] // 4, keys.shape[1] // 2, *keys.shape[2:])
    atol = 1e-4 if dtype is None else 0.05
    np.testing.assert_allclose(same_u, u, atol=atol)
    np.testing.assert_allclose(same_z, z, atol=atol)
    document = [Text("draw"), Image(PICTURE, generate=True)]
    nats = [score(s, [document])[0][0].nats for s in (one, cut)]
    cut.decode(np.asarray(same_u)[None])
    decode(cut, [document[:1]], same_z)
    denoise(cut, [document[:1]], [document[1:]], 0.1)
    meshes = [dict(s.mesh.shape) for s in (one, cut)]
    assert meshes[1] in on_meshes and all(found in meshes for found in on_meshes)
    np.testing.assert_allclose(*nats, rtol=1e-4 if dtype is None else 1e-2)
