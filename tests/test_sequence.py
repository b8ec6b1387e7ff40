"""The sequence's rules against plain loops: the shift, rotary positions, packing, what is predicted."""

import itertools

import numpy as np
import pytest
import tiny

from starflow2_jax import sequence
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.sequence import Shape


@pytest.fixture(scope="module")
def batch():
    return tiny.packed()


def test_text_targets_are_the_next_text_token_of_the_same_document(batch):
    tokens, weights = (np.asarray(a) for a in batch.text_targets())
    predicted = 0
    for b, t in np.ndindex(*batch.tokens.shape):
        same = t + 1 < batch.tokens.shape[1] and batch.segments[b, t] == batch.segments[b, t + 1] > 0
        text = same and batch.modality[b, t + 1] == sequence.TEXT
        assert weights[b, t] == (batch.text_weight[b, t + 1] if text else 0), (b, t)
        if weights[b, t]:
            assert tokens[b, t] == batch.tokens[b, t + 1]
            predicted += 1
    assert predicted > 15


def test_image_predictors_stand_before_each_latent_token(batch):
    at = np.asarray(batch.image_predictors())
    B, S = batch.modality.shape
    _, M, N, _ = batch.latents.shape
    assert at.shape == (B, M * N)
    for b in range(B):
        flow = [t for t in range(S) if batch.modality[b, t] == sequence.FLOW]
        assert len(flow) % N == 0 and flow
        assert at[b].tolist() == [t - 1 for t in flow] + [0] * (M * N - len(flow))
        starts = tiny.encoder().ids.vision_start
        assert all(batch.tokens[b, t] == starts for t in at[b, : len(flow) : N])


def test_slots_count_flow_and_vit_tokens_apart(batch):
    index = np.asarray(batch.image_token_index)
    for b in range(len(index)):
        seen = {sequence.FLOW: 0, sequence.VIT: 0}
        for t, kind in enumerate(batch.modality[b]):
            assert index[b, t] == seen.get(kind, 0)
            if kind in seen:
                seen[kind] += 1


def brute_positions(modality, grids):
    """Qwen2.5-VL's rule with plain loops: text counts up, an image spreads from its offset, text goes on at max + 1."""
    positions, grids, t = [], iter(grids), 0
    while t < len(modality):
        following = max((max(p) for p in positions), default=-1) + 1
        if modality[t] == sequence.TEXT:
            positions.append((following,) * 3)
            t += 1
        else:
            h, w = next(grids)
            positions += [(following, following + i, following + j) for i in range(h) for j in range(w)]
            t += h * w
    return positions


GRIDS = (
    [(2, 3)],
    [(2, 3), (2, 3)],
    [(1, 2), (2, 1)],
    [(2, 3)],
    [(2, 2), (2, 3)],
)  # merged, where the vision tower sees


@pytest.mark.parametrize("index", range(5))
def test_rotary_positions_and_weights_of_a_document(index):
    document, ids = tiny.documents()[index], tiny.encoder().ids
    features = tiny.encoder()(document)
    assert list(map(tuple, features["positions"])) == brute_positions(features["modality"], GRIDS[index])
    expected = []  # (token id or None, weight) of each position
    for part, grid in zip(document, _grid_of(document, GRIDS[index]), strict=True):
        if isinstance(part, Text):
            tokens = tiny.tokenizer().encode(part.text, add_special_tokens=False)
            expected += [(token, part.predict) for token in tokens]
        else:
            body = [(ids.image, False)] * (grid[0] * grid[1])
            expected += [(ids.vision_start, part.generate), *body, (ids.vision_end, part.generate)]
    last = document[-1]
    expected.append((ids.end, last.generate if isinstance(last, Image) else last.predict))
    assert features["tokens"].tolist() == [token for token, _ in expected]
    assert features["text_weight"].tolist() == [float(weight) for _, weight in expected]
    assert features["image_weight"].tolist() == [
        float(p.generate) for p in document if isinstance(p, Image) and p.via == "flow"
    ]
    is_open = tiny.encoder()(document, closed=False)
    assert is_open["tokens"].tolist() == features["tokens"].tolist()[:-1]


def _grid_of(document, grids):
    left = list(grids)
    return [None if isinstance(part, Text) else left.pop(0) for part in document]


def _first_fit(rows: int, room: dict[str, int]) -> list[list[int]]:
    """Documents in turn, each in the first row with room, until one finds none."""
    needs = [{name: len(f[name]) for name in room} for f in map(tiny.encoder(), tiny.documents())]
    taken = [[] for _ in range(rows)]
    for index in itertools.cycle(range(5)):
        for row in taken:
            if all(sum(needs[i][name] for i in [*row, index]) <= most for name, most in room.items()):
                row.append(index)
                break
        else:
            return taken


def test_packing_cuts_no_document_and_keeps_the_order(batch):
    found = tiny.places(batch)  # raises KeyError for a document that was cut
    assert len({row for _, row, _ in found}) == 2 and len(found) > 3  # several in a row
    for row in range(2):
        assert [index for index, r, _ in found if r == row] == _first_fit(2, dict(tokens=64, latents=4, patches=32))[
            row
        ]
    for index, row, where in found:
        features = tiny.encoder()(tiny.documents()[index])
        assert np.array_equal(where, np.arange(where[0], where[0] + len(features["tokens"])))
        for name in ("modality", "positions", "text_weight"):
            assert np.array_equal(getattr(batch, name)[row, where], features[name]), name
        flow = [t for t in where if batch.modality[row, t] == sequence.FLOW]
        read = batch.latents[row].reshape(-1, tiny.CHANNELS)[np.asarray(batch.image_token_index)[row, flow]]
        assert np.array_equal(read, features["latents"].reshape(-1, tiny.CHANNELS))
        if len(features["patches"]):
            theirs = np.flatnonzero([(p == features["patches"][0]).all() for p in batch.vision.patches[row]])[0]
            patches = slice(theirs, theirs + len(features["patches"]))
            assert np.array_equal(batch.vision.patches[row, patches], features["patches"])
            merged = np.asarray(batch.image_token_index)[row, where][batch.modality[row, where] == sequence.VIT]
            assert np.array_equal(merged, theirs // 4 + np.arange(len(merged)))
    padding = batch.segments == 0
    assert not batch.modality[padding].any() and not batch.text_weight[padding].any()


def test_vision_ids_are_unique_to_an_image_and_a_window_of_the_row(batch):
    seen = batch.vision
    for row in range(len(seen.image)):
        filled = seen.image[row] > 0
        windows = {}
        for patch in np.flatnonzero(filled):
            windows.setdefault(int(seen.window[row, patch]), set()).add(int(seen.image[row, patch]))
        assert all(len(images) == 1 for images in windows.values())
        assert np.array_equal(filled, seen.window[row] > 0)
        count = sum(
            len([p for p in tiny.documents()[i] if isinstance(p, Image) and p.via == "vit"])
            for i, r, _ in tiny.places(batch) if r == row
        )  # fmt: skip
        assert len(set(seen.image[row][filled].tolist())) == count


def test_every_document_comes_once_in_a_round():
    """Over many batches each document comes as often as any other (a packer that drops some would not)."""
    data = tiny.batches(tiny.documents(), tiny.encoder(), Shape(2, 64, 4, 32))
    counts = np.zeros(5)
    for _ in range(10):
        for index, _, _ in tiny.places(next(data)):
            counts[index] += 1
    assert counts.max() - counts.min() <= 4 and counts.min() > 4
