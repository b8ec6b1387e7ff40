"""Fréchet distances and the benchmark of likelihoods, against their definitions."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image as Pillow

from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation import frechet, likelihood
from starflow2_jax.evaluation.engine import evaluate
from starflow2_jax.evaluation.likelihood import ranking
from starflow2_jax.evaluation.protocol import numbers
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.sampling.batch_files import Share
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import score


class Floats(torch.nn.Module):
    """A network that takes no bytes."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 2, 1)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.layer(pictures).mean((2, 3))


class Nameless(torch.nn.Module):
    """A network without the method forward."""

    @torch.jit.export
    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures


class Features(torch.nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean(3)[:, :, :2].flatten(1) / 255


@pytest.fixture
def network(tmp_path) -> Path:
    torch.jit.script(Features()).save(str(tmp_path / "features.pt"))
    return tmp_path / "features.pt"


def folder(path: Path, seed: int, n: int = 12) -> np.ndarray:
    """Writes pictures of two sizes; returns their features (n, 6)."""
    path.mkdir()
    rng, found = np.random.default_rng(seed), []
    for i in range(n):
        pixels = rng.integers(0, 256 - 60 * seed, (4, 5 + i % 2, 3), np.uint8)
        Pillow.fromarray(pixels).save(path / f"{i}.png")
        found.append(pixels.mean(1)[:2].T.ravel() / 255)
    return np.stack(found)


def test_the_distance_is_that_of_two_gaussians_and_is_cached(tmp_path, network, monkeypatch):
    a, b = folder(tmp_path / "a", 0), folder(tmp_path / "b", 1)
    ca, cb = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * scipy.linalg.sqrtm(ca @ cb).real)
    found = frechet.distance(tmp_path / "a", tmp_path / "b", network, tmp_path / "cache", 5)
    assert found["frechet_distance"] == pytest.approx(wanted, rel=1e-4) and found["images"] == found["reference"] == 12
    np.savez(tmp_path / "b.npz", mu=b.mean(0), sigma=cb)
    monkeypatch.setattr(frechet, "_measured", None)  # from now on, all is in the cache
    again = frechet.distance(tmp_path / "a", tmp_path / "b.npz", network, tmp_path / "cache")
    assert again["frechet_distance"] == pytest.approx(wanted, rel=1e-4) and again["reference"] is None
    Pillow.new("RGB", (5, 4)).save(tmp_path / "a" / "0.png")  # another picture is another folder
    with pytest.raises(TypeError):
        frechet.distance(tmp_path / "a", tmp_path / "b", network, tmp_path / "cache")


def test_what_has_no_distance_is_refused(tmp_path, network, monkeypatch):
    folder(tmp_path / "a", 0), folder(tmp_path / "one", 0, 1)
    (tmp_path / "bad.npz").write_bytes(b"no")
    np.savez_compressed(tmp_path / "whole.npz", mu=np.arange(99.0), sigma=np.eye(99))
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.npz").write_bytes(whole[:60] + b"\xff" * 60 + whole[120:])
    np.save(tmp_path / "one.npy", np.arange(6.0))
    torch.save({"a": Path("code")}, tmp_path / "pickled.pth")
    for module, name in ((Floats(), "floats.pt"), (Nameless(), "nameless.pt")):
        torch.jit.script(module).save(str(tmp_path / name))
    for name, said in (
        ("pickled.pth", "pickled.pth is neither a TorchScript file nor"),  # and is not unpickled
        ("floats.pt", "floats.pt fails on pictures .*should be the same.*uint8"),
        ("nameless.pt", "nameless.pt has no method forward"),
    ):
        with pytest.raises(UserError, match=said):
            frechet.distance(tmp_path / "a", tmp_path / "a", tmp_path / name, tmp_path / "cache")
    wrong = "is no .npz file with the arrays mu and sigma"
    tables = {name: wrong for name in ("bad.npz", "cut.npz", "damaged.npz", "one.npy")}
    for reference, said in (tables | {"one": "holds 1 pictures"}).items():
        with pytest.raises(UserError, match=said):
            frechet.distance(tmp_path / "a", tmp_path / reference, network, tmp_path / "cache")
    with monkeypatch.context() as patched:
        patched.setattr(Pillow, "MAX_IMAGE_PIXELS", 5)
        with pytest.raises(UserError, match="0.png cannot be read"):
            frechet.distance(tmp_path / "a", tmp_path / "one", network, tmp_path / "cache2")


