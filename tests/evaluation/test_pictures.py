"""Benchmarks of drawing: the files that their scorers read, by any number of processes, and user files that are
refused.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from painter import Painter, levels
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.latents import LatentCodec
from starflow2_jax.config import loading as configs
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.engine import evaluate
from starflow2_jax.evaluation.protocol import seed_of
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.sampling.batch_files import Share
from starflow2_jax.sampling.engine import Sampler

RUN = {"checkpoint": "here"}
GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 3}], "prompt": "a photo of three cows"},
    {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"},
    {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"},
]


def metadata(folder: Path, rows=GENEVAL) -> str:
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(name: str, data: str, out: Path, sampler=None, **more):
    return evaluate(sampler or Painter(), open_benchmark(name, data), out, RUN, progress=False, **more)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_geneval_reads(imagedir: Path) -> dict[tuple[str, str], np.ndarray]:
    """(prompt, file) -> picture, by the logic of evaluate_images.py."""
    found = {}
    for subfolder in os.listdir(imagedir):
        if not (imagedir / subfolder).is_dir() or not subfolder.isdigit():
            continue
        with open(imagedir / subfolder / "metadata.jsonl") as file:
            row = json.load(file)
        assert row["tag"] and row["include"]
        for name in os.listdir(imagedir / subfolder / "samples"):
            if re.match(r"\d+\.png", name):
                found[row["prompt"], name] = np.asarray(Pillow.open(imagedir / subfolder / "samples" / name))
    return found


def test_geneval_is_read_by_the_logic_of_its_script(tmp_path):
    run("geneval", metadata(tmp_path), tmp_path / "out")
    found = as_geneval_reads(tmp_path / "out" / "geneval")
    assert set(found) == {(row["prompt"], f"{k:05d}.png") for row in GENEVAL for k in range(4)}
    for i, row in enumerate(GENEVAL):
        for k in range(4):
            np.testing.assert_array_equal(found[row["prompt"], f"{k:05d}.png"], levels(seed_of(0, f"{i:05d}", k)))
    lines = [json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert [(x["key"], x["k"], x["seed"]) for x in lines[:5]] == [
        (f"{i:05d}", k, seed_of(0, f"{i:05d}", k)) for i, k in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0))
    ]
    assert (tmp_path / "out" / lines[3]["files"][0]).is_file() and len({x["prompt"] for x in lines}) == 5


def test_rewritten_prompts_are_kept_apart(tmp_path):
    rows = [GENEVAL[0] | {"prompt": "A photo of a bench, made of weathered oak, under a tree."}, *GENEVAL[1:]]
    run("geneval", metadata(tmp_path, rows), tmp_path / "out")
    assert json.loads((tmp_path / "out/run.json").read_text())["prompts"]["rewritten"] is True
    assert (tmp_path / "out/geneval_rewritten/00000").is_dir() and not (tmp_path / "out/geneval").exists()
    run("geneval", metadata(tmp_path), tmp_path / "raw")
    assert json.loads((tmp_path / "raw/run.json").read_text())["prompts"]["rewritten"] is False
    with pytest.raises(UserError, match="another run"):
        run("geneval", metadata(tmp_path), tmp_path / "out")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """What a real model draws in one process: the folder of the answers, beside the prompts."""
    folder = tmp_path_factory.mktemp("drawn")
    run("geneval", metadata(folder), folder / "out", model(), batch=2)
    return folder / "out"


def model() -> Sampler:
    return Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)


def same(a: Path, b: Path) -> None:
    one, other = files(a / "geneval"), files(b / "geneval")
    assert one == other and len(one) == 5 * (4 + 1)
    for name in ("manifest.jsonl", "run.json", "scores.json", "samples.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(drawn, tmp_path, processes):
    sampler, out = model(), tmp_path / "out"
    for i in reversed(range(processes)):
        found = run(
            "geneval", str(drawn.parent / "evaluation_metadata.jsonl"), out, sampler, batch=2, share=Share(i, processes)
        )
        assert (found is None) == (i > 0) == (not (out / "geneval").exists())
    same(out, drawn)


def test_a_killed_run_ends_with_the_same_bytes(drawn, tmp_path, monkeypatch):
    """Killed in the second batch, then while the pictures are exported."""
    prompts, sampler, calls = str(drawn.parent / "evaluation_metadata.jsonl"), model(), []
    generate = Sampler.generate

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "generate", killed)
        with pytest.raises(KeyboardInterrupt):
            run("geneval", prompts, tmp_path, sampler, batch=2)
    benchmark = open_benchmark("geneval", prompts)
    export = type(benchmark).export

    def cut_off(self, answers, out):
        export(self, answers[:7], out)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(benchmark), "export", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run("geneval", prompts, tmp_path, sampler, batch=2)
    assert not (tmp_path / "geneval").exists() and not list(tmp_path.glob(".partial*"))
    run("geneval", prompts, tmp_path, sampler, batch=2)
    same(tmp_path, drawn)


def test_what_the_scorer_has_written_is_not_lost(tmp_path):
    prompts = metadata(tmp_path)
    run("geneval", prompts, tmp_path / "out")
    (tmp_path / "out/geneval/results.jsonl").write_text("mine")
    run("geneval", prompts, tmp_path / "out")
    assert (tmp_path / "out/geneval/results.jsonl").read_text() == "mine"


def test_dpg_has_four_tiles_in_a_file_and_nothing_else(tmp_path):
    (tmp_path / "prompts").mkdir()
    for name in ("0", "coco-12", "partiprompts3"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a long prompt of {name}\n")
    run("dpg", str(tmp_path / "prompts"), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out/dpg").iterdir()} == {"0.png", "coco-12.png", "partiprompts3.png"}
    side = int((tmp_path / "out/dpg_resolution.txt").read_text())
    assert side == 4 == json.loads((tmp_path / "out/run.json").read_text())["prompts"]["resolution"]
    grid = Pillow.open(tmp_path / "out/dpg/coco-12.png")
    boxes = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    for k, box in enumerate(boxes):  # as compute_dpg_bench.py cuts them
        np.testing.assert_array_equal(np.asarray(grid.crop(box)), levels(seed_of(0, "coco-12", k)))


def test_wise_names_pictures_by_their_prompts(tmp_path):
    for name, ids in (
        ("natural_science", (641, 7)),
        ("spatio", (401,)),
        ("natural_science_rewrite", (641, 7)),
        ("merge", (1,)),
    ):
        rows = [{"Prompt": f"{name} {i}", "Explanation": "", "Category": "", "prompt_id": i} for i in ids]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    painter = Painter()
    run("wise", str(tmp_path), tmp_path / "out", painter)
    assert {path.name for path in (tmp_path / "out/wise").iterdir()} == {"7.png", "401.png", "641.png"}
    assert [prompt[0].text for prompt in painter.asked] == ["natural_science 7", "spatio 401", "natural_science 641"]
    np.testing.assert_array_equal(np.asarray(Pillow.open(tmp_path / "out/wise/401.png")), levels(seed_of(0, "401", 0)))
    assert open_benchmark("wise", str(tmp_path / "natural_science_rewrite.json")).facts["rewritten"] is True


def test_coco_takes_one_caption_of_each_image_in_an_order_of_its_own(tmp_path):
    rows = [{"image_id": i, "id": 10 * i + j, "caption": f"caption {j}  of {i}\n"} for i in range(5) for j in (2, 1)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": [], "annotations": rows}))
    run("coco", str(tmp_path / "captions.json"), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/coco_captions.jsonl").read_text().splitlines()]
    assert {line["file"] for line in lines} == {path.name for path in (tmp_path / "out/coco").iterdir()}
    assert {line["caption"] for line in lines} == {f"caption 1 of {i}" for i in range(5)}
    assert [line["file"] for line in lines] != sorted(line["file"] for line in lines)
    first = [task.key for task in open_benchmark("coco", str(tmp_path / "captions.json"), 3).tasks()]
    assert first == [line["file"][:-4] for line in lines[:3]]
    (tmp_path / "captions.txt").write_text("a dog\n\na cat\n")
    assert [task.prompt[0].text for task in open_benchmark("coco", str(tmp_path / "captions.txt")).tasks()] == [
        "a dog",
        "a cat",
    ]


def picture(path: Path, size=(8, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(path)
    return path


def test_imgedit_changes_the_pictures_of_its_file(tmp_path):
    picture(tmp_path / "animal/1.png")
    entries = {"1082": {"id": "animal/1.png", "prompt": "make it smooth", "edit_type": "adjust"}}
    (tmp_path / "basic_edit.json").write_text(json.dumps(entries))
    painter = Painter()
    run("imgedit", str(tmp_path / "basic_edit.json"), tmp_path / "out", painter)
    assert {path.name for path in (tmp_path / "out/imgedit").iterdir()} == {"1082.png"}
    [[image, text]] = painter.asked
    assert image.pixels.shape == (4, 4, 3) and text.text == "make it smooth"  # cropped to the model's size


def test_gedit_has_the_given_picture_beside_the_changed_one(tmp_path):
    datasets = pytest.importorskip("datasets")
    sources = [picture(tmp_path / f"{i}.png", (8 + i, 6)) for i in range(2)]
    rows = [
        dict(task_type="ps_human", key=f"k{i}", instruction=f"do {i}", instruction_language=("en", "cn")[i],
             input_image={"bytes": path.read_bytes(), "path": None}, Intersection_exist=True)
        for i, path in enumerate(sources)
    ]  # fmt: skip
    table = datasets.Dataset.from_list(rows).cast_column("input_image", datasets.Image())
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "gedit"))
    run("gedit", str(tmp_path / "gedit"), tmp_path / "out")
    for i, language in enumerate(("en", "cn")):
        folder = tmp_path / "out/gedit/starflow2/fullset/ps_human" / language
        assert {path.name for path in folder.iterdir()} == {f"k{i}.png", f"k{i}_SRCIMG.png"}
        given = np.asarray(Pillow.open(folder / f"k{i}_SRCIMG.png"))
        np.testing.assert_array_equal(given, np.asarray(Pillow.open(sources[i])))


@pytest.mark.parametrize("row", [{"key": "../k"}, {"key": "/k"}, {"task_type": ".."}, {"instruction_language": "e/n"}])
def test_names_of_gedit_that_no_file_can_have_are_refused(tmp_path, row):
    good = dict(task_type="a", key="k", instruction="do", instruction_language="en", input_image=b"png")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good | row]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="row 0, has '.*' in place of a word that a file can be named after.*GEdit"):
        open_benchmark("gedit", str(tmp_path))


FOLDER = "a folder"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("geneval", None, "needs --prompts: evaluation_metadata.jsonl, from https://github.com/djghosh13/geneval"),
        (
            "geneval",
            '{"prompt": "a photo of a cat"}\n',
            "line 1, has no 'tag'.*from https://github.com/djghosh13/geneval",
        ),
        ("geneval", "a photo of a cat\n", "line 1, is not valid JSON"),
        ("geneval", '{"tag": "x", "include": [], "prompt": 5}\n', "line 1, has 5 in place of a prompt.*geneval"),
        ("geneval", "\n \n", "holds no prompts.*geneval"),
        ("geneval", FOLDER, "is a folder.*evaluation_metadata.jsonl, from https://github.com/djghosh13/geneval"),
        ("coco", FOLDER, "is a folder.*cocodataset.org"),
        ("imgedit", FOLDER, "is a folder.*ImgEdit"),
        ("dpg", '{"a": 1}', "is no folder of .txt files.*ELLA"),
        ("wise", "{}", "is no list of prompts.*WISE"),
        ("wise", '[{"Prompt": "a", "prompt_id": "x"}]', "in place of a whole number"),
        ("wise", '[{"Prompt": "a", "prompt_id": 1}, {"Prompt": "b", "prompt_id": 1}]', "same prompt_id"),
        ("coco", '{"images": []}', "has no 'annotations'.*cocodataset.org"),
        ("coco", '{"annotations": 5}', "has 5 in place of a list of annotations.*cocodataset.org"),
        ("coco", '[\n  "a dog",\n  "a cat"\n]', "is .'a dog', 'a cat'. and no object"),
        ("imgedit", "{}", "holds no prompts.*ImgEdit"),
        ("imgedit", '{"../1": {"id": "file", "prompt": "x"}}', "entry '../1', has '..' in place of a word that a file"),
        ("imgedit", '{"/tmp/1": {"id": "file", "prompt": "x"}}', "entry '/tmp/1', has '' in place of a word"),
        ("imgedit", '{"1": {"id": "none.png", "prompt": "x"}}', "none.png, which does not exist.*ImgEdit"),
        ("imgedit", "[]", "is .* and no object"),
        ("gedit", "x", "cannot be read as parquet.*GEdit-Bench"),
    ],
)
def test_other_files_are_refused_with_a_sentence(tmp_path, name, content, said):
    path = tmp_path / "file"
    if content == FOLDER:
        path.mkdir()
    elif content:
        path.write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        open_benchmark(name, str(path) if content else None)
    assert "\n" not in str(refused.value)


def test_an_answer_without_a_picture_is_named(tmp_path):
    with pytest.raises(UserError, match="answer 0 to task 00000 has no whole picture"):
        run("geneval", metadata(tmp_path), tmp_path / "out", Painter(say=lambda prompt: "no"))


def test_a_checkpoint_of_latents_is_refused_before_it_is_loaded(tmp_path, capsys):
    codec = LatentCodec(tiny.GRID, tiny.CHANNELS)
    CheckpointDirectory(tmp_path / "run").create(configs.load("digits_quick"), codec, tiny.tokenizer())
    command = ["eval", "--benchmark", "geneval", "--checkpoint", str(tmp_path / "run"), "--prompts", metadata(tmp_path)]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "has no decoder: its images are latents" in capsys.readouterr().err and not (tmp_path / "out").exists()
