"""STARFlow2 at the paper's size, stage 1: caption -> image, on Qwen2.5-VL-7B. All of the model is described here.

    starflow2 convert qwen2_5_vl --from Qwen2.5-VL-7B-Instruct --to vlm_7b
    starflow2 init --vlm vlm_7b --config experiments/starflow2_7b_t2i.py --out runs/7b
    starflow2 train --config experiments/starflow2_7b_t2i.py --out runs/7b --config.data.source=captions.jsonl

The sizes are the paper's (arXiv 2605.08029); rows, steps and optimizer are not published and are this project's choice.
Images are latents of a 16 x 16 grid with 32 channels, as .npy files. On a slice of TPUs add the chip, which decides kernel,
rows and remat as in the plans of docs/benchmarks/plans: --config experiments/starflow2_7b_t2i.py:v5p, :v5e or :v6e.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from starflow2_jax.errors import ConfigError
from starflow2_jax.weights.qwen import QWEN2_5_VL

ROWS = {"v5e": 512, "v5p": 512, "v6e": 1024}  # of a batch on slices of 256 v5e, 64 v5p (128 cores), 256 v6e


def get_config(
    runlocal: bool = False, vlm: str = "7b", order: tuple[str, ...] = ("text_to_image",), chip: str = ""
) -> ConfigDict:
    """`order`: the stages up to the one to run; those that a directory has done already are passed over. `chip`: of ROWS.

    `runlocal`: everything small, on digits and with a VLM trained from nothing, for a look at the path on one machine.
    """
    c = ConfigDict()
    c.seed = 0
    c.cpu_devices = 1
    c.mesh = dict(data=1, fsdp=-1, sequence=1, tensor=1)  # -1: all that is left
    c.noise = 0.0  # deviation of the noise added to latents
    c.max_positions = 8192  # of a prompt and its answer
    c.order = order

    c.data = ConfigDict()
    c.data.source = "documents.jsonl"
    c.data.threads = 16  # that read ahead
    c.data.groups = 64  # of a batch's rows; as many hosts can share the reading (see data/groups.py)
    c.codec = dict(kind="latents", grid=(16, 16), channels=32, shift=0.0, scale=1.0)

    c.model = ConfigDict()
    c.model.grid, c.model.channels = c.codec.grid, c.codec.channels
    c.model.vlm = asdict(QWEN2_5_VL[vlm]) | dict(remat="full", kernel="xla")
    c.model.shallow_blocks = 2
    flow = dict(
        width=3072,
        heads=24,
        mlp_hidden=12288,
        norm="rms_zero",
        qk_norm="rms_zero",
        dtype="bfloat16",
        remat="full",
        kernel="xla",
    )
    c.model.shallow = dict(layers=4, **flow)
    c.model.deep = dict(layers=24, **flow)
    c.model.deep_rotary_sections = (16, 24, 24)
    c.model.adapter_hidden = 4096

    base = ConfigDict()
    base.rows = 256  # rows of a batch
    base.length = 2048  # positions of a row
    base.images = 7  # flow images of a row
    base.patches = 0  # vision-tower patches of a row
    base.vlm_length = 0  # positions of a row that the frozen VLM reads; 0: all (see training/step.py)
    base.accumulate = 1  # micro-batches of a step
    base.text_weight = 1.0  # lambda of L_NF + lambda L_NTP
    base.latent_penalty = 0.0  # of the squares of the shallow flow's latents; STARFlow's is 1e-4
    base.ema = 0.9999
    base.caption_drop = 0.1
    base.shares = {}
    base.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        final_fraction=0.1,
        warmup=2000,
        b1=0.9,
        b2=0.95,
        weight_decay=1e-4,
        clip=1.0,
        moments="float32",
        offload=False,
    )
    c.stages = dict(text_to_image=base.copy_and_resolve_references())
    c.stages.text_to_image.update(steps=200_000, vlm_length=512)  # those that are no flow image
    c.stages.image_to_text = base.copy_and_resolve_references()
    c.stages.image_to_text.update(steps=20_000, caption_drop=0.0)
    c.stages.joint = base.copy_and_resolve_references()
    c.stages.joint.update(steps=100_000)
    c.stages.joint.optimizer.learning_rate = 5e-5

    c.log_every = 50  # steps
    c.save_every = 2000  # steps
    c.keep = 3  # checkpoints: the newest
    c.keep_every = 20_000  # steps; also those of every so many
    c.keep_best = 0  # checkpoints; also those of the lowest loss
    c.faults = dict(nonfinite="skip", spike="skip", deviations=8.0, window=100, most=10)  # see training/faults.py
    c.peak_flops = 0.0  # FLOP/s of one device, for the MFU; 0: what its kind is known for
    if runlocal:
        return small(c)
    return for_slice(c, chip) if chip else c


def for_slice(c: ConfigDict, chip: str) -> ConfigDict:
    """What fits and is fast on a slice of such chips, as planned."""
    if chip not in ROWS:
        raise ConfigError(f"this experiment knows the chips {', '.join(ROWS)}, not {chip!r}")
    for stage in c.stages.values():
        stage.rows = ROWS[chip]
    for stream in ("vlm", "shallow", "deep"):
        c.model[stream].kernel = "splash"
    if c.order[-1] == "text_to_image" or (c.order[-1], chip) == ("joint", "v5p"):  # there is memory for it
        c.model.shallow.remat = c.model.deep.remat = "dots"
    return c


def small(c: ConfigDict) -> ConfigDict:
    """The same path with two layers of everything, one step of each stage, and digits instead of one's own data."""
    c.order = ("pretrain", *c.order)
    c.data.update(source="digits", threads=0, groups=1, warp=0.0)
    c.codec = dict(kind="patch", patch=2, image_channels=1)
    c.model.update(grid=(4, 4), channels=4, adapter_hidden=32, deep_rotary_sections=(2, 3, 3))
    c.model.vlm.update(
        vocabulary=416, layers=2, width=32, heads=2, kv_heads=1, head_dim=16, mlp_hidden=48, rotary_sections=(2, 3, 3)
    )
    c.model.vlm.vision.update(
        layers=2, width=32, heads=2, mlp_hidden=48, out_width=32, patch=2, window=4, full_attention_layers=(1,),
        min_pixels=64,
    )  # fmt: skip
    for flow in (c.model.shallow, c.model.deep):
        flow.update(layers=2, width=32, heads=2, mlp_hidden=64)
    c.stages.pretrain = c.stages.text_to_image.copy_and_resolve_references()
    for name, shares in (
        ("pretrain", dict(caption=1.0, read=1.0)),
        ("text_to_image", dict(caption=1.0)),
        ("image_to_text", dict(read=1.0)),
        ("joint", dict(caption=1.0, read=1.0, mirror=1.0)),
    ):
        c.stages[name].update(rows=8, length=64, images=4, steps=1, shares=shares)
    c.stages.pretrain.update(patches=96, vlm_length=0)
    c.stages.text_to_image.vlm_length = 40
    return c
