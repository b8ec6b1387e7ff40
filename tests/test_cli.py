"""The command line as a user has it: in processes of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from tiny_experiment import tiny_config

from starflow2_jax import __version__, cli
from starflow2_jax.commands import sampling, training
from starflow2_jax.config import loading as configs
from starflow2_jax.evaluation import digits, engine
from starflow2_jax.evaluation.protocol import Page
from starflow2_jax.evaluation.scenes import QuickScenesBenchmark
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.models.jacobi import Jacobi
from starflow2_jax.sampling import inversion
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.training.loop import Trainer
from starflow2_jax.training.preemption import RESTART, Preempted

ROOT = Path(__file__).parent.parent
SHRINK = [
    *(f"--config.stages.{s}.{key}" for s in ("pretrain", "joint") for key in ("steps=1", "rows=2")),
    "--config.order=('pretrain', 'joint')", "--config.model.deep.layers=1", "--config.model.vlm.layers=1", "--config.model.shallow.layers=1",
]  # fmt: skip


def starflow2(*arguments, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "starflow2_jax.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    done = starflow2(
        "train",
        "--config",
        ROOT / "starflow2_jax/experiments/digits_quick.py",
        "--runlocal",
        "--out",
        "run",
        *SHRINK,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    stages = [json.loads(line)["stage"] for line in (folder / "run/metrics/metrics.jsonl").read_text().splitlines()]
    assert stages == ["pretrain", "joint", "joint"]  # and the losses on held-out scans
    return folder / "run"


def test_samples_from_a_document(checkpoint, tmp_path):
    moved = checkpoint.rename(tmp_path / "elsewhere")  # a checkpoint directory needs nothing beside it
    Pillow.new("L", (8, 8), 200).save(tmp_path / "scan.png")
    (tmp_path / "ask.json").write_text(json.dumps([{"image": "scan.png"}, {"text": "mirror it"}]))
    done = starflow2(
        "sample", "--checkpoint", moved, "--document", "ask.json", "--image-first", "--num", 2, "--max-tokens", 18,
        "--out", "answers", cwd=tmp_path,
    )  # fmt: skip
    moved.rename(checkpoint)
    assert done.returncode == 0, done.stderr
    listing = json.loads((tmp_path / "answers/samples.json").read_text())
    assert len(listing) == 2
    for parts in listing:
        with Pillow.open(tmp_path / "answers" / parts[0]["image"]) as image:
            assert image.size == (8, 8)


def test_samples_of_a_file_go_on_where_they_stopped(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.jsonl").write_text("".join(f'[{{"text": "draw a {w}"}}]\n' for w in ("two", "six", "nine")))
    command = ["sample", "--checkpoint", str(checkpoint), "--documents", "ask.jsonl", "--image-first", "--num", "2"]
    command += ["--max-tokens", "18", "--batch", "2", "--denoise", "--top-p", "0.9", "--text-temperature", "1"]
    rows, generate = [], Sampler.generate
    monkeypatch.setattr(Sampler, "generate", lambda *a: (rows.append(a[-1]), generate(*a))[1])
    assert cli.main([*command, "--out", "whole"]) == 0
    assert rows == [2, 2]  # the last batch runs with as many as the first
    assert (
        "compiled 5 programs" in capsys.readouterr().err
    )  # read, write, denoise, and the decoding of 4 and of 2 images
    lines = (tmp_path / "whole/samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["document"] for line in lines] == [0, 0, 1, 1, 2, 2]
    (tmp_path / "cut").mkdir()
    shutil.copy(tmp_path / "whole/run.json", tmp_path / "cut")
    (tmp_path / "cut/samples.jsonl").write_text("\n".join(lines[:5])[:-4])  # killed within the third document
    assert cli.main([*command, "--out", "cut"]) == 0
    assert (tmp_path / "cut/samples.jsonl").read_text().splitlines() == lines
    assert {p.name for p in (tmp_path / "cut").glob("*.png")} == {"004_0.png", "005_0.png"}
    for name in ("004_0.png", "005_0.png"):
        a, b = (np.asarray(Pillow.open(tmp_path / run / name), int) for run in ("whole", "cut"))
        assert np.abs(a - b).max() <= 1 and a.std() > 0


@pytest.mark.slow
def test_samples_of_two_runs_are_not_mixed(checkpoint, tmp_path, monkeypatch, capsys):
    """Another file, seed, number, option, or samples that are not of a file: refused, and nothing is lost."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.jsonl").write_text('[{"text": "draw"}]\n')
    (tmp_path / "other.jsonl").write_text('[{"text": "two"}]\n')
    options = ["sample", "--checkpoint", str(checkpoint), "--max-tokens", "2", "--max-images", "0", "--out", "out"]
    command = [*options, "--documents", "ask.jsonl"]
    assert cli.main(command) == 0
    before = (tmp_path / "out/samples.jsonl").read_text()
    for change, named in (
        (["--documents", "other.jsonl"], "documents"), (["--seed", "1"], "seed was 0 and not 1"), (["--num", "2"], "num"),
        (["--guidance", "0"], "guidance"), (["--dtype", "bfloat16"], "dtype"), (["--denoise"], "denoise"),
        ([], "solvers"),
    ):  # fmt: skip
        if named == "solvers":  # calibrated in between
            monkeypatch.setattr(inversion, "read", lambda *_: inversion.Inversion(deep=Jacobi(4)))
        assert cli.main([*command, *change]) == 2
        assert "another run" in (said := capsys.readouterr().err) and named in said
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert cli.main([*options, "--prompt", "draw"]) == 2
    assert cli.main(command) == 0 and (tmp_path / "out/samples.jsonl").read_text() == before
    usual = [word for word in command if word not in ("--max-tokens", "2")]
    assert cli.main([*usual, "--out", "usual"]) == 0 == cli.main([*usual, "--out", "usual", "--max-tokens", "128"])
    options[-1] = "plain"
    assert cli.main([*options, "--prompt", "draw"]) == 0 and cli.main([*options, "--prompt", "two"]) == 0
    assert cli.main([*options, "--documents", "ask.jsonl"]) == 2
    assert "not of --documents" in capsys.readouterr().err
    (tmp_path / "ask.jsonl").write_text('[{"text": "draw"}]\n[{"text": "a<|im_end|>"}]\n')
    assert cli.main([*command[:-3], "new", *command[-2:]]) == 2
    assert "ask.jsonl, document 1: a text holds <|im_end|>" in capsys.readouterr().err


