"""Benchmarks of understanding: local copies in the forms of lmms-eval and VLMEvalKit, and answers that scorers read."""

import base64
import csv
import io
import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from painter import Painter
from PIL import Image as Pillow

from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.engine import evaluate
from starflow2_jax.evaluation.questions import Question, is_right, letter
from starflow2_jax.evaluation.table import open_benchmark
from starflow2_jax.sampling.engine import Sampler

RUN = {"checkpoint": "here"}


def png(level: int, size=(6, 4)) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", size, (level, level, level)).save(file, "PNG")
    return file.getvalue()


def hf(level: int) -> dict:
    return {"bytes": png(level), "path": None}


def parquet(folder: Path, rows: list[dict], split: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{split}-00000-of-00001.parquet")
    return folder


def tsv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def run(name: str, data: Path, out: Path, sampler=None, say="B"):
    sampler = sampler or Painter(say=say if callable(say) else lambda prompt: say)
    numbers, _ = evaluate(sampler, open_benchmark(name, str(data)), out, RUN, progress=False)
    return numbers, sampler


def table_of(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


MMMU = [
    dict(id="validation_Art_Theory_1", question="Compare <image 1> with <image 2>.", options="['old', 'new']",
         answer="B", question_type="multiple-choice", image_1=hf(10), image_2=hf(20), subfield="x"),
    dict(id="validation_Art_Theory_2", question="Which? <image 1>", options="['<image 1>', 'none']",
         answer="A", question_type="multiple-choice", image_1=hf(30), image_2=None, subfield="x"),
    dict(id="validation_Math_1", question="How many? <image 1>", options="[]",
         answer="['4', 'four']", question_type="open", image_1=hf(40), image_2=None, subfield="y"),
]  # fmt: skip


def test_mmmu_puts_pictures_at_their_marks_and_writes_what_its_script_reads(tmp_path):
    data = parquet(tmp_path / "MMMU" / "data", MMMU, "validation")
    parquet(data, MMMU[:1], "dev")  # another split beside it
    numbers, painter = run(
        "mmmu", data.parent, tmp_path / "out", say=lambda prompt: "Four." if "How" in prompt[0].text else "B. new"
    )
    first, second, third = painter.asked
    shape = [part.text if isinstance(part, Text) else round((part.pixels.mean() + 1) * 127.5) for part in first]
    ask = "Answer with the option's letter from the given choices directly."
    assert shape == ["Compare ", 10, " with ", 20, f".\nA. old\nB. new\n\n{ask}"]
    assert [type(part) for part in second] == [Text, Image, Text, Image, Text]
    assert third[-1].text == "\n\nAnswer the question using a single word or phrase."
    assert all(part.via == "vit" for prompt in painter.asked for part in prompt if isinstance(part, Image))
    assert numbers == {"exact_match": pytest.approx(2 / 3), "exact_match_x": 0.5, "exact_match_y": 1.0}
    rows = json.loads((tmp_path / "out/mmmu/Art_Theory/output.json").read_text())
    assert rows[0] == {
        "id": "validation_Art_Theory_1", "question_type": "multiple-choice", "answer": "B", "response": "B. new",
        "all_choices": ["A", "B"], "index2ans": {"A": "old", "B": "new"},
    }  # fmt: skip
    [row] = json.loads((tmp_path / "out/mmmu/Math/output.json").read_text())
    assert row == {
        "id": "validation_Math_1",
        "question_type": "short-answer",
        "answer": ["4", "four"],
        "response": "Four.",
    }
    answers = json.loads((tmp_path / "out/mmmu/answers.json").read_text())
    assert answers == {"validation_Art_Theory_1": "B", "validation_Art_Theory_2": "B", "validation_Math_1": "Four."}


@pytest.mark.parametrize("part", ["validation", "dev"])
def test_a_split_of_a_folder_is_chosen(tmp_path, part):
    """Also of MMMU's own copy, with a folder for each subject. A part that is not there is refused."""
    for subject, rows in (("Math", MMMU[2:]), ("Art_Theory", MMMU[:2])):
        for split in ("validation", "dev"):
            named = [row | {"id": row["id"].replace("validation", split)} for row in rows]
            parquet(tmp_path / "own" / subject, named, split)
    parquet(tmp_path / "flat", MMMU, "validation"), parquet(tmp_path / "flat", MMMU[:1], "dev")
    own = open_benchmark("mmmu", str(tmp_path / "own"), part=part)
    assert [task.key for task in own.tasks()] == [row["id"].replace("validation", part) for row in MMMU]
    flat = open_benchmark("mmmu", str(tmp_path / "flat"), part=part)
    assert len(flat.tasks()) == (3 if part == "validation" else 1) and flat.part == part
    with pytest.raises(UserError, match="has the parts dev, validation, and none named 'test'"):
        open_benchmark("mmmu", str(tmp_path / "own"), part="test")


def test_mmmus_own_copy_has_a_folder_for_each_subject(tmp_path):
    for subject, rows in (("Math", MMMU[2:]), ("Art_Theory", MMMU[:2])):
        parquet(tmp_path / "MMMU" / subject, rows, "validation")
        parquet(tmp_path / "MMMU" / subject, rows[:1], "test")
    tasks = open_benchmark("mmmu", str(tmp_path / "MMMU")).tasks()
    assert [task.key for task in tasks] == [row["id"] for row in MMMU]


MME = [
    dict(question_id=f"{category}/{name}.png", question=f"Is {word} {name} there? Please answer yes or no.",
         answer=answer, category=category, image=hf(i))
    for i, (category, name) in enumerate([("existence", "0001"), ("existence", "0002"), ("OCR", "0001")])
    for word, answer in (("this", "Yes"), ("that", "No"))
]  # fmt: skip


def mme_score(folder: Path) -> dict[str, float]:
    """Accuracy plus accuracy of pairs of each category, in percent, by the logic of MME's calculation.py."""
    scores = {}
    for path in folder.glob("*.txt"):
        lines = path.read_text().strip("\n").split("\n")
        right, pairs = [], []
        for one, two in zip(lines[::2], lines[1::2], strict=True):
            (a, _, gold_a, said_a), (b, _, gold_b, said_b) = one.split("\t"), two.split("\t")
            assert a == b
            found = [gold.lower() in said.lower()[:4] for said, gold in ((said_a, gold_a), (said_b, gold_b))]
            right += found
            pairs.append(all(found))
        scores[path.stem] = 100 * (np.mean(right) + np.mean(pairs))
    return scores


def test_mme_writes_pairs_of_lines(tmp_path):
    shuffled = [MME[i] for i in (0, 2, 1, 4, 3, 5)]  # a picture's questions need not be neighbours
    data = parquet(tmp_path / "data", shuffled, "test")
    say = lambda prompt: "No, it is not." if "that" in prompt[1].text or "0002" in prompt[1].text else "Yes."  # noqa: E731
    numbers, painter = run("mme", data, tmp_path / "out", say=say)
    assert painter.asked[0][1].text == "Is this 0001 there?\nAnswer the question using a single word or phrase."
    assert mme_score(tmp_path / "out/mme") == {"existence": 75 + 50, "OCR": 200}
    assert numbers["exact_match"] == pytest.approx(5 / 6)
    keys = [json.loads(line)["key"] for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()]
    assert keys[:3] == ["existence/0001.png", "existence/0002.png", "existence/0001.png#2"]


def test_mme_of_vlmevalkit_keeps_what_its_rating_groups_by(tmp_path):
    rows = [
        dict(index=i, question=row["question"], answer=row["answer"], category=row["category"],
             image=base64.b64encode(png(i)).decode(), image_path=row["question_id"])
        for i, row in enumerate(MME)
    ]  # fmt: skip
    run("mme", tsv(tmp_path / "MME.tsv", rows), tmp_path / "out", say="Yes")
    stats = defaultdict(list)
    for row in table_of(tmp_path / "out/mme/predictions.tsv"):
        assert "image" not in row
        stats[row["category"], row["image_path"]].append(row["answer"] == row["prediction"])
    assert set(map(tuple, stats.values())) == {(True, False)} and len(stats) == 3
    assert mme_score(tmp_path / "out/mme") == {"existence": 50, "OCR": 50}


def test_a_table_may_name_its_pictures_by_paths(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(100 * i))
    rows = [
        dict(index=1, question="What?", answer="x", image_path="1.png"),
        dict(index=2, question="What?", answer="x", image_path="['0.png', '1.png']"),
    ]
    _, painter = run("mme", tsv(tmp_path / "MME.tsv", rows), tmp_path / "out")
    shown = [[round((part.pixels.mean() + 1) * 127.5) for part in asked[:-1]] for asked in painter.asked]
    assert shown == [[100], [0, 100]]


def test_gqa_joins_its_two_tables(tmp_path):
    asked = [dict(id=str(i), imageId=f"n{i % 2}", question=f"What is {i}?", answer="dog") for i in range(3)]
    parquet(tmp_path / "testdev_balanced_instructions", asked, "testdev")
    parquet(tmp_path / "testdev_balanced_images", [dict(id=f"n{i}", image=hf(100 * i)) for i in range(2)], "testdev")
    numbers, painter = run(
        "gqa", tmp_path, tmp_path / "out", say=lambda prompt: "Dog." if "0" in prompt[1].text else "a cat"
    )
    assert [round((prompt[0].pixels.mean() + 1) * 127.5) for prompt in painter.asked] == [0, 100, 0]
    found = json.loads((tmp_path / "out/gqa/testdev_balanced_predictions.json").read_text())
    assert found == [{"questionId": str(i), "prediction": said} for i, said in enumerate(("dog", "a cat", "a cat"))]
    right = {x["questionId"]: x["prediction"] for x in found}  # as GQA's eval.py: equality of words
    assert np.mean([right[row["id"]] == row["answer"] for row in asked]) == pytest.approx(numbers["exact_match"])


@pytest.mark.parametrize(
    "asked, seen, said",
    [
        ({"imageId": "gone"}, {"id": "n", "image": hf(1)}, "lacks the picture gone"),
        ({"imageId": None}, {"id": "n", "image": hf(1)}, "_instructions, row 0, has no 'imageId'.*from huggingface.co"),
        ({"imageId": "n"}, {"name": "n", "image": hf(1)}, "_images, row 0, has no 'id'"),
        ({"imageId": "n"}, {"id": "n", "picture": hf(1)}, "_images, row 0, has no 'image'"),
    ],
)
def test_other_tables_of_gqa_are_refused_with_a_sentence(tmp_path, asked, seen, said):
    question = dict(id="1", question="What?", answer="dog")
    parquet(tmp_path / "testdev_balanced_instructions", [question | asked], "testdev")
    parquet(tmp_path / "testdev_balanced_images", [seen], "testdev")
    with pytest.raises(UserError, match=said):
        open_benchmark("gqa", str(tmp_path))


def test_mmbench_shares_the_pictures_of_a_table(tmp_path):
    picture = base64.b64encode(png(50)).decode()
    rows = [
        dict(index=1, question="Where?", hint="Look.", A="here", B="there", C="", answer="B", category="place", image=picture),
        dict(index=1000001, question="Where?", hint="nan", A="there", B="here", C="far", answer="A", category="place", image="1"),
    ]  # fmt: skip
    data = tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    numbers, painter = run("mmbench", data, tmp_path / "out", say=lambda prompt: "there")
    ask = "Answer with the option's letter from the given choices directly."
    assert painter.asked[0][1].text == f"Look. Where? There are several options:\nA. here\nB. there\n{ask}"
    assert (
        "C. far" in painter.asked[1][1].text and painter.asked[1][0].pixels.mean() == painter.asked[0][0].pixels.mean()
    )
    table = table_of(tmp_path / "out/mmbench/predictions.tsv")
    assert [row["index"] for row in table] == ["1", "1000001"] and set(table[0]) == {*rows[0], "prediction"} - {"image"}
    assert numbers["exact_match"] == 1.0  # "there" is the text of the right choice of both


def test_seed_and_ai2d(tmp_path):
    seed = [
        dict(question_id=f"v{i}", question="Who?", choice_a="a", choice_b="b", choice_c="c", choice_d="d", answer="C",
             data_type="image", image=[hf(1), hf(2)][: i + 1])
        for i in range(2)
    ]  # fmt: skip
    numbers, painter = run("seed", parquet(tmp_path / "seed", seed, "test"), tmp_path / "out", say="(C) c")
    lines = [json.loads(line) for line in (tmp_path / "out/seed/results.json").read_text().splitlines()]
    assert lines == [{"question_id": "v0", "prediction": "C"}, {"question_id": "v1", "prediction": "C"}]
    assert [len(prompt) for prompt in painter.asked] == [2, 3] and numbers["exact_match"] == 1.0
    ai2d = [dict(question="What?", options=["x", "y", "z"], answer="2", image=hf(3))]
    numbers, painter = run("ai2d", parquet(tmp_path / "ai2d", ai2d, "test"), tmp_path / "out2", say="C")
    assert "C. z" in painter.asked[0][1].text and numbers["exact_match"] == 1.0
    assert table_of(tmp_path / "out2/ai2d/predictions.tsv")[0]["prediction"] == "C"


def test_a_folder_of_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(MME).cast_column("image", datasets.Image())
    datasets.DatasetDict({"test": table}).save_to_disk(str(tmp_path / "MME"))
    numbers, painter = run("mme", tmp_path / "MME", tmp_path / "out", say="Yes")
    assert len(painter.asked) == 6 and numbers["exact_match"] == 0.5
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "other"))
    with pytest.raises(UserError, match="has the splits train and no 'test'.*huggingface.co/datasets/lmms-lab/MME"):
        open_benchmark("mme", str(tmp_path / "other"))
    datasets.DatasetDict({"test": table, "dev": table.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert len(open_benchmark("mme", str(tmp_path / "two"), part="dev").tasks()) == 1


def test_a_real_model_reads_pictures_and_writes_words(tmp_path):
    sampler = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=512)
    run("ai2d", parquet(tmp_path / "a", [dict(question="What?", options=["x", "y"], answer="0", image=hf(3))], "test"),
        tmp_path / "out", sampler)  # fmt: skip
    [row] = table_of(tmp_path / "out/ai2d/predictions.tsv")
    [line] = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert row["prediction"] == " ".join("".join(part["text"] for part in line["parts"]).split())


@pytest.mark.parametrize(
    "prediction, wanted",
    [("B", "B"), ("b", None), ("(A) old", "A"), ("A.", "A"), ("new", "B"), ("New.", "B"), ("An old one", None), ("C", None),
     ("", None), ("Both", None), ("A's", None)],
)  # fmt: skip
def test_letters_of_answers(prediction, wanted):
    assert letter(prediction, {"A": "old", "B": "new"}) == wanted


def test_hidden_answers_are_not_scored(tmp_path):
    rows = [dict(question="What?", options=["x", "y"], answer="?", image=hf(3))]
    assert run("ai2d", parquet(tmp_path / "a", rows, "test"), tmp_path / "out")[0] == {"exact_match": None}


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "mme",
            None,
            "needs --prompts: a copy of the data set MME or of MME.tsv, from huggingface.co/datasets/lmms-lab/MME",
        ),
        ("mme", "index\tcategory\n1\tx\n", "row 0, has no 'question'"),
        ("mme", "index\tquestion\timage\n1\twho\tx\n", "row 0, has the image 'x', but no row of this index holds"),
        ("mme", "index\tquestion\timage\n1\twho\t1\n", "row 0, has the image '1', but no row of this index holds"),
        ("mme", "index\tquestion\timage\n1\twho\t[1]\n", "cannot be read as a table .a picture is no base64."),
        ("mme", "index\tquestion\n1\twho\n2\twho\tme\n", "row 1, has more fields than the header"),
        ("mme", "index\tquestion\tcategory\n1\twho\ta/b\n", "row 0, has 'a/b' in place of a word that a file"),
        ("mmmu", "index\tquestion\tcategory\n1\twho\t..\n", "row 0, has '..' in place of a word that a file"),
        ("mmmu", f"index\tquestion\tcategory\n1\twho\t{'x' * 300}\n", "in place of a word that a file"),
        (
            "mme",
            "index\tquestion\timage\n1\twho\t" + "!" * 99 + "\n",
            "cannot be read as a table .a picture is no base64.",
        ),
        ("mmmu", "index\tquestion\timage\n", "holds no questions"),
    ],
)
def test_other_tables_are_refused_with_a_sentence(tmp_path, name, content, said):
    path = tmp_path / "table.tsv"
    if content:
        path.write_text(content)
    with pytest.raises(UserError, match=said) as refused:
        open_benchmark(name, str(path) if content else None)
    assert "\n" not in str(refused.value)


