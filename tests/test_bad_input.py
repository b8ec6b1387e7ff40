"""What a user can get wrong gives one sentence that says what and where: configs and checkpoints."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
import tiny
from refused import refused

from starflow2_jax.checkpoints.directory import CheckpointDirectory
from starflow2_jax.checkpoints.reading import CheckpointError
from starflow2_jax.config import loading as configs
from starflow2_jax.data.digits import KINDS
from starflow2_jax.errors import ConfigError, UserError
from starflow2_jax.fields import build
from starflow2_jax.models.flow import FlowBlockConfig
from starflow2_jax.models.pretzel import PretzelConfig
from starflow2_jax.parallel.content_hash import content_hash
from starflow2_jax.training import step
from starflow2_jax.training.loop import Trainer

QUICK = Path(__file__).parents[1] / "starflow2_jax/experiments" / "digits_quick.py"


# Configs.


@pytest.mark.parametrize(
    "override, saying",
    [
        ("stages.joint.optimizer.learning_rat=1", ("learning_rat", "mean 'stages.joint.optimizer.learning_rate'?")),
        ("model.deep.layer=1", ("'model.deep.layers'",)),
        ("sead=1", ("'seed'",)),
        ("seed.deeper=1", ("seed.deeper",)),
        ("stages.joint.steps=many", ("'stages.joint.steps' takes an int", "'many'")),
        ("stages.joint.steps=1.5", ("takes an int", "1.5")),
        ("noise=loud", ("'noise' takes a float", "'loud'")),
        ("order=jiont", ("each entry of order", "'jiont'", "'joint'?")),
        ("model.deep=3", ("is a group", "model.deep.layers")),
        ("model.grid=(4.0,4.0)", ("takes a tuple such as (4, 4)", "(4.0,4.0)")),
        ("order=(1,)", ("each entry of order", "'1'")),
        ("seed", ("needs a value",)),
    ],
)
def test_a_wrong_override(override, saying):
    refused(ConfigError, configs.load, QUICK, [override], saying=saying)


def test_right_overrides():
    config = configs.load(QUICK, ["noise=0", "stages.joint.steps=7", "data.source=my=file.jsonl", "order=('joint',)"])
    assert config.noise == 0.0 and type(config.noise) is float and config.stages.joint.steps == 7
    assert config.data.source == "my=file.jsonl" and config.order == ("joint",)
    mean = configs.load(QUICK, ["model.vlm.vision.mean=(0, 0.5, 1)"]).model.vlm.vision.mean
    assert mean == (0.0, 0.5, 1.0) and {type(x) for x in mean} == {float}


def test_a_config_that_describes_nothing(tmp_path):
    refused(ConfigError, configs.load, tmp_path / "none.py", saying=("no experiment file", "none.py"))
    values = configs.load(QUICK).model.to_dict()
    wrong = {**values, "deep": {**values["deep"], "widht": 3}}
    refused(ConfigError, build, PretzelConfig, wrong, saying=("TransformerConfig", "'widht'", "'width'"))
    values.pop("vlm")
    refused(ConfigError, build, PretzelConfig, values, saying=("PretzelConfig", "vlm"))


@pytest.mark.parametrize(
    "change, saying",
    [
        (dict(order=("pretrain", "jiont")), ("jiont", "joint")),
        (dict(mesh=dict(data=3, fsdp=1, tensor=1)), ("rows=16", "multiple of 3", "mesh.data")),
        (dict(mesh=dict(data=16, fsdp=1, tensor=1)), ("data=16", "8 devices")),
        (dict(codec=dict(patch=4)), ("codec", "16 channels", "model.channels is 4", "model.channels=16")),
        (dict(codec=dict(patch=4), model=dict(channels=16)), ("model.grid", "(2, 2)")),
        (dict(model=dict(vlm=dict(vocabulary=10))), ("model.vlm.vocabulary",)),
        (dict(order=()), ("order", "at least one stage")),
        (dict(order=("joint", "joint")), ("order", "once")),
        (dict(codec=dict(patch=3), model=dict(channels=9)), ("codec.patch=3", "8 pixels")),
        (dict(codec=dict(patch=0)), ("codec.patch", "at least 1")),
        (dict(codec=dict(image_channels=3), model=dict(channels=12)), ("codec.image_channels", "gray")),
        (dict(model=dict(deep=dict(norm="layr"))), ("model.deep.norm", "'layr'", "'layer'?")),
        (dict(model=dict(shallow=dict(activation="gelux"))), ("model.shallow.activation", "'gelux'", "'gelu'?")),
        (dict(model=dict(shallow=dict(remat="fll"))), ("model.shallow.remat", "'fll'", "'full'?")),
        (dict(model=dict(vlm=dict(kernel="spash"))), ("model.vlm.kernel", "'spash'", "'splash'?")),
        (dict(model=dict(vlm=dict(dtype="bfloat"))), ("model.vlm.dtype", "'bfloat'", "'bfloat16'?")),
        (dict(model=dict(deep=dict(layers=0))), ("model.deep.layers", "at least 1")),
        (dict(model=dict(deep=dict(heads=3))), ("deep: heads=3", "width=128")),
        (dict(model=dict(vlm=dict(kv_heads=3))), ("vlm: kv_heads=3", "heads=2")),
        (dict(model=dict(vlm=dict(rotary_sections=(8, 8, 8)))), ("vlm: rotary_sections=(8, 8, 8)", "64")),
        (dict(model=dict(deep_rotary_sections=(8, 8, 8))), ("deep_rotary_sections=(8, 8, 8)", "64")),
        (dict(model=dict(deep_rotary_sections=(16, 16))), ("deep_rotary_sections", "three")),
        (dict(model=dict(shallow=dict(heads=64))), ("heads have 2 channels", "multiple of 4")),
        (dict(model=dict(shallow_blocks=-1)), ("shallow_blocks", "at least 0")),
        (dict(model=dict(vlm=dict(vision=dict(out_width=64)))), ("vlm.vision.out_width=64", "vlm.width=128")),
        (dict(model=dict(vlm=dict(vision=dict(heads=32)))), ("model.vlm.vision: heads have 2", "multiple of 4")),
        (dict(model=dict(vlm=dict(vision=dict(merge=0)))), ("model.vlm.vision.merge", "at least 1")),
    ],
)
def test_a_config_that_fits_nothing(tmp_path, change, saying):
    config = configs.load(QUICK)
    with config.unlocked():
        config.update(change)
    refused(UserError, Trainer, config, tmp_path / "run", saying=saying)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "option, value, near",
    [("start", "tokn", "token"), ("scale", "softmax", "softplus"), ("positions", "rotate", "rotary")],
)
def test_a_flow_block_that_there_is_not(option, value, near):
    given = dict(grid=(2, 3), channels=4, transformer=tiny.FLOW)
    refused(UserError, FlowBlockConfig, **given, **{option: value}, saying=(option, f"{value!r}", f"{near!r}?"))


@pytest.mark.parametrize(
    "change, saying",
    [
        (dict(optimizer=dict(name="admw")), ("optimizer.name", "'admw'", "'adamw'?")),
        (dict(optimizer=dict(moments="bfloat")), ("optimizer.moments", "bfloat16", "'bfloat'")),
        (dict(optimizer=dict(offload=True)), ("optimizer.offload",)),
        (dict(rows=15), ("stages.joint.rows=15", "multiple of 8")),
        (dict(rows=0), ("rows", "at least 1")),
        (dict(accumulate=0), ("accumulate", "at least 1")),
        (dict(mix=dict.fromkeys(KINDS, 0.0)), ("weight of 0",)),
        (dict(mix=dict(raed=1.0)), ("'raed'", "read")),
        (dict(vlm_length=9), ("stages.joint.vlm_length", "0")),
    ],
)
def test_what_stops_a_late_stage_is_refused_before_the_first_begins(tmp_path, monkeypatch, change, saying):
    monkeypatch.setattr(step, "HOST", "nowhere")  # a CPU's devices do reach the host's memory
    config = configs.load(QUICK, runlocal=True).unlock()
    config.stages.joint.update(change)
    refused(UserError, lambda: Trainer(config, tmp_path / "run").run(progress=False), saying=("joint", *saying))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change, saying",
    [
        (dict(data=dict(groups=5)), ("data.groups=5", "16 rows")),
        (dict(stages=dict(joint=dict(rows=2**30))), ("stages.joint", "rows=1073741824 of length=", "2147483647")),
        (dict(faults=dict(spike="rolback")), ("faults.spike", "rollback", "'rolback'")),
    ],
)
def test_what_stops_every_stage_is_refused_before_the_first_begins(tmp_path, change, saying):
    config = configs.load(QUICK, runlocal=True).unlock()
    config.update(change)
    refused(UserError, lambda: Trainer(config, tmp_path / "run").run(progress=False), saying=saying)
    assert not (tmp_path / "run").exists()


# Checkpoints.

PARAMS = {"head": {"kernel": jnp.arange(4000.0).reshape(40, 100)}, "deep": {"scale": jnp.ones(7)}}
FROZEN = {"vlm": {"kernel": jnp.linspace(0, 1, 6000).reshape(60, 100)}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "run"
    checkpoint = CheckpointDirectory(folder)
    checkpoint.create(configs.load(QUICK), tiny.CODEC, tiny.tokenizer())
    checkpoint.frozen.save(FROZEN)
    checkpoint.steps.save(3, {"params": PARAMS, "ema": {}}, {"stage": "joint", "stage_step": 3})
    checkpoint.steps.wait()
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def abstract(tree):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def everything(folder) -> SimpleNamespace:
    """Read all of a checkpoint, as one who samples from it does."""
    c = CheckpointDirectory(folder)
    number = c.require_latest()
    return SimpleNamespace(
        config=c.config(), codec=c.codec(), tokenizer=c.tokenizer(), frozen=c.frozen.restore(abstract(FROZEN)),
        params=c.steps.restore(number, {"params": abstract(PARAMS)})["params"], meta=c.steps.meta(number),
    )  # fmt: skip


def test_an_intact_checkpoint_gives_back_what_was_saved(copy):
    read = everything(copy)
    assert content_hash(read.params) == content_hash(PARAMS) and content_hash(read.frozen) == content_hash(FROZEN)
    assert read.codec == tiny.CODEC and read.meta == {"stage": "joint", "stage_step": 3}
    assert read.config.to_dict() == configs.load(QUICK).to_dict()


def test_no_checkpoint(tmp_path):
    refused(CheckpointError, everything, tmp_path / "none", saying=("no checkpoint directory", "none"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "model.safetensors").write_bytes(b"weights")
    refused(CheckpointError, everything, tmp_path / "foreign", saying=("not a checkpoint of this", "config.json"))
    (tmp_path / "foreign" / "config.json").write_text('{"architectures": ["Qwen2_5_VL"]}')
    refused(CheckpointError, CheckpointDirectory(tmp_path / "foreign").config, saying=("not a config of this program",))


@pytest.mark.parametrize("number", (None, 1, 3))
def test_a_checkpoint_of_another_format(copy, number):
    """One without a number is from before rotary pairs became halves of a head; nothing in its shapes tells."""
    values = json.loads((copy / "config.json").read_text())
    values.pop("format")
    (copy / "config.json").write_text(json.dumps(values if number is None else {**values, "format": number}))
    saying = (str(copy), f"format {number or 1}", "reads format 2", "train again")
    refused(CheckpointError, everything, copy, saying=saying)
    refused(CheckpointError, Trainer, configs.load(QUICK), copy, saying=saying)


def test_a_checkpoint_without_steps(copy):
    shutil.rmtree(copy / "steps")
    refused(CheckpointError, everything, copy, saying=("holds no saved step",))


@pytest.mark.parametrize("name", ("config.json", "codec.json", "frozen.json"))
@pytest.mark.parametrize(
    "content",
    (
        b"",
        b'{"model": ',
        b"[1, 2]",
        b'{"kind": "patch"}',
        b'{"kind": {}}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"seed": %s}' % (b"9" * 5000),
    ),
    ids=lambda content: str(content[:12]),
)
def test_a_damaged_description(copy, name, content):
    (copy / name).write_bytes(content)
    refused(CheckpointError, everything, copy, saying=(str(copy),))
    (copy / name).unlink()
    (copy / name).mkdir()
    refused(CheckpointError, everything, copy, saying=(str(copy),))


def test_byte_order_marks_do_no_harm(copy):
    for path in (*copy.glob("*.json"), *copy.glob("tokenizer/*.json"), *copy.glob("steps/*/files.json")):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert content_hash(everything(copy).params) == content_hash(PARAMS)


@pytest.mark.parametrize("content", (b"", b"[" * 100_000, b"9" * 5000, b"\xff\xfe[\0", b"[3]"))
def test_a_damaged_list_of_files(copy, capsys, content):
    (copy / "steps/3/files.json").write_bytes(content)
    refused(CheckpointError, everything, copy, saying=("every saved step", "damaged"))
    assert "files.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ("config.json", "codec.json", "frozen.json", "tokenizer", "frozen"))
def test_a_missing_part(copy, name):
    (shutil.rmtree if (copy / name).is_dir() else Path.unlink)(copy / name)
    refused(CheckpointError, everything, copy, saying=(str(copy),))


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_truncated_files(saved, tmp_path):
    """Every file of the weights, cut to half and to nothing: the right bytes come back, or one sentence; no other."""
    caught = 0
    for i, name in enumerate(n for n in files(saved) if n.startswith(("steps/", "frozen/"))):
        for share in (0, 0.5):
            folder = Path(shutil.copytree(saved, tmp_path / f"{i}_{share}"))
            path = folder / name
            path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
            try:
                read = everything(folder)
            except CheckpointError as error:
                assert "\n" not in str(error) and str(folder) in str(error), name
                caught += 1
            else:
                assert content_hash(read.params) == content_hash(PARAMS), name
                assert content_hash(read.frozen) == content_hash(FROZEN), name
    assert caught >= 6


def test_other_frozen_weights_are_noticed(copy):
    changed = {"vlm": {"kernel": FROZEN["vlm"]["kernel"].at[3, 4].add(1e-6)}}
    honest = (copy / "frozen.json").read_text()
    CheckpointDirectory(copy).frozen.save(changed)
    (copy / "frozen.json").write_text(honest)
    refused(CheckpointError, everything, copy, saying=("content hash",))


def test_weights_of_another_model(copy):
    other = {"head": {"kernel": jnp.zeros((40, 101))}, "deep": {"scale": jnp.ones(7)}}
    c = CheckpointDirectory(copy)
    refused(CheckpointError, c.steps.restore, 3, {"params": abstract(other)}, saying=("of another model",))
    refused(
        CheckpointError, c.steps.restore, 3, {"params": abstract({"else": jnp.ones(3)})}, saying=("of another model",)
    )
