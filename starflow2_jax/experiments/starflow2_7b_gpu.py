"""STARFlow2 on Qwen2.5-VL-7B, fine-tuned on one GPU of 139 GiB (an H200): any stage that `order` ends with.

    starflow2 train --config starflow2_7b_gpu --out runs/7b --config.data.source=interleaved.jsonl

It goes on in the directory of the stage before; see starflow2_7b_t2i.py. Stage 1 alone: --config.order=text_to_image.
What lies in memory through a step of stage 3, by the shapes, in GiB: frozen VLM 15.4 (bfloat16); trained parameters,
gradients and moving average 13.7 each (fp32), AdamW's moments 13.7 (bfloat16); with optimizer.name=adafactor
and optimizer.moments=float32, next to none.
"""

from ml_collections import ConfigDict

from starflow2_jax.experiments.starflow2_7b_t2i import paper_size


def get_config(runlocal: bool = False) -> ConfigDict:
    c = paper_size("7b", "joint", runlocal)
    c.mesh.fsdp = 1
    if runlocal:
        return c
    c.data.groups = 1
    for stream in ("vlm", "shallow", "deep"):
        c.model[stream].kernel = "cudnn"
    for stage in c.stages.values():
        stage.update(rows=4, ema=0.999)
        stage.optimizer.update(learning_rate=2e-5, warmup=200, moments="bfloat16")
    return c
