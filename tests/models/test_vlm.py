"""Another vision-language model, added from outside the package by a row of the table, in every use that Pretzel makes
of it.

Its decoder normalises q and k by another rule than any of the package's VLMs, and every layer adds an embedding of its
own of the token (or of what the vision tower saw) to its input.
"""

from dataclasses import asdict, dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from starflow2_jax import sequence
from starflow2_jax.config.schema import OptimizerConfig
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.pipeline import Encoder, collate
from starflow2_jax.errors import UserError
from starflow2_jax.fields import build, differences
from starflow2_jax.models.attention import KVCache
from starflow2_jax.models.flops import training_flops
from starflow2_jax.models.layers import Norm, Transformer, TransformerConfig, separate_layers
from starflow2_jax.models.pretzel import Pretzel, PretzelConfig, for_sampling, init_params, split
from starflow2_jax.models.vlm import VLMS, VlmKind, abstract_params
from starflow2_jax.models.vlm_inputs import VlmInputs
from starflow2_jax.sequence import Shape, Step
from starflow2_jax.stages import STAGES
from starflow2_jax.training.optimizer import make_optimizer
from starflow2_jax.training.step import Objective, make_step, new_state
from starflow2_jax.weights.vlm import load_config, write_config

LAYERS, WIDTH = 3, 24
ADAMW = OptimizerConfig(
    name="adamw",
    learning_rate=1e-2,
    final_fraction=1.0,
    warmup=0,
    b1=0.9,
    b2=0.95,
    weight_decay=0.0,
    clip=1.0,
    moments="float32",
    offload=False,
)


@dataclass(frozen=True)
class MosaicConfig:
    """A tower of one layer over patches of 2 x 2 gray pixels; images are not resized."""

    out_width: int = WIDTH
    merge: int = 1
    channels: int = 1
    dtype: str = "float32"
    scan: bool = True
    patch_width: int = 4
    merger_parameters: int = 0

    @property
    def embedding_parameters(self):
        return self.patch_width * self.out_width

    @property
    def transformer(self):
        return TransformerConfig(1, self.out_width, 2, 16, norm="layer", dtype=self.dtype, scan=self.scan)

    def visible_patches(self, patches):
        return patches

    def resized(self, size):
        return size

    def merged_grid(self, size):
        return size[0] // 2, size[1] // 2

    def bounded(self, least=None, most=None):
        return self

    def preprocess(self, pixels):
        h, w = self.merged_grid(pixels.shape[:2])
        patches = pixels[..., 0].reshape(h, 2, w, 2).transpose(0, 2, 1, 3).reshape(h * w, 4)
        return {
            "patches": patches.astype(np.float32),
            "coordinates": np.stack(np.divmod(np.arange(h * w), w), -1).astype(np.int32),
            "window": np.zeros(h * w, np.int32),
        }


@dataclass(frozen=True)
class LayeredConfig:
    """Its sizes, with defaults for all."""

    kind: str = "layered"
    vocabulary: int = 416
    width: int = WIDTH
    heads: int = 2
    vision: MosaicConfig | None = MosaicConfig()
    dtype: str = "float32"
    remat: str = "none"
    kernel: str = "xla"
    scan: bool = True

    @property
    def transformer(self) -> TransformerConfig:
        return TransformerConfig(
            layers=LAYERS,
            width=self.width,
            heads=self.heads,
            mlp_hidden=32,
            norm="layer",
            qk_norm="layer",
            mlp_bias=True,
            dtype=self.dtype,
            remat=self.remat,
            kernel=self.kernel,
            scan=self.scan,
        )


class Layered(nn.Module):
    """Absolute positions (learned, by time), a tied head, and an input of its own for each layer."""

    cfg: LayeredConfig

    def setup(self):
        c = self.cfg
        self.words = nn.Embed(c.vocabulary, c.width)
        self.times = nn.Embed(64, c.width)
        self.of_layers = self.param("of_layers", nn.initializers.normal(0.5), (LAYERS, c.vocabulary, c.width))
        self.patches = nn.Dense(c.width, use_bias=False)
        self.tower = Transformer(c.vision.transformer)
        self.patches_of_layers = self.param(
            "patches_of_layers", nn.initializers.normal(0.5), (LAYERS, c.width, c.width)
        )
        self.stack = Transformer(c.transformer)
        self.norm = Norm("layer")

    def __call__(self, inputs: VlmInputs, cache: KVCache | None = None):
        added = self.of_layers[:, inputs.tokens]
        merged = None
        if inputs.vision is not None:
            image = inputs.vision.image
            merged, _ = self.tower(self.patches(inputs.vision.patches), None, image[:, :, None] == image[:, None, :])
            deep = jnp.einsum("bse,lef->lbsf", inputs.at_vit(merged), self.patches_of_layers)
            added = jnp.where((inputs.modality == sequence.VIT)[..., None], deep, added)
        x = inputs.embeddings(self.words(inputs.tokens), merged) + self.times(inputs.positions[..., 0])
        x, cache = self.stack(x, None, cache=cache, segments=inputs.segments, layer_inputs=added)
        return self.norm(x), cache

    def head(self):
        return self.words.embedding

    def logits(self, hidden):
        return jnp.einsum("...e,ve->...v", hidden, self.head())

    def empty_cache(self, batch, slots):
        return self.stack.empty_cache(batch, slots)


@pytest.fixture(autouse=True, scope="module")
def row():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VLMS, "layered", VlmKind(LayeredConfig, Layered))
        yield


