"""`starflow2 eval fid` and `eval compare`: the numbers beside independent ones, the cache, and what is refused."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image as Pillow
from refused import refused

from starflow2_jax import cli
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.compare import compared, read_scores, table
from starflow2_jax.evaluation.frechet import distance


class Corners(torch.nn.Module):
    """Features: the first four levels of the first row, as fp32."""

    def forward(self, pictures):
        return pictures[:, 0, 0, :4].to(torch.float32) / 255


@pytest.fixture
def folders(tmp_path):
    """Two folders of pictures, and a network of features in TorchScript; the features of each picture."""
    torch.jit.script(Corners()).save(str(tmp_path / "network.pt"))
    levels = {}
    for name, count, high in (("a", 40, 256), ("b", 50, 180)):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(count).integers(0, high, (count, 8, 8, 3), np.uint8)
        for i, picture in enumerate(pixels):
            Pillow.fromarray(picture).save(tmp_path / name / f"{i}.png")
        levels[name] = pixels[:, 0, :4, 0] / 255
    return tmp_path, levels


def expected(a: np.ndarray, b: np.ndarray) -> float:
    """By the matrix square root of scipy."""
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.real(scipy.linalg.sqrtm(first @ second))
    return float(np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root))


def test_the_distance_is_that_of_two_gaussians(folders, capsys):
    folder, levels = folders
    command = [
        "eval",
        "fid",
        "--images",
        folder / "a",
        "--reference",
        folder / "b",
        "--features",
        folder / "network.pt",
    ]
    command += ["--cache", folder / "cache", "--out", folder / "fid.json"]
    assert cli.main(list(map(str, command))) == 0
    found = json.loads((folder / "fid.json").read_text())
    assert found["frechet_distance"] == pytest.approx(expected(levels["a"], levels["b"]), rel=1e-4)
    assert (found["images"], found["reference"]) == (40, 50)
    assert len({found[f"{name}_sha256"] for name in ("images", "reference", "features")}) == 3
    assert json.loads(capsys.readouterr().out) == found


def test_statistics_are_kept_by_the_content_of_what_they_are_of(folders):
    folder, levels = folders
    given = (folder / "a", folder / "b", folder / "network.pt", folder / "cache")
    first = distance(*given)["frechet_distance"]
    kept = {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()}
    assert len(kept) == 2 and distance(*given)["frechet_distance"] == first
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").iterdir()} == kept
    np.savez(folder / "own.npz", mu=levels["b"].mean(0), sigma=np.cov(levels["b"], rowvar=False))
    assert distance(given[0], folder / "own.npz", *given[2:])["frechet_distance"] == pytest.approx(first, rel=1e-4)
    Pillow.new("RGB", (8, 8), "white").save(folder / "a" / "0.png")  # another picture, another hash
    assert distance(*given)["frechet_distance"] != first
    assert len(list((folder / "cache").iterdir())) == 3


def test_what_a_distance_refuses(folders):
    folder, _ = folders
    network, cache = folder / "network.pt", folder / "cache"
    (folder / "one").mkdir()
    Pillow.new("RGB", (8, 8)).save(folder / "one" / "0.png")
    (folder / "one" / "1.txt").write_text("a")
    refused(UserError, distance, folder / "one", folder / "b", network, cache, saying=("holds 1 pictures",))
    (folder / "one" / "1.png").write_bytes(b"\x89PNG")
    refused(UserError, distance, folder / "one", folder / "b", network, cache, saying=("1.png cannot be read",))
    np.savez(folder / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
    refused(
        UserError, distance, folder / "a", folder / "other.npz", network, cache, saying=("has 3 features", "makes 4")
    )
    np.savez(folder / "none.npz", mean=np.zeros(3))
    refused(UserError, distance, folder / "a", folder / "none.npz", network, cache, saying=("no .npz file with",))
    torch.save({"weights": torch.zeros(3)}, folder / "weights.pth")
    with pytest.raises(UserError):
        distance(folder / "a", folder / "b", folder / "weights.pth", cache)


def scores(folder, name: str, **numbers) -> str:
    (folder / name / "answers").mkdir(parents=True)
    (folder / name / "answers" / "scores.json").write_text(json.dumps(numbers))
    return str(folder / name)


def test_runs_side_by_side(tmp_path, capsys):
    runs = [scores(tmp_path, f"run{i}", accuracy=0.5 + 0.1 * i, **({"extra": 2} if i else {})) for i in range(3)]
    assert cli.main(["eval", "compare", *runs]) == 0
    head, _, accuracy, extra = capsys.readouterr().out.splitlines()
    assert head.split("|")[2:6] == [f" run{i} " for i in range(3)] + [" mean "]
    cells = [cell.strip() for cell in accuracy.split("|")[1:-1]]
    assert cells[:6] == ["accuracy", "0.5", "0.6", "0.7", "0.6", "0.1"]
    assert [cell.strip() for cell in extra.split("|")[2:6]] == ["", "2", "2", "2"]


def test_the_interval_is_that_of_the_bootstrap():
    values = np.random.default_rng(0).normal(3, 0.5, 200)
    [line] = compared([{"a": float(value)} for value in values])
    low, high = line.interval
    error = values.std(ddof=1) / np.sqrt(len(values))  # of the mean, which is nearly Gaussian
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    [alone] = compared([{"a": 1.0, "b": None}])
    assert alone.interval is None and alone.spread is None and "| a | 1 " in table(["run"], [alone])


@pytest.mark.parametrize(
    "content, said", [("[1]", "no object of numbers"), ('{"a": "b"}', "which is no number"), ("{", "JSON")]
)
def test_scores_that_cannot_be_read(tmp_path, content, said):
    refused(UserError, read_scores, tmp_path, saying=("has no scores.json",))
    (tmp_path / "scores.json").write_text(content)
    refused(UserError, read_scores, tmp_path, saying=(said,))
