"""lmms-eval and VLMEvalKit as they are installed, against a server with the tiny model, on local data.

Each has a Python environment of its own, which $LMMS_EVAL and $VLMEVALKIT name; `launch/test.sh -m harness` makes both.
"""

import base64
import io
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from live import LIMITS, ask, data_url, image_part, openai_client, served
from PIL import Image as Pillow

from starflow2_jax.data.images import as_pillow

PLUGINS = Path(__file__).parents[2] / "docs/evaluation_plugins"
pytestmark = pytest.mark.harness

QUESTIONS = ["Is it an eight? Please answer yes or no.", "Is it a seven? Please answer yes or no."]
CHOICES = ["one", "two", "four", "nine"]
COUNT = 6  # pictures
MME = """
dataset_path: parquet
dataset_kwargs: {data_files: {test: FOLDER/mme.parquet}}
task: local_mme
test_split: test
output_type: generate_until
doc_to_visual: !function utils.mme_doc_to_visual
doc_to_text: !function utils.mme_doc_to_text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}
process_results: !function utils.mme_process_results
metric_list:
  - {metric: mme_perception_score, aggregation: !function utils.mme_aggregate_results, higher_is_better: true}
lmms_eval_specific_kwargs: {default: {pre_prompt: "", post_prompt: " Answer yes or no."}}
"""
MMMU = """
dataset_path: parquet
dataset_kwargs: {data_files: {validation: FOLDER/mmmu.parquet}}
task: local_mmmu
test_split: validation
output_type: generate_until
doc_to_visual: !function utils.mmmu_doc_to_visual
doc_to_text: !function utils.mmmu_doc_to_text
doc_to_messages: !function utils.mmmu_doc_to_messages
doc_to_target: answer
generation_kwargs: {max_new_tokens: 16}
process_results: !function utils.mmmu_process_results
metric_list:
  - {metric: mmmu_acc, aggregation: !function utils.mmmu_aggregate_results, higher_is_better: true}
lmms_eval_specific_kwargs:
  default: {prompt_type: format, multiple_choice_prompt: Give the letter., open_ended_prompt: Give a word.}
"""
EDITS = """
dataset_path: parquet
dataset_kwargs: {data_files: {train: FOLDER/edits.parquet}}
task: local_edits
test_split: train
output_type: generate_until
doc_to_visual: !function utils.to_pictures
doc_to_text: instruction
doc_to_target: instruction
generation_kwargs: {max_new_tokens: 512}
process_results: !function utils.written
metric_list:
  - {metric: pictures, aggregation: mean, higher_is_better: true}
"""
EDIT_UTILS = """
import json
from PIL import Image

def to_pictures(doc):
    return [doc["input_image"].convert("RGB")]

def written(doc, results):  # as gedit_bench reads its answers
    return {"pictures": float(Image.open(json.loads(results[0])["images"][0]).size == (6, 4))}
"""
UTILS = "from lmms_eval.tasks.mme.utils import *\nfrom lmms_eval.tasks.mmmu.utils import *\n"
PARQUET = """
import json, sys
from datasets import Dataset, Image
rows, path, *images = sys.argv[1:]
data = Dataset.from_list(json.loads(open(rows).read()))
for name in images:
    data = data.cast_column(name, Image())
data.to_parquet(path)
"""


@pytest.fixture(scope="module")
def address(sampler):
    """Few rows and a queue that is shorter than the harnesses' own concurrency would need without it."""
    limits = replace(LIMITS, rows=2, max_queue=512, images="vit", max_images=0, max_pixels=40_000_000, max_body=10**8)
    with served(sampler, limits) as (_, found):
        yield found


@pytest.fixture(scope="module")
def drawing(sampler):
    with served(sampler, replace(LIMITS, rows=2, max_queue=512)) as (_, found):
        yield found


def environment(variable: str) -> Path:
    folder = os.environ.get(variable)
    assert folder, f"set {variable} to the harness's Python environment, as launch/test.sh -m harness does"
    return Path(folder) / "bin"


def scan(k: int) -> Pillow.Image:
    """Pictures of many sizes, some larger than a row."""
    size = (40 + 90 * k, 60 + 50 * k)
    return Pillow.fromarray(np.random.default_rng(k).integers(0, 255, size, np.uint8)).convert("RGB")


