"""STARFlow2 on Qwen2.5-VL-7B, fine-tuned on one GPU of 139 GiB (an H200): any stage that `order` ends with.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 starflow2 train --config starflow2_7b_gpu --out runs/7b \\
        --config.data.source=interleaved.jsonl

It continues in the directory of the stage before; see starflow2_7b_t2i.py. Stage 1 alone: --config.order=text_to_image.
The variable is needed: by default JAX takes three quarters of the GPU's memory, and stage 1 does not fit into that.

Steps of stages 1 and 3 were run on one H200, on random weights and synthetic batches (docs/benchmarks/gpu.md); no model
was trained with this file. Kernels, remat and rows are the fastest that were measured there.

GiB that stay in memory through a step of stage 3, computed from the shapes: 15.4 for the frozen VLM (bfloat16); 13.7
each for the trained parameters, their gradients and their moving average (fp32); 13.7 for AdamW's moments (bfloat16),
or almost nothing with optimizer.name=adafactor and optimizer.moments=float32.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments.starflow2_7b_t2i import paper_size


def get_config(runlocal: bool = False) -> ConfigDict:
    """The config of stages 1 to 3. `runlocal`: tiny networks, one step of each stage, digits as data."""
    c = paper_size("7b", "joint", runlocal)
    c.mesh.update(data=1, fsdp=1)
    if runlocal:
        return c
    c.data.groups = 1
    c.model.vlm.kernel = c.model.deep.kernel = "cudnn_packed"
    c.model.shallow.kernel = "cudnn"
    c.model.shallow.remat = c.model.deep.remat = "dots"
    for name, stage in c.stages.items():
        stage.update(rows=8 if name == "text_to_image" else 4, ema=0.999)
        stage.optimizer.update(learning_rate=2e-5, warmup=200, moments="bfloat16")
    return c
