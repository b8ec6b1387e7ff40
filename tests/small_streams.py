"""A small joint experiment whose streams have a given attention kernel, for the compilers of GPUs and TPUs."""

from starflow2_jax.config import loading as configs
from starflow2_jax.config.schema import Config

S = 384  # positions of a row: the size of nothing else
REMAT = {"text_to_image": "dots", "image_to_text": "full", "joint": "none"}


def small(streams: dict, remat: str = "full", mesh: str = "tensor", grid: tuple[int, int] = (8, 8)) -> Config:
    """The joint experiment with two layers of everything, in bfloat16, and rows of packed positions.

    streams: name -> kernel, channels per head.
    """
    config = configs.load("starflow2_7b_joint", runlocal=True).copy_and_resolve_references().unlock()
    config.mesh.update(fsdp=2, **{mesh: 2})
    for name, (kernel, channels) in streams.items():
        stream = config.model[name]
        stream.update(kernel=kernel, remat=remat, dtype="bfloat16", heads=4, head_dim=channels)
        stream.update(width=256, mlp_hidden=512)
    vlm, deep = (streams[name][1] for name in ("vlm", "deep"))
    config.model.vlm.update(kv_heads=2, rotary_sections=(vlm // 4, vlm // 8, vlm // 8))
    config.model.vlm.vision.out_width = 256
    config.model.update(grid=grid, deep_rotary_sections=(deep // 4, deep // 8, deep // 8))
    for stage in config.stages.values():
        stage.update(rows=4, length=S, images=S // (grid[0] * grid[1] + 2))
    config.stages.text_to_image.vlm_length = 128
    return config.lock()
