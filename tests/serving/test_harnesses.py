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
from live import LIMITS, ask, data_url, image_part, openai_client, served
from PIL import Image as Pillow

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
        answers = [sample["filtered_resps"][0] for sample in samples]
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
