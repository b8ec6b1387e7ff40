"""STARFlow2 on scikit-learn's digits, all stages on two CPU cores: what the quickstart runs (see docs/benchmarks).

Launch: starflow2 train --config experiments/digits_quick.py --out runs/digits_quick
"""

from ml_collections import ConfigDict


def get_config(runlocal: bool = False) -> ConfigDict:
    """`runlocal` shrinks every stage to a few steps: the same path, for a look at it."""
    c = ConfigDict()
    c.seed = 0
    c.cpu_devices = 2  # CPU devices to make where there is no accelerator: one a core
    c.mesh = dict(data=-1, fsdp=1, sequence=1, tensor=1)  # -1: all that is left
    c.noise = 0.1  # deviation of the noise added to images, in pixels of [-1, 1]

    c.max_positions = 256  # of a prompt and its answer

    c.data = ConfigDict()
    c.data.source = "digits"  # or a JSONL file of documents
    c.data.warp = 0.0  # share of the digits' scans that are turned and shifted a little
    c.data.threads = 0  # that read ahead; for images that come from files, a few
    c.data.groups = 1  # of a batch's rows; as many hosts can share the reading (see data/groups.py)

    c.codec = dict(kind="patch", patch=2, image_channels=1)  # patch: side of one, in pixels

    c.model = ConfigDict()
    c.model.grid = (4, 4)
    c.model.channels = 4
    c.model.vlm = dict(
        vocabulary=416, layers=3, width=128, heads=2, kv_heads=1, head_dim=64, mlp_hidden=384,
        rotary_sections=(8, 12, 12), rotary_theta=1e4, embedding_std=1.0, unroll=3,
    )  # fmt: skip
    c.model.vlm.vision = dict(
        layers=2, width=64, heads=2, mlp_hidden=128, out_width=128, patch=2, window=8, full_attention_layers=(), min_pixels=64,
        mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), unroll=2,
    )  # fmt: skip
    flow = dict(
        width=128, heads=2, mlp_hidden=512, norm="rms_zero", activation="relu2", qk_norm="rms_zero", dropout=0.0
    )  # fmt: skip
    c.model.shallow_blocks = 2
    c.model.shallow = dict(layers=2, unroll=2, **flow)
    c.model.deep = dict(layers=6, unroll=6, **flow)
    c.model.deep_rotary_sections = (8, 12, 12)
    c.model.adapter_hidden = 256

    base = ConfigDict()
    base.rows = 16  # rows of a batch
    base.length = 128  # positions of a row
    base.images = 7  # flow images of a row
    base.patches = 0  # vision-tower patches of a row
    base.vlm_length = 0  # positions of a row that the frozen VLM reads; 0: all (see training/step.py)
    base.accumulate = 1  # micro-batches of a step
    base.text_weight = 1.0  # lambda of L_NF + lambda L_NTP
    base.latent_penalty = 0.0  # of the squares of the shallow flow's latents; STARFlow's is 1e-4
    base.ema = 0.998
    base.caption_drop = 0.1
    base.optimizer = dict(
        name="muon", learning_rate=2e-3, final_fraction=0.02, warmup=50, b1=0.9, b2=0.95, weight_decay=1e-2, clip=1.0,
        moments="float32", offload=False,
    )  # fmt: skip
    c.order = ("pretrain", "text_to_image", "image_to_text", "joint")  # the stages to run; rows of stages.py
    c.stages = ConfigDict()
    kinds = ("caption", "read", "sum", "mirror", "count")

    def stage(name, steps, shares, **changes):
        c.stages[name] = ConfigDict(
            {**base.to_dict(), "steps": steps, "shares": dict(zip(kinds, shares, strict=True)), **changes}
        )

    stage("pretrain", 130, (1.0, 1.0, 4.0, 0.5, 1.0), images=1, patches=160)
    stage("text_to_image", 220, (3.0, 0.0, 0.0, 1.0, 0.0), images=6)
    stage("image_to_text", 20, (0.0, 2.0, 1.0, 0.0, 0.0))
    stage("joint", 580, (5.0, 1.0, 3.0, 2.5, 1.5))
    c.stages.text_to_image.optimizer.final_fraction = 0.5  # the joint stage goes on from there

    c.log_every = 10  # steps
    c.save_every = 500  # steps
    c.keep = 2  # checkpoints: the newest
    c.keep_every = 0  # steps; also those of every so many
    c.keep_best = 0  # checkpoints; also those of the lowest loss
    c.faults = dict(nonfinite="abort", spike="ignore", deviations=8.0, window=100, most=10)  # see training/faults.py
    c.peak_flops = 0.0  # FLOP/s of one device, for the MFU; 0: what its kind is known for
    if runlocal:
        for stack in (c.model.deep, c.model.shallow, c.model.vlm, c.model.vlm.vision):
            stack.layers = stack.unroll = 1  # most of the time goes into compiling
        for s in c.stages.values():
            s.steps = 4
            s.optimizer.warmup = 2
    return c
