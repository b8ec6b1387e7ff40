"""Qwen2.5-VL against the PyTorch model of `transformers`: small, random, every parameter away from its initial
value.
"""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image as Pillow
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from starflow2_jax import sequence
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.data.pipeline import collate
from starflow2_jax.data.tokenizer import TokenIds
from starflow2_jax.models.pretzel import Pretzel, init_params, split
from starflow2_jax.models.qwen import Qwen
from starflow2_jax.models.qwen_vision import VisionConfig
from starflow2_jax.models.vlm import abstract_params
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sequence import Shape
from starflow2_jax.weights import qwen as qwen_weights
from starflow2_jax.weights.table import import_tensors

IDS = TokenIds.of(tiny.tokenizer())
TEXT = dict(vocab_size=416, rms_norm_eps=1e-6, max_position_embeddings=512)
VISION = dict(in_channels=3, spatial_merge_size=2, temporal_patch_size=2, hidden_act="silu")
CASES = {
    "grouped": (
        dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2),
        [2, 3, 1],
        dict(
            depth=3,
            hidden_size=32,
            intermediate_size=56,
            num_heads=2,
            patch_size=4,
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        False,
    ),
    "tied": (
        dict(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1),
        [4, 2, 2],
        dict(
            depth=2,
            hidden_size=48,
            intermediate_size=32,
            num_heads=3,
            patch_size=2,
            window_size=12,
            fullatt_block_indexes=[0],
        ),
        True,
    ),
    "ungrouped": (
        dict(hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2),
        [3, 3, 4],
        dict(
            depth=4,
            hidden_size=32,
            intermediate_size=40,
            num_heads=4,
            patch_size=3,
            window_size=12,
            fullatt_block_indexes=[1, 3],
        ),
        False,
    ),
}


@pytest.fixture(autouse=True)
def exact():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@cache
def reference(case: str):
    text, sections, vision, tied = CASES[case]
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            **text,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
        },
        vision_config={**VISION, **vision, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=tied,
        image_token_id=IDS.image,
        vision_start_token_id=IDS.vision_start,
        vision_end_token_id=IDS.vision_end,
        video_token_id=399,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        center, spread = (1.0, 0.2) if "norm" in name or "ln_q" in name else (0.0, 0.15)
        p.data = center + spread * torch.randn(p.shape, generator=generator)
        if "lm_head" in name or "embed_tokens" in name:
            p.data[[IDS.vision_start, IDS.end]] = (
                0  # a logit of 0, never the highest: no image is begun, no answer ends
            )
    model.tie_weights()
    return model


@cache
def ours(case: str, dtype: str = "float32") -> tuple[Pretzel, dict]:
    """A Pretzel whose VLM is the reference's, with the flow of tests/tiny.py beside it (its W_D zero)."""
    model = reference(case)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        vlm = qwen_weights.read_config(Path(folder) / "config.json", dtype)
    vlm = replace(vlm, vision=replace(vlm.vision, min_pixels=1))
    tensors = {name: t.float().numpy() for name, t in model.state_dict().items()}
    if vlm.tied_head:
        del tensors["lm_head.weight"]
    table = qwen_weights.table(vlm, tensors)
    frozen = import_tensors(table, tensors, abstract_params(vlm))
    pretzel = Pretzel(replace(tiny.CONFIG, vlm=vlm))
    rng = np.random.default_rng(0)
    _, flow = split(jax.eval_shape(lambda: init_params(pretzel, jax.random.key(0))))
    flow = jax.tree.map(lambda s: jnp.asarray(0.1 * rng.standard_normal(s.shape), jnp.float32), flow)
    flow["w_d"] = jax.tree.map(jnp.zeros_like, flow["w_d"])
    return pretzel, jax.tree.map(jnp.asarray, frozen) | flow


def encoder(case: str):
    pretzel, _ = ours(case)
    return tiny.Encoder(tiny.tokenizer(), tiny.CODEC, pretzel.cfg.vlm.vision)


def photo(i: int, size: tuple[int, int]) -> np.ndarray:
    """Random 8-bit levels (height, width, 3) as pixels in [-1, 1]."""
    return np.random.default_rng(i).integers(0, 256, (*size, 3)).astype(np.float32) / 127.5 - 1


def documents(case: str):
    """Several images of different sizes, sides that do and do not divide the window; and text between them."""
    side = 2 * CASES[case][2]["patch_size"]
    a, b, c = (photo(i, (h * side, w * side)) for i, (h, w) in enumerate(((2, 3), (5, 1), (3, 4))))
    return [
        [Text("what is"), Image(a, via="vit"), Text(" and"), Image(b, via="vit"), Text("? one and two")],
        [Image(c, via="vit"), Text("three")],
        [Text("name this number"), Image(b, via="vit")],
    ]


def processor(case: str):
    vision = ours(case)[0].cfg.vlm.vision
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch,
        merge_size=vision.merge,
        temporal_patch_size=vision.temporal_patch,
        size={"shortest_edge": vision.min_pixels, "longest_edge": vision.max_pixels},
    )


