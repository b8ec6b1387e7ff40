"""Fréchet distances, comparisons of runs, and the benchmark of likelihoods, against their definitions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.data.documents import Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation import frechet
from starflow2_jax.evaluation.compare import compared
from starflow2_jax.evaluation.engine import evaluate
from starflow2_jax.evaluation.likelihood import ranking
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.sampling.batch_files import Share
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.sampling.scoring import score


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


def test_what_has_no_distance_is_refused(tmp_path, network):
    folder(tmp_path / "a", 0), folder(tmp_path / "one", 0, 1)
    (tmp_path / "bad.npz").write_bytes(b"no")
    torch.save({"a": Path("code")}, tmp_path / "pickled.pth")
    with pytest.raises(UserError, match="pickled.pth is neither a TorchScript file nor"):  # and is not unpickled
        frechet.distance(tmp_path / "a", tmp_path / "a", tmp_path / "pickled.pth", tmp_path / "cache")
    for reference, said in (("one", "holds 1 pictures"), ("bad.npz", "is no .npz file with the arrays mu and sigma")):
        with pytest.raises(UserError, match=said):
            frechet.distance(tmp_path / "a", tmp_path / reference, network, tmp_path / "cache")


def test_runs_are_compared(tmp_path, capsys):
    for name, scores in (("one", {"a": 0.5, "b": None}), ("two/answers", {"a": 0.75, "b": 2}), ("three", {"a": 1.0})):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    assert cli.main(["eval", "compare", *(str(tmp_path / name) for name in ("one", "two", "three"))]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["", "one", "two", "three", "mean", "std", "95% interval"]
    assert rows[2][:6] == ["a", "0.5", "0.75", "1", "0.75", "0.25"] and rows[3] == ["b", "", "2", "", "2", "", ""]
    values = np.random.default_rng(1).normal(size=400)
    [line] = compared([{"x": float(value)} for value in values])
    half = 1.96 * values.std() / 20  # the interval of the mean of many values
    np.testing.assert_allclose(line.interval, (values.mean() - half, values.mean() + half), atol=0.01)
    (tmp_path / "three/scores.json").write_text('{"a": "good"}')
    assert cli.main(["compare", str(tmp_path / "three")]) == 2 and "is no number" in capsys.readouterr().err


def test_winogrounds_scores_of_tables():
    right = {"image_given_caption": [[3, 1], [8, 9]], "image": [2, 8], "caption_given_image": [[-1, -2], [-3, -1]]}
    wrong = right | {"image_given_caption": [[3, 3.5], [8, 10]]}
    found = ranking([right, wrong])
    assert found["text_score_by_image"] == 0.5 and found["image_score_by_image"] == 1.0
    assert found["group_score_by_image"] == 0.5 and found["group_score_by_text"] == 1.0


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)


def test_likelihoods_of_documents_and_pairs(tmp_path, sampler):
    levels = [np.random.default_rng(i).integers(0, 256, tiny.SIZE, np.uint8) for i in range(2)]
    for i, each in enumerate(levels):
        Pillow.fromarray(each).save(tmp_path / f"{i}.png")
    data = tmp_path / "data"
    data.mkdir()
    documents = [
        [{"text": "draw an eight"}, {"image": "../0.png", "generate": True}],
        [{"image": "../1.png"}, {"text": " nine", "predict": True}],
    ]
    (data / "docs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in documents))
    pairs = {"captions": ["a seven", "a two"], "images": ["../0.png", "../1.png"]}
    (data / "pairs.jsonl").write_text(json.dumps(pairs) + "\n")
    numbers, _ = evaluate(sampler, open_benchmark("likelihood", str(data)), tmp_path / "out", {}, progress=False)
    pixels = [(each[..., None] / np.float32(127.5) - 1).astype(np.float32) for each in levels]
    [[image], [text]] = score(
        sampler,
        [[Text("draw an eight"), Image(pixels[0], generate=True)], [Image(pixels[1]), Text(" nine", predict=True)]],
    )
    assert numbers["docs_image_nll_bits_per_dim"] == pytest.approx(image.bits_per_dim, rel=1e-4)
    assert numbers["docs_text_nll_nats_per_token"] == pytest.approx(math.log(text.perplexity), rel=1e-4)
    assert numbers["docs_nll_nats_per_document"] == pytest.approx(-(image.nats + text.nats) / 2, rel=1e-4)
    [row] = [json.loads(line) for line in (tmp_path / "out/likelihood/pairs.jsonl").read_text().splitlines()]
    [[given]] = score(sampler, [[Text("a two"), Image(pixels[0], generate=True)]])
    assert row["image_given_caption"][0][1] == pytest.approx(given.nats, rel=1e-4)
    assert {name for name in numbers if name.startswith("pairs_")} == {
        f"pairs_{kind}_score_by_{way}" for kind in ("text", "image", "group") for way in ("image", "text")
    }
    with pytest.raises(UserError, match="run it in one process"):
        evaluate(sampler, open_benchmark("likelihood", str(data)), tmp_path / "two", {}, share=Share(1, 2))


def test_a_file_without_documents_is_refused(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"captions": ["a"], "images": ["b"]}\n')
    with pytest.raises(UserError, match="no lists of captions and images of one length"):
        open_benchmark("likelihood", str(tmp_path / "x.jsonl"))