def test_winogrounds_scores_of_tables():
    right = {"image_given_caption": [[3, 1], [8, 9]], "image": [2, 8], "caption_given_image": [[-1, -2], [-3, -1]]}
    wrong = right | {"image_given_caption": [[3, 3.5], [8, 10]]}
    found = numbers(ranking({"a": right, "b": wrong}))
    assert found["text_score_by_image"] == 0.5 and found["image_score_by_image"] == 1.0
    assert found["group_score_by_image"] == 0.5 and found["group_score_by_text"] == 1.0


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Documents of two sources, pairs, and their pictures 0.png and 1.png beside them."""
    folder = tmp_path_factory.mktemp("likelihood")
    for i, each in enumerate(LEVELS):
        Pillow.fromarray(each).save(folder / f"{i}.png")
    documents = [
        [{"text": "draw an eight"}, {"image": "../0.png", "generate": True}],
        [{"image": "../1.png"}, {"text": " nine", "predict": True}],
    ]
    pairs = {"captions": ["a seven", "a two"], "images": ["../0.png", "../1.png"]}
    sources = {"docs": documents, "more": [*documents, documents[0]], "pairs": [pairs]}
    (folder / "data").mkdir()
    for name, rows in sources.items():
        (folder / f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data"


LEVELS = [np.random.default_rng(i).integers(0, 256, tiny.SIZE, np.uint8) for i in range(2)]


def measured(sampler: Sampler, data: Path, out: Path, **more):
    return evaluate(sampler, open_benchmark("likelihood", str(data)), out, {}, progress=False, batch=2, **more)


@pytest.fixture(scope="module")
def alone(sampler, data) -> tuple[dict, Path]:
    """The numbers of one process, and its folder."""
    out = data.parent / "alone"
    found = measured(sampler, data, out)
    assert found is not None
    return found[0], out


def test_likelihoods_of_documents_and_pairs(sampler, alone):
    numbers, out = alone
    pixels = [(each[..., None] / np.float32(127.5) - 1).astype(np.float32) for each in LEVELS]
    [[image], [text]] = score(
        sampler,
        [[Text("draw an eight"), Image(pixels[0], generate=True)], [Image(pixels[1]), Text(" nine", predict=True)]],
    )
    assert numbers["docs_image_nll_bits_per_dim"] == pytest.approx(image.bits_per_dim, rel=1e-4)
    assert numbers["docs_text_nll_nats_per_token"] == pytest.approx(math.log(text.perplexity), rel=1e-4)
    assert numbers["docs_nll_nats_per_document"] == pytest.approx(-(image.nats + text.nats) / 2, rel=1e-4)
    assert numbers["more_nll_nats_per_document"] == pytest.approx(-(2 * image.nats + text.nats) / 3, rel=1e-4)
    [row] = [json.loads(line) for line in (out / "likelihood/pairs.jsonl").read_text().splitlines()]
    for i, j in ((0, 0), (0, 1), (1, 0)):
        [[given], [told]] = score(
            sampler,
            [
                [Text(("a seven", "a two")[j]), Image(pixels[i], generate=True)],
                [Image(pixels[i]), Text(("a seven", "a two")[j], predict=True)],
            ],
        )
        assert row["image_given_caption"][i][j] == pytest.approx(given.nats, rel=1e-4)
        assert row["caption_given_image"][i][j] == pytest.approx(told.nats, rel=1e-4)
    assert {name for name in numbers if name.startswith("pairs_")} == {
        f"pairs_{kind}_score_by_{way}" for kind in ("text", "image", "group") for way in ("image", "text")
    }
    items = json.loads((out / "items.json").read_text())
    assert items["docs_image_nll_bits_per_dim"] == {"docs/0": [pytest.approx(image.bits_per_dim, rel=1e-4), image.dims]}
    assert len(items["more_nll_nats_per_document"]) == 3


def files(out: Path) -> dict[str, bytes]:
    paths = [*(out / "likelihood").iterdir(), *(out / f"{n}.json" for n in ("scores", "items", "run", "samples"))]
    return {path.name: path.read_bytes() for path in [*paths, out / "manifest.jsonl"]}


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_measures_the_same(sampler, data, alone, tmp_path, processes):
    """Six tasks in batches of two: documents and pairs stand in one batch, too."""
    for i in reversed(range(processes)):
        found = measured(sampler, data, tmp_path, share=Share(i, processes))
        assert (found is None) == (i > 0) == (not (tmp_path / "likelihood").exists())
    assert files(tmp_path) == files(alone[1])


def test_what_is_measured_is_not_measured_again(sampler, data, alone, tmp_path, monkeypatch):
    calls = []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(likelihood, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        measured(sampler, data, tmp_path)
    measured(sampler, data, tmp_path)
    assert len(calls) == 1 + 1 + 2 and files(tmp_path) == files(alone[1])


def test_noise_is_drawn_by_the_seed_and_chat_changes_nothing(sampler, data, tmp_path):
    noisy = copy.copy(sampler)
    noisy.noise = 0.3
    found = [
        measured(noisy, data, tmp_path / str(i), seed=seed, chat=chat)[0]
        for i, (seed, chat) in enumerate(((0, False), (0, True), (1, False)))
    ]
    name = "docs_image_nll_nats_per_dim"
    assert found[0][name] == found[1][name] != found[2][name]
    assert found[0]["docs_text_nll_nats_per_token"] == found[2]["docs_text_nll_nats_per_token"]


def test_a_document_in_which_nothing_counts_is_named(sampler, tmp_path):
    lines = [[{"text": "a", "predict": True}, {"text": " b", "predict": True}], [{"text": "a b"}]]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DocumentError, match="^task docs/1: nothing in it counts"):
        measured(sampler, tmp_path / "docs.jsonl", tmp_path / "out")


def test_a_file_without_documents_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"captions": ["a"], "images": ["b"]}\n')
    with pytest.raises(UserError, match="no lists of captions and images of one length"):
        open_benchmark("likelihood", str(tmp_path / "x.jsonl"))
