"""From the reference's folder to a run: convert, init, talk to it, train a step."""

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import reference_qwen
import tiny
import tiny_fae
from PIL import Image as Pillow

from starflow2_jax import cli
from starflow2_jax.checkpoints.codec import write_codec
from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.codecs.fingerprint import fingerprint
from starflow2_jax.config import loading as configs
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.tokenizer import chat
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.engine import Sampler
from starflow2_jax.training.loop import Trainer
from starflow2_jax.weights.vlm import load_config

QUICK = Path(__file__).parents[1] / "starflow2_jax/experiments" / "digits_quick.py"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    reference_qwen.make(folder / "hf", vocab_size=416)
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / "hf" / name).unlink()
    tokenizer = tiny.tokenizer()
    tokenizer.save_pretrained(str(folder / "hf"))
    (folder / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    assert cli.main(["convert", "qwen2_5_vl", "--from", str(folder / "hf"), "--to", str(folder / "vlm")]) == 0
    return folder / "vlm"


def config_for(vlm: Path, **changes):
    config = configs.load(QUICK, runlocal=True).unlock()
    config.model.vlm = asdict(load_config(vlm / "vlm.json"))
    config.order = ("text_to_image", "joint")
    config.mesh = dict(data=8, fsdp=1, tensor=1)
    for stage in config.stages.values():
        stage.update(rows=8, steps=1)
    for flow in (config.model.shallow, config.model.deep):
        flow.update(layers=1, width=32, mlp_hidden=32)
    config.model.deep_rotary_sections = (2, 3, 3)
    config.update(changes)
    return config.lock()


@pytest.mark.slow
def test_init_then_chat_then_train(vlm, tmp_path, capsys):
    config = config_for(vlm)
    Trainer.begin(config, tmp_path / "run", vlm, load_config)
    for name in (
        "vlm.json",
        "reference_config.json",
        "tokenizer/preprocessor_config.json",
        "tokenizer/chat_template.jinja",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (vlm / name).read_bytes()
    sampler = Sampler.restore(tmp_path / "run")
    assert not sampler.skips and sampler.tokenizer.chat_template["default"] == TEMPLATE
    command = ["sample", "--checkpoint", str(tmp_path / "run"), "--prompt", "which digit is this?", "--chat"]
    assert cli.main([*command, "--max-tokens", "4", "--out", str(tmp_path / "out")]) == 0
    Trainer(config, tmp_path / "run").run(progress=False)
    trained = Sampler.restore(tmp_path / "run")
    assert trained.skips and str(trained.params["vlm"]["norm"]["scale"].dtype) == "bfloat16"


def test_a_run_draws_with_the_codec_that_init_names(vlm, tmp_path, capsys):
    (tmp_path / "codec").mkdir()
    write_codec(tmp_path / "codec", tiny_fae.codec())
    experiment, run = str(Path(__file__).with_name("fae_experiment.py")), str(tmp_path / "run")
    begin = ["init", "--vlm", str(vlm), "--config", experiment, "--out", run]
    assert cli.main(begin) == 2
    assert "--codec" in capsys.readouterr().err
    assert cli.main([*begin, "--codec", str(tmp_path / "codec")]) == 0
    assert fingerprint(CheckpointDirectory(run).codec()) == fingerprint(tiny_fae.codec())
    shutil.rmtree(tmp_path / "codec")  # the run has its own
    command = ["sample", "--checkpoint", run, "--prompt", "draw a seven", "--image-first", "--max-tokens", "17"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    with Pillow.open(next((tmp_path / "out").glob("*.png"))) as picture:
        assert picture.size == (32, 32) and picture.mode == "RGB"


def test_chat_is_the_tokenizers_template():
    """The document that `chat` makes has the token ids that the template itself gives, its images in their places."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    image = Image(tiny.pixels(0))
    document = chat(tokenizer, [("system", [Text("read")]), ("user", [image, Text("what is"), image, Text("?")])])
    assert [type(p) for p in document] == [Text, Image, Text, Image, Text] and document[1] is image
    said = "".join(p.text if isinstance(p, Text) else "<|vision_start|><|image_pad|><|vision_end|>" for p in document)
    content = [{"type": "image"}, {"type": "text", "text": "what is"}, {"type": "image"}, {"type": "text", "text": "?"}]
    messages = [{"role": "system", "content": [{"type": "text", "text": "read"}]}, {"role": "user", "content": content}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(said, add_special_tokens=False) == ids
    with pytest.raises(DocumentError, match="each image once"):
        chat(tokenizer, [("user", [image, Text("<|vision_start|><|image_pad|><|vision_end|>")])])
    tokenizer.chat_template = None
    with pytest.raises(DocumentError, match="no chat template"):
        chat(tokenizer, [("user", [Text("hello")])])


def test_a_config_of_another_vlm_is_refused(vlm, tmp_path):
    wrong = config_for(vlm).unlock()
    wrong.model.vlm.layers = 3
    for config, saying in (
        (wrong, "layers is 2, not 3"),
        (config_for(vlm, order=("pretrain",)), "remove the stage pretrain"),
    ):
        with pytest.raises(UserError, match=saying):
            Trainer.begin(config, tmp_path / "run", vlm, load_config)
        assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="exists already"):
        Trainer.begin(config_for(vlm), tmp_path / "run", vlm, load_config)
    with pytest.raises(UserError, match="no converted VLM"):
        Trainer.begin(config_for(vlm), tmp_path / "new", tmp_path, load_config)
