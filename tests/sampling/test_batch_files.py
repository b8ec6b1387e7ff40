"""Folders of answers: several processes, resuming a killed run, and the batches that run together."""

import json
import os
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from starflow2_jax.checkpoints.lock import LockedError
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.errors import UserError
from starflow2_jax.models.jacobi import SEQUENTIAL
from starflow2_jax.sampling import batch_files
from starflow2_jax.sampling.batch_files import Prompt, Share
from starflow2_jax.sampling.rows import SampleOptions

SHORT, LONG = SampleOptions(max_tokens=3), SampleOptions(max_tokens=9)


class Recorder:
    """A sampler whose answer is its prompt, its seed, and the seed as a gray level; `calls`: prompts and rows of each
    call.
    """

    step, schedule, deep = 7, None, SEQUENTIAL

    def __init__(self, makes_pixels: bool = True):
        self.calls, self.codec = [], SimpleNamespace(makes_pixels=makes_pixels)

    def generate(self, prompts, options, seeds, num, rows):
        self.calls.append((len(prompts), rows))
        each = [prompt for prompt in prompts for _ in range(num)]
        return [
            [
                Text(f"{p[0].text} {options.max_tokens} {seed}"),
                Image(np.full((2, 2, 1), seed % 255 / 127.5 - 1, np.float32)),
            ]
            for p, seed in zip(each, seeds, strict=True)
        ]


def prompts(count: int, num: int = 2, options=lambda i: SHORT) -> list[Prompt]:
    return [
        Prompt(i, lambda i=i: [Text(f"p{i}")], options(i), tuple(range(i * num, i * num + num)), f"prompt {i}: ")
        for i in range(count)
    ]


def lines(folder) -> list[dict]:
    return [json.loads(x) for path in sorted(folder.glob("samples*.jsonl")) for x in path.read_text().splitlines()]


def test_prompts_of_equal_options_run_together_and_compile_once(tmp_path):
    sampler, asked = Recorder(), prompts(7, options=lambda i: SHORT if i < 5 else LONG)
    assert batch_files.write(sampler, asked, tmp_path, batch=2, progress=False)
    assert sampler.calls == [(2, 2), (2, 2), (1, 2), (2, 2)]
    found = lines(tmp_path)
    assert [(x["document"], x["seed"]) for x in found] == [(i, 2 * i + k) for i in range(7) for k in range(2)]
    assert [x["parts"][0]["text"] for x in found[-4:]] == ["p5 9 10", "p5 9 11", "p6 9 12", "p6 9 13"]
    assert found[3]["parts"][1] == {"image": "003_1.png"} and (tmp_path / "003_1.png").is_file()
    assert json.loads((tmp_path / "samples.json").read_text()) == [x["parts"] for x in found]