def test_a_folder_of_two_tables_needs_a_name(tmp_path):
    parquet(tmp_path / "en", MME, "test"), parquet(tmp_path / "cn", MME, "test")
    with pytest.raises(
        UserError, match=re.escape("holds cn/test, en/test, of which not exactly one is the split 'test'")
    ):
        open_benchmark("mme", str(tmp_path))


def test_a_picture_that_a_question_names_must_be_there(tmp_path):
    data = parquet(tmp_path / "a", [MMMU[0] | {"image_2": None}, MMMU[1]], "validation")
    with pytest.raises(UserError, match="question validation_Art_Theory_1 names <image 2>"):
        open_benchmark("mmmu", str(data)).tasks()


def test_words_that_are_right():
    asked = Question("k", "How many?", {}, "", "['4', 'four']", {})
    assert is_right(asked, "Four.") and is_right(asked, "4") and not is_right(asked, "44")
    assert not is_right(replace(asked, answer="[]"), "Four.") and not is_right(replace(asked, answer="[]"), "")


def test_pictures_share_what_the_row_has_left(tmp_path, monkeypatch):
    """A question with a small and a large picture: the large one is scaled down to what a row of 256 leaves, and
    answered.
    """
    large = Pillow.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), np.uint8))
    file = io.BytesIO()
    large.save(file, "PNG")
    rows = [
        dict(question="Which?", options=["x", "y"], answer="0", image=[hf(3), {"bytes": file.getvalue(), "path": None}])
    ]
    sampler = Sampler(tiny.MODEL, tiny.params(), tiny.tokenizer(), tiny.CODEC, max_positions=256)
    asked, generate = [], sampler.generate
    monkeypatch.setattr(sampler, "generate", lambda prompts, *more: asked.extend(prompts) or generate(prompts, *more))
    run("ai2d", parquet(tmp_path / "a", rows, "test"), tmp_path / "out", sampler)
    [[small, scaled, _]] = asked
    assert small.pixels.shape == (4, 6, 1) and scaled.pixels.shape[0] < 300
    length = len(sampler.encoder(asked[0], closed=False)["tokens"])
    assert 256 - 16 - 20 < length <= 256 - 16  # of an answer
    height, width, _ = scaled.pixels.shape
    want = np.asarray(large.convert("L").resize((width, height), Pillow.Resampling.BICUBIC), np.float32) / 127.5 - 1
    np.testing.assert_allclose(scaled.pixels[..., 0], want, atol=1e-5)
    assert tiny.VISION.resized((height, width)) == (height, width) and abs(width / height - 4 / 3) < 0.2
    many = parquet(tmp_path / "b", [rows[0] | {"image": [hf(3)] * 200}], "test")
    with pytest.raises(DocumentError, match="^task 0: a picture of 6x4 pixels takes at least .* of the 256 positions"):
        run("ai2d", many, tmp_path / "many", sampler)
