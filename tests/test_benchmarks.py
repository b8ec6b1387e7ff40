"""The scripts of benchmarks/ run on tiny models, and their comparisons agree. No test asserts a measured speed."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from starflow2_jax.sampling.engine import Sampler

SCRIPTS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """A script of benchmarks/, by its name, as a module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script's command line and returns the lines of JSON that it prints."""

    def run(module, *arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]

    return run


def tiny_sampler() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC)


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_every_script_can_be_imported(script, name):
    assert Path(script(name).__file__) == SCRIPTS / f"{name}.py"


def test_turns_answers_alike_from_the_caches_and_read_anew(script):
    turns, sampler = script("turns"), tiny_sampler()
    session, told = turns.conversation(sampler, 2)
    reused, anew = turns.reuse(session), turns.reencode(sampler, told)
    assert reused.rows.tokens[0, 0] == anew.rows.tokens[0, 0] and reused.computed == anew.computed
    np.testing.assert_allclose(reused.rows.text, anew.rows.text, rtol=1e-3, atol=1e-4)


def test_turns(script, run, monkeypatch):
    turns = script("turns")
    monkeypatch.setattr(turns, "mid_size", tiny_sampler)
    found = run(turns, "--mid", "--images", "1", "2", "--repeats", "1")
    assert [f["images"] for f in found] == [1, 2]


def test_sampling_draws_the_images_of_the_pytorch_loop(script, run, monkeypatch):
    sampling = script("sampling")
    monkeypatch.setattr(sampling, "mid_size", tiny_sampler)
    found = run(sampling, "--mid", "--images", "2", "--jacobi", "1", "3", "--repeats", "1", "--device", "cpu")
    assert [f["what"] for f in found] == ["reference", "ours", "jacobi 3"]
    assert found[1]["worst_difference"] < 1e-4


@pytest.mark.slow
def test_full_size(script, run):
    """The paper's model made small: a VLM of 416 words and width 32, images of 16 tokens, a shallow flow of two
    blocks.
    """
    small = ["--runlocal", "--rows", "2", "--tokens", "4", "--jacobi", "16", "--megabytes", "10", "--repeats", "1"]
    about, text, image, alone, jacobi = run(script("full_size"), *small)
    weights, read = about["weight_bytes"], about["read_bytes"]
    assert read["text"] - read["image"] == 416 * 32 * 2  # the text head, in bfloat16
    assert read["image"] + 2 * about["parameters"]["shallow"] < weights - 416 * 32 * 2
    assert (text["tokens"], image["tokens"]) == (4, 17) and text["limit"] > 0
    assert (alone["chunk"], alone["passes"], alone["passes_shallow_flow"]) == (1, 16, 2 * 16)
    assert jacobi["chunk"] == 16 and 1 < jacobi["passes"] <= 16 and 2 < jacobi["passes_shallow_flow"] <= 2 * 16


def test_scaling_tells_what_kept_plans_hold(script, monkeypatch, capsys, tmp_path):
    kept = SCRIPTS.parent / "docs/benchmarks/plans"
    scaling, files = script("scaling"), [str(kept / f"joint_h100x{n}.json") for n in (64, 8)]
    monkeypatch.setattr(sys, "argv", ["scaling", *files, "--plot", str(tmp_path / "plot.png")])
    scaling.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(c[0], c[2], c[4]) for c in cells] == [("joint", "8", "1 x 8"), ("joint", "64", "1 x 64")]
    for file, numbers in zip(reversed(files), cells, strict=True):
        [plan] = json.loads(Path(file).read_text())
        assert numbers[5] == f"{plan['seconds']:.3f}" and numbers[7] == f"{100 * plan['mfu']:.1f}"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_codec_decodes_the_same_pictures(script, run):
    encode, decode = run(script("codec"), "--size", "tiny", "--batch", "2", "--repeats", "1", "--unroll")
    assert (encode["what"], decode["what"]) == ("encode", "decode") and decode["largest_difference"] < 1e-3
    assert all(rate > 0 for line in (encode, decode) for rate in line["pictures_a_second"].values())


def test_codec_memory_grows_with_the_batch(script, run):
    one, two = run(script("codec"), "--memory", "--batches", "1,2", "--layers", "1")
    assert two["pictures"] == 2 * one["pictures"] == 1.5 and two["temporary"] > one["temporary"]
