"""STARFlow2 on Qwen2.5-VL-3B, fine-tuned on one GPU of 80 GB (an H100): any stage that `order` ends with.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 starflow2 train --config starflow2_3b_gpu --out runs/3b \\
        --config.data.source=interleaved.jsonl

It continues in the directory of the stage before; see starflow2_3b_t2i.py. Stage 1 alone: --config.order=text_to_image.
On an A100 add --config.model.vlm.kernel=triton --config.model.deep.kernel=triton.

Nothing of this was run. `starflow2 plan --config starflow2_3b_gpu --topology h100:1` says what it needs
(docs/benchmarks/memory.md). For a GPU of 24 GB there is starflow2_3b_24gb, with a smaller flow.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments.starflow2_7b_t2i import paper_size


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config of stages 1 to 3. `runlocal`: tiny networks, one step of each stage, digits as data."""
    c = paper_size("3b", "joint", runlocal)
    c.mesh.update(data=1, fsdp=1)
    if runlocal:
        return c
    c.data.groups = 1
    c.model.vlm.kernel = c.model.deep.kernel = "cudnn_packed"
    c.model.shallow.kernel = "cudnn"
    for stage in c.stages.values():
        stage.update(rows=4, ema=0.999)
        stage.optimizer.update(learning_rate=2e-5, warmup=200, moments="bfloat16")
    return c