def reference_inputs(case: str, document, features) -> dict:
    """The reference's inputs for one document: our token ids, its own pixels, grids and types."""
    photos = [p.pixels for p in document if isinstance(p, Image)]
    tokens = torch.tensor(features["tokens"], dtype=torch.long)[None]
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if photos:
        levels = [Pillow.fromarray(np.round((p + 1) * 127.5).astype(np.uint8)) for p in photos]
        inputs |= processor(case)(levels, return_tensors="pt")
        inputs["mm_token_type_ids"] = (tokens == IDS.image).int()
    return inputs


def logits_of(case: str, batch, dtype: str = "float32") -> np.ndarray:
    pretzel, params = ours(case, dtype)

    @jax.jit
    def run(params, batch):
        hidden = pretzel.apply({"params": params}, batch, skips=False, deep=False).text
        return pretzel.apply({"params": params}, hidden, method=Pretzel.text_logits)

    return np.asarray(run(params, batch))


def shape_of(features) -> Shape:
    tokens, patches = (max(len(f[name]) for f in features) for name in ("tokens", "patches"))
    return Shape(len(features), tokens, 1, patches)


TEXTS = ("count from three to six", "draw a nine", "what number is shown? one and two")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("padding", ("left", "right"))
def test_text_alone_batched_and_padded(case, padding):
    rows = [tiny.tokenizer().encode(t, add_special_tokens=False) for t in TEXTS]
    length = max(map(len, rows)) + 2
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length, 3), np.int32)
    for row, filled, place, ids in zip(tokens, mask, positions, rows, strict=True):
        where = slice(0, len(ids)) if padding == "right" else slice(length - len(ids), None)
        row[where], filled[where], place[where] = ids, 1, sequence.text_positions(0, len(ids))
    features = collate([encoder(case)([Text(t)]) for t in TEXTS], Shape(len(rows), length, 1))
    batch = features.replace(tokens=tokens, segments=mask, modality=mask * sequence.TEXT, positions=positions)
    expected = reference(case)(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(mask, dtype=torch.long),
        position_ids=torch.tensor(positions.transpose(2, 0, 1), dtype=torch.long),
    ).logits.numpy()
    difference = np.abs(logits_of(case, batch) - expected)[mask.astype(bool)]
    assert difference.max() < 1e-4 and np.abs(expected).max() > 0.5


@pytest.mark.parametrize("case", CASES)
def test_vision_tower(case):
    """Merged tokens of images of several sizes, all in one row."""
    pretzel, params = ours(case)
    side = 2 * CASES[case][2]["patch_size"]
    sizes = ((1, 1), (2, 2), (4, 4), (3, 5), (7, 2))
    document = [Image(photo(i, (h * side, w * side)), via="vit") for i, (h, w) in enumerate(sizes)]
    features = encoder(case)(document)
    batch = collate([features], shape_of([features]))
    found = pretzel.apply({"params": params}, batch.vision, method=lambda m, v: m.vlm.see(v))[0]
    inputs = reference_inputs(case, document, features)
    expected = (
        reference(case).model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output.numpy()
    )
    assert found.shape == expected.shape and np.abs(found - expected).max() < 1e-4
    assert np.abs(expected).max() > 0.5


@pytest.mark.parametrize("case", CASES)
def test_whole_model_batched_and_packed(case):
    told = documents(case)
    features = [encoder(case)(d) for d in told]
    expected = []
    for document, f in zip(told, features, strict=True):
        inputs = reference_inputs(case, document, f)
        kinds = {
            k: v
            for k, v in inputs.items()
            if k in ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
        }
        positions, _ = reference(case).model.get_rope_index(**kinds)
        assert np.array_equal(positions[:, 0].numpy().T, f["positions"])
        expected.append(reference(case)(**inputs).logits[0].numpy())

    found = logits_of(case, collate(features, shape_of(features)))
    for row, e in zip(found, expected, strict=True):
        assert np.abs(row[: len(e)] - e).max() < 1e-3 and np.abs(e).max() > 0.5

    total, patches = (sum(len(f[name]) for f in features) for name in ("tokens", "patches"))
    packed = next(tiny.batches(told, encoder(case), Shape(1, total, 1, patches)))
    in_a_row = logits_of(case, packed)[0]
    for document, e in enumerate(expected, start=1):
        here = packed.segments[0] == document
        assert here.sum() == len(e) and np.abs(in_a_row[here] - e).max() < 1e-3