def test_processes_share_the_batches_and_the_last_one_lists_all(tmp_path):
    asked, alone, samplers = prompts(5), tmp_path / "alone", [Recorder() for _ in range(3)]
    alone.mkdir()
    batch_files.write(Recorder(), asked, alone, batch=2, progress=False)
    for process in (2, 0, 1):
        assert not (tmp_path / "samples.json").exists()
        done = batch_files.write(samplers[process], asked, tmp_path, 2, share=Share(process, 3), progress=False)
        assert done == (process == 1)
    assert [sum(count for count, _ in sampler.calls) for sampler in samplers] == [2, 2, 1]
    assert [x["document"] for x in lines(tmp_path)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    for name in ("samples.json", "000_1.png", "009_1.png"):
        assert (tmp_path / name).read_bytes() == (alone / name).read_bytes()


def test_a_killed_run_keeps_what_is_whole_and_goes_on(tmp_path):
    asked, again = prompts(3), Recorder()
    batch_files.write(Recorder(), asked, tmp_path, 2, progress=False)
    path = tmp_path / "samples.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-5])  # within the last answer: both answers to prompt 2 are drawn again
    assert batch_files.write(again, asked, tmp_path, 2, progress=False)
    assert again.calls == [(1, 2)] and path.read_text() == whole


class Mixer(Recorder):
    """A sampler whose answers depend on all that runs beside them, as the last bits of real ones do."""

    def generate(self, prompts, options, seeds, num, rows):
        beside = f"{[prompt[0].text for prompt in prompts]} {rows}"
        return [
            [Text(f"{part.text} {beside}"), image]
            for part, image in super().generate(prompts, options, seeds, num, rows)
        ]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("killed_after", [1, 3, 6])
def test_a_prompt_always_runs_beside_the_same_others(tmp_path, processes, killed_after):
    """Neither processes nor an interruption changes an answer, wherever in a batch the run was killed."""
    asked, wanted = prompts(7), tmp_path / "wanted"
    wanted.mkdir()
    batch_files.write(Mixer(), asked, wanted, batch=3, progress=False)
    for i in range(processes):
        share = Share(i, processes)
        batch_files.write(Mixer(), asked, tmp_path, 3, share=share, progress=False)
        path = tmp_path / share.file
        path.write_text("\n".join(path.read_text().split("\n")[:killed_after])[:-4])
        batch_files.write(Mixer(), asked, tmp_path, 3, share=share, progress=False)
    assert len(lines(tmp_path)) == 14
    assert (tmp_path / "samples.json").read_bytes() == (wanted / "samples.json").read_bytes()


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    asked, first, second = prompts(5), Recorder(), Recorder()
    batch_files.write(first, asked, tmp_path, 2, share=Share(1, 2), progress=False)
    path = tmp_path / "samples.1-of-2.jsonl"
    path.write_text(path.read_text()[:-5])  # killed within the last answer, to prompt 3
    assert batch_files.write(second, asked, tmp_path, 4, progress=False)
    assert second.calls == [(4, 4), (1, 4)]
    own = [json.loads(x)["document"] for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert own == [0, 0, 1, 1, 3, 3, 4, 4]  # all but prompt 2
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 10
    assert batch_files.write(third := Recorder(), asked, tmp_path, 4, progress=False) and not third.calls


def test_a_prompt_that_does_not_fit_is_named(tmp_path):
    asked = prompts(3)

    def unreadable():
        raise DocumentError("no document")

    asked[2] = Prompt(2, unreadable, SHORT, (4, 5), "prompt 2: ")
    with pytest.raises(DocumentError, match="^prompt 2: no document"):
        batch_files.write(Recorder(), asked, tmp_path, 2, progress=False)
    assert [x["document"] for x in lines(tmp_path)] == [0, 0, 1, 1]  # the batch before stands
    sampler = Recorder()

    def refuse(*_):
        raise DocumentError("too long", 1)

    sampler.generate = refuse
    with pytest.raises(DocumentError, match="^prompt 1: too long"):
        batch_files.write(sampler, prompts(3), tmp_path / "new", 3, progress=False)


def test_latents_are_written_as_they_are(tmp_path):
    [line] = batch_files.write_anew(Recorder(makes_pixels=False), prompts(1, num=1)[0], tmp_path)
    assert line["parts"][1] == {"image": "000_1.npy"} and np.load(tmp_path / "000_1.npy").shape == (2, 2, 1)


def test_a_folder_holds_one_run(tmp_path):
    run = batch_files.about(Recorder(), tmp_path / "checkpoint", None, 3) | {"options": (1, 2)}
    batch_files.begin(tmp_path / "out", run)
    batch_files.begin(tmp_path / "out", run)
    with pytest.raises(UserError, match="whose seed was 3 and not 4"):
        batch_files.begin(tmp_path / "out", run | {"seed": 4})
    with pytest.raises(UserError, match="--documents"):
        batch_files.write_anew(Recorder(), prompts(1)[0], tmp_path / "out")
    with pytest.raises(UserError, match="--process=3 must be at least 0 and below --processes=3"):
        Share(3, 3)


def test_two_processes_do_not_write_the_same_answers(tmp_path):
    """The second is refused while the first answers, and writes nothing; other shares may go on."""

    class Meanwhile(Recorder):
        def generate(self, *given):
            before = sorted(tmp_path.iterdir())
            for write in (partial(batch_files.write, second, asked, tmp_path, 2, progress=False), single):
                with pytest.raises(LockedError, match=f"process {os.getpid()} on .* writes into {tmp_path} already"):
                    write()
            assert sorted(tmp_path.iterdir()) == before and not second.calls
            batch_files.write(Recorder(), asked, tmp_path, 2, share=Share(0, 2), progress=False)
            return super().generate(*given)

    asked, second = prompts(3), Recorder()
    single = partial(batch_files.write_anew, second, asked[0], tmp_path)
    batch_files.write(Meanwhile(), asked, tmp_path, 4, progress=False)
    assert len(json.loads((tmp_path / "samples.json").read_text())) == 6
    batch_files.write_anew(Meanwhile(), asked[0], tmp_path)
    assert not list(tmp_path.glob("*lock*"))


@pytest.mark.parametrize("damage", ["not JSON", "[1]", "{}", "[" * 100_000, "\udcff"])
def test_a_damaged_file_of_answers_is_named(tmp_path, damage):
    batch_files.begin(tmp_path, {"seed": 1})
    (tmp_path / "samples.jsonl").write_bytes(damage.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UserError, match="samples.jsonl(, line 1, is damaged| cannot be read as text)"):
        batch_files.write(Recorder(), prompts(1), tmp_path, 1, progress=False)
    (tmp_path / "run.json").write_bytes(damage.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="run.json (is damaged|cannot be read as text)|samples of another run"):
        batch_files.begin(tmp_path, {"seed": 1})


def test_an_empty_prompt_is_named(tmp_path):
    def asked(options: SampleOptions) -> list[Prompt]:
        return [*prompts(2), Prompt(2, lambda: [Text("")], options, (4, 5), "prompt 2: ")]

    with pytest.raises(DocumentError, match="^prompt 2: the prompt is empty; give"):
        batch_files.write(Recorder(), asked(SHORT), tmp_path, 4, progress=False)
    assert not lines(tmp_path)
    assert batch_files.write(Recorder(), asked(SampleOptions(image_first=True)), tmp_path, 4, progress=False)
