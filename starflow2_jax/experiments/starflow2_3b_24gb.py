"""STARFlow2 on Qwen2.5-VL-3B with a flow of 0.9 billion parameters, for one GPU of 24 GB: any stage that `order` ends
with.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 starflow2 train --config starflow2_3b_24gb --out runs/3b_small \\
        --config.data.source=captions.jsonl

The flow of the other starflow2_* files has 3.6 billion parameters. With their gradients in fp32, they take 27 GiB, so
no optimizer makes them fit. Here the flow is half as wide.

This experiment was never run. `starflow2 plan --config starflow2_3b_24gb --topology rtx4090:1` says what it needs
(docs/benchmarks/memory.md).
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
    for flow in (c.model.shallow, c.model.deep):
        flow.update(width=1536, heads=12, mlp_hidden=6144)
    c.model.vlm.kernel = c.model.deep.kernel = "triton"
    c.model.shallow.kernel = "cudnn"
    for stage in c.stages.values():
        stage.rows = 2
        stage.optimizer.moments = "bfloat16"
    return c