def test_a_refused_prompt_loses_nothing_of_what_was_there(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["sample", "--checkpoint", str(checkpoint), "--max-tokens", "2", "--max-images", "0", "--prompt"]
    assert cli.main([*command, "draw"]) == 0
    before = {path.name: path.read_text() for path in Path("samples").iterdir()}
    assert set(before) == {"samples.json", "samples.jsonl"} and all(before.values())
    assert cli.main([*command, "draw " * 300]) == 2 and "positions" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in Path("samples").iterdir()} == before


def test_a_document_that_does_not_fit_is_named_and_an_image_cut_off_is_told(
    checkpoint, tmp_path, monkeypatch, capsys, caplog
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ask.jsonl").write_text("".join(f'[{{"text": "{"draw " * n}"}}]\n' for n in (1, 1, 1, 300)))
    command = ["sample", "--checkpoint", str(checkpoint), "--image-first"]
    assert cli.main([*command, "--documents", "ask.jsonl", "--batch", "2", "--max-tokens", "3"]) == 2
    assert "ask.jsonl, document 3: a prompt of" in capsys.readouterr().err
    assert "2 of 2 answers end within an image: max_tokens is 3, an image takes 18" in caplog.text
    assert len((tmp_path / "samples/samples.jsonl").read_text().splitlines()) == 2
    caplog.clear()
    assert cli.main([*command, "--prompt", "draw", "--max-images", "1", "--out", "one"]) == 0
    [[image, *_]] = json.loads((tmp_path / "one/samples.json").read_text())
    assert "image" in image and not caplog.text  # there is room for it where nothing is said


def test_every_option_of_sampling_arrives(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(sampling, "image_reader", lambda args: None)
    monkeypatch.setattr(sampling, "restore", lambda args: seen.append(sampling.sample_options(args)) or sys.exit())
    options = {
        "guidance": 2.0, "image-guidance": 1.5, "temperature": 0.7, "text-temperature": 0.3, "top-k": 5, "top-p": 0.8,
        "max-tokens": 33, "max-images": 2, "jacobi": 4, "tolerance": 0.25,
    }  # fmt: skip
    given = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    flags = ["--linear", "--annealed", "--image-first", "--stop", "a", "--stop", "b"]
    with pytest.raises(SystemExit):
        cli.main(["sample", "--checkpoint", str(ROOT), "--prompt", "draw", *given, *flags])
    assert seen == [
        SampleOptions(
            temperature=0.3, image_temperature=0.7, guidance=2.0, max_tokens=33, image_first=True, top_k=5, top_p=0.8,
            image_guidance=1.5, linear=True, annealed=True, max_images=2, stop=("a", "b"), jacobi=4, tolerance=0.25,
        )
    ]  # fmt: skip


def test_chat_in_the_terminal(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = iter(["draw a seven", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert cli.main(["chat", "--checkpoint", str(checkpoint), "--max-tokens", "18", "--temperature", "0"]) == 0
    assert "Say something" in capsys.readouterr().out and not list(lines)
    assert cli.main(["chat", "--checkpoint", str(checkpoint), "--guidance", "-1"]) == 2


def test_the_quickstart_and_what_it_leaves(tmp_path, monkeypatch, capsys):
    """Trained, evaluated, shown; once more on the same folder it tells the time of the training, not of looking at
    it.
    """
    config = tiny_config()
    config.order = ("pretrain", "text_to_image")
    for name in config.order:
        config.stages[name].steps = 2
    numbers = dict.fromkeys(set(digits.AIMS) - {"train_seconds", "total_seconds"}, 0.5)
    page = Page("", "Digits", "", tuple(digits.digits.WORDS[:10]), np.zeros((10, 1, 8, 8, 1)))
    limits = []
    monkeypatch.setattr(configs, "load", lambda *_: config)
    monkeypatch.setattr(training, "start_devices", lambda count, *_: None)
    monkeypatch.setattr(
        engine, "evaluate", lambda sampler, benchmark, *a: (limits.append(benchmark.limit), (dict(numbers), page))[1]
    )
    seconds = []
    for _ in range(2):
        assert cli.main(["quickstart", "--out", str(tmp_path / "q"), "--smoke"]) == 0
        report = json.loads((tmp_path / "q/report.json").read_text())
        assert set(report) == set(digits.AIMS) | {"smoke", "aims"} and report["aims"] == digits.AIMS and report["smoke"]
        assert report.items() >= numbers.items() and report["total_seconds"] >= report["train_seconds"] > 0
        seconds.append(report["train_seconds"])
        assert f"open {tmp_path / 'q/index.html'}" in capsys.readouterr().out
        assert Pillow.open(tmp_path / "q/samples.png").width > 0
        assert 'class="curves"' in (tmp_path / "q/index.html").read_text()
    assert seconds[1] == pytest.approx(seconds[0], rel=0.3) and limits == [10, 10]
    command = ["eval", "--benchmark", "digits", "--checkpoint", str(tmp_path / "q/checkpoint")]
    assert cli.main([*command, "--out", str(tmp_path / "again")]) == 0
    assert limits[-1] == 300 and {path.name for path in (tmp_path / "again").iterdir()} == {
        "index.html", "report.json", "samples.png",
    }  # fmt: skip

    def told_to_end(*args, **kwargs):
        raise Preempted

    monkeypatch.setattr(Trainer, "run", told_to_end)
    assert cli.main(["quickstart", "--out", str(tmp_path / "q")]) == RESTART == cli.RESTART
    assert "the same command goes on" in capsys.readouterr().err


def test_the_quickstart_of_scenes(tmp_path, monkeypatch):
    """It trains the codec, then scenes_fae on it, and evaluates that on the benchmark of its nouns."""
    begun, reported = [], []
    monkeypatch.setattr(training, "start_devices", lambda count, *_: None)
    monkeypatch.setattr(
        training, "_trained", lambda *run: begun.append(run) or {"seconds": {"total": float(len(begun))}}
    )
    monkeypatch.setattr(training.evaluation, "report", lambda *report, smoke: reported.extend(report))
    assert cli.main(["quickstart", "--demo", "scenes", "--smoke", "--out", str(tmp_path)]) == 0
    (codec, folder), (config, _) = begun
    assert codec.kind == "fae" and folder == tmp_path / "codec" and config.codec.path == str(folder)
    assert config.cpu_devices == codec.cpu_devices
    args, spent = reported
    assert spent == 1 + 2
    assert {source.path for source in config.data.sources.values()} == {"scenes"} and config.stages.joint.steps == 4
    benchmark = open_benchmark(args.benchmark, args.data, args.limit, args.part)
    assert isinstance(benchmark, QuickScenesBenchmark) and benchmark.limit == 1
    assert args.checkpoint == tmp_path / "checkpoint" and args.out == str(tmp_path)


def test_the_model_is_cut_over_devices(checkpoint, tmp_path, monkeypatch, capsys):
    """The same answers in bfloat16 and over 8 devices as options say; sizes that do not fit are refused."""
    monkeypatch.chdir(tmp_path)
    Pillow.new("L", (8, 8), 200).save("scan.png")
    (tmp_path / "captions.txt").write_text("a seven\na two\n")
    command = ["rank", "--checkpoint", str(checkpoint), "--image", "scan.png", "--captions", "captions.txt"]
    found = []
    for devices in ([], ["--fsdp", "2", "--tensor", "2"], ["--dtype", "bfloat16"]):
        assert cli.main([*command, *devices]) == 0
        found.append([json.loads(line)["nats"] for line in capsys.readouterr().out.splitlines()])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-3)
    assert found[2] != found[0] and np.abs(np.subtract(found[2], found[0])).max() < 2
    assert cli.main([*command, "--tensor", "3"]) == 2 and "tensor=3" in capsys.readouterr().err
    assert (
        cli.main([*command, "--fsdp", "0"]) == 2
        and "--fsdp: takes a whole number of at least 1" in capsys.readouterr().err
    )


def test_version_and_exit_codes_are_told(capsys):
    for option, told in (
        ("--version", (f"starflow2 {__version__}",)),
        ("--help", ("exit codes", f"  {RESTART}  ", "  2  ")),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main([option])
        assert ended.value.code == 0
        printed = capsys.readouterr().out
        assert all(words in printed for words in told)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--config", "{root}/starflow2_jax/experiments/digits_quick.py", "--config.stages.joint.step=3"], "'stages.joint.steps'"),
        (["train", "--config", "missing.py"], "there is no experiment file missing.py"),
        (["train", "--config", "{root}/starflow2_jax/experiments/digits_quick.py", "--conf.seed=3"], "unknown argument '--conf.seed=3'"),
        (["sample", "--checkpoint", "missing", "--prompt", "draw a seven"], "there is no checkpoint directory"),
        (["sample", "--checkpoint", "{root}", "--prompt", "draw a seven", "--num", "0"], "--num"),
        (["eval", "--benchmark", "digits", "--checkpoint", "{root}", "--limit", "0"], "--limit"),
        (["eval", "--benchmark", "digit", "--checkpoint", "{root}"], "there is no benchmark 'digit'; there are digits"),
        (["eval", "--benchmark", "digits", "--checkpoint", "{root}", "--data", "{root}"], "leave --data out"),
        (["eval", "--benchmark", "digits", "--checkpoint", "{root}", "--out", "o", "--process", "2", "--processes", "2"], "below --processes=2"),
        (["eval", "--benchmark", "digits", "--checkpoint", "{root}", "--processes", "2"], "--processes needs --out"),
        (["sample", "--checkpoint", "{root}", "--prompt", "draw", "--import", "none.py"], "there is no file or folder 'none.py'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(arguments, message, tmp_path):
    done = starflow2(*(a.format(root=ROOT) for a in arguments), cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out, said", [("a file", "a file: File exists"), ("a file/below", "Not a directory")])
@pytest.mark.parametrize("command", ("train", "sample"))
def test_a_path_that_cannot_be_written_is_one_sentence(command, out, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("kept")
    arguments = {
        "train": ["--config", str(ROOT / "starflow2_jax/experiments/digits_quick.py"), "--runlocal", *SHRINK],
        "sample": ["--checkpoint", str(checkpoint), "--prompt", "draw a seven", "--max-tokens", "1"],
    }[command]
    monkeypatch.setattr(training, "start_devices", lambda count, *_: None)  # this process has its own
    if command == "train":
        arguments += [f"--config.stages.{s}.rows=8" for s in ("pretrain", "joint")]
    assert cli.main([command, *arguments, "--out", out]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and Path("a file").read_text() == "kept"