def run(command: list, **variables: str) -> str:
    """The output of a harness. It reaches nothing but this machine."""
    known = {**os.environ, "NO_PROXY": "*", "no_proxy": "*", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    known.pop("PYTHONPATH", None)  # the harness has its own packages
    done = subprocess.run(
        [*map(str, command)], env={**known, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


def answer_of(sample: dict) -> str:
    answer = sample["filtered_resps"]
    return answer if isinstance(answer, str) else answer[0]


def test_lmms_eval(address, tmp_path):
    """Tasks in MME's and MMMU's formats, scored by their own code; 8 requests at a time."""
    python = environment("LMMS_EVAL") / "python"
    paths = [tmp_path / f"{k}.png" for k in range(COUNT)]
    for k, path in enumerate(paths):
        scan(k).save(path)
    mme = [
        {"question_id": f"{k}.png", "image": str(path), "question": question, "answer": answer, "category": "existence"}
        for k, path in enumerate(paths)
        for question, answer in zip(QUESTIONS, ("Yes", "No"), strict=True)
    ]
    mmmu = [
        {
            "id": f"validation_Digits_{k}", "question": "Which digit is <image 1>?", "options": str(CHOICES),
            "question_type": "multiple-choice", "answer": "ABCD"[k % 4], "subfield": "Digits", "image_1": str(path),
        }
        for k, path in enumerate(paths)
    ]  # fmt: skip
    (tmp_path / "utils.py").write_text(UTILS)
    for name, rows, image, task in (("mme", mme, "image", MME), ("mmmu", mmmu, "image_1", MMMU)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        (tmp_path / f"local_{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)))
        run([python, "-c", PARQUET, tmp_path / f"{name}.json", tmp_path / f"{name}.parquet", image])
    model = f"model=tiny,base_url={address}/v1,api_key=none,num_concurrent=8,max_retries=1,timeout=300"
    command = [python, "-m", "lmms_eval", "--model", "openai", "--model_args", model, "--tasks", "local_mme,local_mmmu"]
    command += ["--include_path", tmp_path, "--batch_size", "1", "--log_samples", "--output_path", tmp_path / "out"]
    run(command, HF_HOME=str(tmp_path / "hf"), OPENAI_API_KEY="none")
    [results] = (tmp_path / "out").rglob("*_results.json")
    scores = json.loads(results.read_text())["results"]
    assert {"local_mme", "local_mmmu"} <= set(scores)
    for name, rows in (("mme", mme), ("mmmu", mmmu)):
        [file] = (tmp_path / "out").rglob(f"*_samples_local_{name}.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        answers = [answer_of(sample) for sample in samples]
        assert len(answers) == len(rows) and not [a for a in answers if a == "None" or "FAILED" in a]
        for sample, answer in zip(samples, answers, strict=True):
            if name == "mme":  # as the same question is answered directly
                k, which = divmod(sample["doc_id"], 2)
                question = QUESTIONS[which].replace(" Please answer yes or no.", "") + " Answer yes or no."
                parts = [image_part(data_url(scan(k))), {"type": "text", "text": question}]
                direct = ask(openai_client(address), [{"role": "user", "content": parts}], max_tokens=16, temperature=0)
                assert answer.strip() == direct.choices[0].message.content.strip()


def test_vlmevalkit(address, tmp_path):
    """A table of one's own, multiple choice, scored by exact matching; 8 requests at a time."""
    (tmp_path / "data").mkdir()
    lines = ["index\tquestion\tA\tB\tC\tD\tanswer\timage"]
    for k in range(COUNT):
        file = io.BytesIO()
        scan(k).save(file, "JPEG")
        encoded = base64.b64encode(file.getvalue()).decode()
        lines.append("\t".join([str(k), "Which digit is this?", *CHOICES, "ABCD"[k % 4], encoded]))
    (tmp_path / "data/LocalDigits.tsv").write_text("\n".join(lines) + "\n")
    vlmutil = environment("VLMEVALKIT") / "python"
    command = [vlmutil, "-m", "vlmeval.run", "--base-url", f"{address}/v1", "--model", "tiny", "--data", "LocalDigits"]
    command += [
        "--judge",
        "exact_matching",
        "--api-nproc",
        "8",
        "--retry",
        "1",
        "--max-tokens",
        "16",
        "--work-dir",
        tmp_path / "out",
    ]
    output = run(command, LMUData=str(tmp_path / "data"), HOME=str(tmp_path))
    [scores] = {path.resolve() for path in (tmp_path / "out").rglob("*LocalDigits_acc.csv")}
    assert "Overall" in scores.read_text()
    tables = {path.resolve() for path in (tmp_path / "out").rglob("*LocalDigits.*") if path.suffix in (".xlsx", ".tsv")}
    reading = "import sys, vlmeval.smp as s; print(s.load(sys.argv[1])[['prediction']].to_json(orient='records'))"
    [table] = tables
    printed = run([vlmutil, "-c", reading, table], HOME=str(tmp_path)).splitlines()[-1]
    answers = [row["prediction"] for row in json.loads(printed)]
    assert len(answers) == COUNT and not [a for a in answers if a is None or "Failed" in str(a)], output[-4000:]


def test_lmms_eval_plug_in(drawing, tmp_path):
    """Edits in GEdit's form: {"text", "images"} with the paths of pictures, which are the server's."""
    python = environment("LMMS_EVAL") / "python"
    rows = []
    for k in range(3):
        as_pillow(tiny.pixels(k)).save(tmp_path / f"{k}.png")
        rows.append({"key": str(k), "instruction": "mirror it", "input_image": str(tmp_path / f"{k}.png")})
    (tmp_path / "utils.py").write_text(EDIT_UTILS)
    (tmp_path / "edits.json").write_text(json.dumps(rows))
    (tmp_path / "local_edits.yaml").write_text(EDITS.replace("FOLDER", str(tmp_path)))
    run([python, "-c", PARQUET, tmp_path / "edits.json", tmp_path / "edits.parquet", "input_image"])
    installed = tmp_path / "installed"  # what pip writes besides the modules: the entry point
    info = installed / "starflow2_evaluation_plugins-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: starflow2_evaluation_plugins\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[lmms_eval.models]\nstarflow2 = starflow2_lmms_eval:MANIFEST\n")
    model = f"base_url={drawing}/v1,mode=edit,folder={tmp_path / 'pictures'},concurrent=4,seed=2"
    command = [python, "-m", "lmms_eval", "--model", "starflow2", "--model_args", model, "--tasks", "local_edits"]
    command += ["--include_path", tmp_path, "--batch_size", "1", "--log_samples", "--output_path", tmp_path / "out"]
    run(command, HF_HOME=str(tmp_path / "hf"), PYTHONPATH=f"{PLUGINS}:{installed}")
    [results] = (tmp_path / "out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["local_edits"]["pictures,none"] == 1.0
    for k in range(3):
        parts = [image_part(data_url(as_pillow(tiny.pixels(k)).convert("RGB"))), {"type": "text", "text": "mirror it"}]
        message = {"role": "user", "content": parts}
        direct = ask(openai_client(drawing), [message], seed=2, image_first=True, max_images=1).choices[0].message
        with Pillow.open(tmp_path / f"pictures/local_edits/{k}.png") as image:
            assert data_url(image) == direct.images[0]["image_url"]["url"]


def test_vlmevalkit_plug_in(drawing, tmp_path):
    """The class, as VLMEvalKit's own code calls it, and its entry as a program."""
    as_pillow(tiny.pixels(1)).save(tmp_path / "scan.png")
    python = environment("VLMEVALKIT") / "python"
    variables = dict(STARFLOW2_URL=f"{drawing}/v1", STARFLOW2_FOLDER=str(tmp_path / "out"), PYTHONPATH=str(PLUGINS))
    variables |= dict(HOME=str(tmp_path), SCAN=str(tmp_path / "scan.png"))
    asking = "import os, starflow2_vlmevalkit as s; m = s.model(seed=4); print(m.generate([os.environ['SCAN'], 'mirror it']))"
    answer = json.loads(run([python, "-c", asking], **variables).splitlines()[-1])
    with Pillow.open(answer["images"][0]) as image:
        assert image.size == (6, 4)
    assert "--base-url" in run([python, "-m", "starflow2_vlmevalkit", "--help"], **variables)
