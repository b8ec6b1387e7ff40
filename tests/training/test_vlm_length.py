"""Stage 1 with the VLM run off the images only: the same loss and gradients, and what it refuses."""

import jax
import numpy as np
import pytest
import tiny

from starflow2_jax import sequence
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.pretzel import split
from starflow2_jax.sequence import Shape
from starflow2_jax.stages import STAGES
from starflow2_jax.training.step import Objective, loss_sums

STAGE, LENGTH = STAGES["text_to_image"], 26


def captions() -> list:
    """Captions with text, a vit image, or a second flow image around what is generated; one without any words."""
    return [
        [Text("draw an eight"), Image(tiny.pixels(0), generate=True)],
        [Image(tiny.pixels(1), generate=True), Text(" which is a one")],
        [Image(tiny.pixels(2, (4, 8)), via="vit"), Text(" again"), Image(tiny.pixels(3), generate=True)],
        [Text("two"), Image(tiny.pixels(4), generate=True), Text(" like"), Image(tiny.pixels(5))],
    ]


def packed(documents, vlm_length=LENGTH):
    return next(tiny.batches(documents, tiny.encoder(), Shape(3, 48, 3, 16, vlm_length)))


def test_loss_and_gradients_are_those_of_the_whole_row():
    batch = packed(captions())
    assert batch.segments.max() > 1 and (batch.modality == sequence.VIT).any()
    assert np.count_nonzero(batch.segments * (batch.modality != sequence.FLOW), axis=1).max() <= LENGTH
    frozen, trainable = split(tiny.params())

    def loss(params, vlm_length):
        objective = Objective(vlm_length=vlm_length, text_chunk=20)
        sums = loss_sums(tiny.MODEL, frozen | params, STAGE, batch, objective, jax.random.key(0))
        return sums["image"]

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    (whole, wanted), (short, gradient) = compute(trainable, 0), compute(trainable, LENGTH)
    np.testing.assert_allclose(short, whole, rtol=1e-6)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-6), err_msg=str(path))
        assert np.any(b) == (path[0].key in STAGE.trains)


def test_rows_hold_no_more_than_the_vlm_reads():
    """A budget of one document or two: the packer puts no more into a row, though more would fit."""
    features = tiny.encoder()(captions()[0])
    each = np.count_nonzero(features["modality"] != sequence.FLOW)
    assert 3 * len(features["tokens"]) <= 48
    for documents in (1, 2):
        assert packed(captions()[:1], vlm_length=(documents + 1) * each - 1).segments.max() == documents


@pytest.mark.parametrize(
    "document, vlm_length, reason",
    [
        ([Text("a"), Image(tiny.pixels(0)), Image(tiny.pixels(1), generate=True)], LENGTH, "leave such documents to the joint"),
        ([Text("draw an eight"), Image(tiny.pixels(0), generate=True)], 4, "vlm_length but a row holds 4"),
    ],
)  # fmt: skip
def test_documents_it_cannot_compute_are_refused(document, vlm_length, reason):
    with pytest.raises(DocumentError, match=reason):
        packed([document], vlm_length)


@pytest.mark.parametrize("name", ("pretrain", "image_to_text", "joint"))
def test_other_stages_need_the_vlm_everywhere(name):
    with pytest.raises(ConfigError, match=f"stages.{name}.vlm_length must be 0"):
        configs.load("digits_quick", [f"stages.{name}.vlm_length={LENGTH}"])