CONFIG = replace(tiny.CONFIG, vlm=LayeredConfig())
MODEL = Pretzel(CONFIG)


@pytest.fixture(scope="module")
def params(row):
    """Random parameters everywhere, so that maps that start at zero do not hide faults."""
    shapes = jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.15 * rng.standard_normal(x.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.tokenizer(), tiny.CODEC, CONFIG.vlm.vision)


def packed(encoder):
    return next(tiny.batches(tiny.documents(), encoder, Shape(2, 64, 4, 48)))


def said(output):
    return np.concatenate([output.text, output.mean, output.scale], axis=-1)


def test_its_parameters_and_its_layers_inputs(params, encoder):
    """The forward pass is finite, its parameters are under `vlm`, and each layer's input changes the output."""
    assert jax.tree.map(jnp.shape, params["vlm"]) == jax.tree.map(jnp.shape, abstract_params(CONFIG.vlm)["vlm"])
    assert set(params["vlm"]["stack"]["layers"]["attention"]["query_norm"]) == {"scale", "bias"}
    run = jax.jit(lambda p, b: MODEL.apply({"params": p}, b))
    batch = packed(encoder)
    assert batch.vision is not None and (batch.modality == sequence.VIT).any()
    base = run(params, batch)
    assert np.isfinite(said(base)).all()
    for name, kind in (("of_layers", sequence.TEXT), ("patches_of_layers", sequence.VIT)):
        for layer in range(LAYERS):
            vlm = params["vlm"] | {name: params["vlm"][name].at[layer].multiply(2)}
            moved = np.abs(said(run(params | {"vlm": vlm}, batch)) - said(base)).max(-1)
            assert (moved[batch.modality == kind] > 1e-6).all()


def test_decoding_through_the_caches_is_the_whole_forward(params, encoder):
    """With separate layers, as in a sampler: reads a prompt with a picture, then one position at a time."""
    document = [Image(tiny.pixels(1, (4, 8)), via="vit"), Text("draw it"), Image(tiny.pixels(2), generate=True)]
    document += [Text(" three", predict=True)]
    whole = collate([encoder(document)], Shape(1, 40, 1, 8))
    prompt = collate([encoder(document[:2], closed=False)], Shape(1, 40, 1, 8))
    begin, total = (int((s.segments > 0).sum()) for s in (prompt, whole))
    full = jax.jit(lambda p: MODEL.apply({"params": p}, whole))(params)
    apart, own = Pretzel(for_sampling(CONFIG)), separate_layers(params)
    run = jax.jit(lambda s, c: apart.apply({"params": own}, s, c))
    empty = apart.apply({"params": own}, 1, 40, method=Pretzel.empty_caches)
    output = run(prompt, empty)
    rows, caches = [said(output)[0, :begin]], output.caches.rewind(jnp.array([begin]))
    u = np.asarray(full.u).reshape(-1, tiny.CHANNELS)[
        np.where(whole.modality == sequence.FLOW, whole.image_token_index, 0)
    ]
    assert total > begin + 8
    for t in range(begin, total):
        step = Step(whole.tokens[:, [t]], whole.modality[:, [t]], whole.positions[:, [t]], jnp.asarray(u[:, [t]]))
        output = run(step, caches)
        caches = output.caches
        rows.append(said(output)[0])
    np.testing.assert_allclose(np.concatenate(rows), said(full)[0, :total], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ("joint", "pretrain"))
def test_a_training_step(params, encoder, name):
    """The loss is finite, all that the stage trains moves, and the rest is not even in the state."""
    stage, optimizer = STAGES[name], make_optimizer(ADAMW, 10)
    frozen, trainable = split(params)
    if name == "pretrain":
        frozen, trainable = trainable, frozen
    step = jax.jit(make_step(MODEL, stage, optimizer, Objective(noise=0.1, text_weight=0.5)))
    state = new_state(trainable, stage, optimizer, jax.random.key(0))
    after, metrics = step(state, frozen, packed(encoder))
    assert np.isfinite(float(metrics["loss"]))
    for group in stage.trains:
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), after.params[group], trainable[group])
        assert any(jax.tree.leaves(changed)), group
    if name == "pretrain":
        assert all((after.params["vlm"][n] != params["vlm"][n]).any() for n in ("of_layers", "patches_of_layers"))
    else:
        assert "vlm" not in after.params


def test_its_config_as_values(tmp_path):
    """Configs and vlm.json name the kind; another kind is another model, and an unknown one is refused with the
    nearest.
    """
    values = asdict(CONFIG)
    assert values["vlm"]["kind"] == "layered" and build(PretzelConfig, values) == CONFIG
    write_config(tmp_path / "vlm.json", CONFIG.vlm)
    assert load_config(tmp_path / "vlm.json") == CONFIG.vlm
    assert differences(CONFIG, tiny.CONFIG) == ["vlm.kind is layered, not qwen2_5_vl"]
    values["vlm"]["kind"] = "layerd"
    with pytest.raises(UserError, match="vlm.kind must be one of .*'layerd'; did you mean 'layered'"):
        build(PretzelConfig, values)


def test_its_operations_are_counted():
    """The tower's by hand: rows x patches x (4 x 24 + 4 x 24^2 + 2 x 24 x 16 parameters), twice, forward only."""
    flops = training_flops(CONFIG, STAGES["joint"], Shape(2, 64, 4, patches=48))
    assert flops.model["VLM"] > 0 and flops.model["vision tower"] == 2 * 96 * (96 + 2304 + 768)