@pytest.mark.parametrize("case", CASES)
def test_greedy_generation(case):
    """64 tokens with the cache, for prompts of unequal length in one batch, equal the reference's `generate` for
    each.
    """
    pretzel, params = ours(case)
    sampler = Sampler(pretzel, params, tiny.tokenizer(), tiny.CODEC, skips=True)
    prompts = [*([Text(t)] for t in TEXTS), *documents(case)]
    session = sampler.session(SampleOptions(temperature=0, max_tokens=64), range(len(prompts)))
    session.read(prompts)
    session.write()
    tokens = np.asarray(session.rows.tokens)
    never, seen = [IDS.image, IDS.vision_end, IDS.pad], set()
    for prompt, row in zip(prompts, tokens, strict=True):
        inputs = reference_inputs(case, prompt, sampler.encoder(prompt, closed=False))
        written = reference(case).generate(
            **inputs,
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=IDS.end,
            pad_token_id=IDS.pad,
            suppress_tokens=never,
        )
        written = written[0, inputs["input_ids"].shape[1] :].tolist()
        assert row.tolist() == written
        seen |= set(written)
    assert len(seen) > 20


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_input_embeddings(case):
    pretzel, params = ours(case)
    rng = np.random.default_rng(0)
    E = pretzel.cfg.vlm.width
    x, weight = (rng.standard_normal((2, 11, n)).astype(np.float32) for n in (E, 416))
    positions = np.stack([sequence.text_positions(3 * i, 11) for i in range(2)])
    module, mask = Qwen(pretzel.cfg.vlm), jnp.tril(jnp.ones((2, 11, 11), bool))

    def total(x):
        hidden, _ = module.apply({"params": params["vlm"]}, x, positions, mask, method=Qwen.run)
        return jnp.sum(weight * module.apply({"params": params["vlm"]}, hidden, method=Qwen.logits))

    found = np.asarray(jax.jit(jax.grad(total))(x))
    with torch.enable_grad():
        leaf = torch.tensor(x, requires_grad=True)
        out = reference(case)(
            inputs_embeds=leaf, position_ids=torch.tensor(positions.transpose(2, 0, 1), dtype=torch.long)
        )
        (out.logits * torch.tensor(weight)).sum().backward()
    expected = leaf.grad.numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_bfloat16_is_no_worse_than_the_references():
    """Root mean square over all logits of all documents."""
    squares = np.zeros(2)
    for case in CASES:
        told = documents(case)
        features = [encoder(case)(d) for d in told]
        batch = collate(features, shape_of(features))
        rough, fine = logits_of(case, batch, "bfloat16"), logits_of(case, batch)
        low = reference(case).to(torch.bfloat16)
        for i, (document, f) in enumerate(zip(told, features, strict=True)):
            theirs = low(**reference_inputs(case, document, f)).logits[0].float().numpy()
            own = fine[i, : len(theirs)]
            squares += np.sum((rough[i, : len(theirs)] - own) ** 2), np.sum((theirs - own) ** 2)
        reference.cache_clear()
        ours.cache_clear()
    assert 0 < squares[0] <= squares[1]


@pytest.mark.parametrize("size", ((28, 28), (100, 60), (56, 200), (9, 30), (640, 480), (31, 1000), (1200, 1100)))
@pytest.mark.parametrize("limits", ((56 * 56, 28 * 28 * 1280), (28 * 28, 28 * 28 * 16)))
def test_preprocessing(size, limits):
    """Resizing, normalisation and patch order, against the reference's processor."""
    cfg = VisionConfig(1, 8, 1, 8, 8, min_pixels=limits[0], max_pixels=limits[1])
    pixels = photo(0, size)
    theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": limits[0], "longest_edge": limits[1]})(
        Pillow.fromarray(np.round((pixels + 1) * 127.5).astype(np.uint8)), return_tensors="np"
    )
    found = cfg.preprocess(pixels)
    h, w = cfg.merged_grid(size)
    assert theirs["image_grid_thw"].tolist() == [[1, 2 * h, 2 * w]]
    assert found["patches"].shape == theirs["pixel_values"].shape
    assert np.abs(found["patches"] - theirs["pixel_values"]).max() < 1e-5
