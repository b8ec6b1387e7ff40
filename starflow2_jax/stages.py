"""The stages of training: one row each. What moves, which skips are open, what is computed and what counts."""

from dataclasses import dataclass

from starflow2_jax.errors import UserError

FLOW_GROUPS = ("shallow", "embed_u", "embed_slot", "embed_y", "deep", "deep_norm", "head")


@dataclass(frozen=True)
class Stage:
    name: str
    trains: tuple[str, ...]  # parameter groups that move; the rest has no optimizer state
    skips: bool  # W_vlm and W_D open
    deep: bool  # does the deep flow run
    image_loss: bool  # L_NF: nats per latent dimension
    text_loss: bool  # L_NTP: nats per token
    vlm_on_images: bool = True  # does the loss need the VLM at flow images; where not, vlm_length may leave them out
    words_only: bool = False  # it reads all images through the vision tower, and every word is predicted


STAGES = {
    stage.name: stage
    for stage in (
        # Stage 0 makes the VLM where no pretrained one can be had; afterwards it is frozen.
        Stage("pretrain", ("vlm",), skips=False, deep=False, image_loss=False, text_loss=True, words_only=True),
        Stage(
            "text_to_image", FLOW_GROUPS, skips=False, deep=True, image_loss=True, text_loss=False, vlm_on_images=False
        ),
        Stage("image_to_text", ("adapter",), skips=False, deep=False, image_loss=False, text_loss=True),
        Stage(
            "joint", (*FLOW_GROUPS, "adapter", "w_vlm", "w_d"), skips=True, deep=True, image_loss=True, text_loss=True
        ),
    )
}


def find_saved(name: str) -> Stage:
    """The stage that a checkpoint names. Raises UserError where the table has none of that name."""
    if name not in STAGES:
        raise UserError(
            f"the checkpoint was trained in the stage {name!r}, and there are {', '.join(STAGES)}; if a Python file of yours "
            "adds it, name that file with --import"
        )
    return STAGES[name]
