"""The table of training stages: which parameters each one trains, what it computes, and which losses it has."""

from dataclasses import dataclass

from starflow2_jax.errors import UserError

FLOW_GROUPS = ("shallow", "embed_u", "embed_slot", "embed_y", "deep", "deep_norm", "head")
OPTIONAL = ("shallow",)  # groups that a model may lack: one without shallow blocks has none of theirs


@dataclass(frozen=True)
class Trains:
    """Which parameters a stage trains."""

    name: str
    trains: tuple[str, ...]  # parameter groups that the stage trains; the others have no optimizer state

    def trained(self, params: dict) -> dict:
        """The groups of `params` that the stage trains. Raises KeyError for a group that the model should have."""
        return {name: params[name] for name in self.trains if name in params or name not in OPTIONAL}


@dataclass(frozen=True)
class Stage(Trains):
    """What a stage of training trains and computes."""

    skips: bool  # the skips W_vlm and W_D are used
    deep: bool  # the deep flow runs
    image_loss: bool  # L_NF: nats per latent dimension
    text_loss: bool  # L_NTP: nats per token
    vlm_on_images: bool = True  # False: the loss needs no VLM output at flow images, so vlm_length can leave them out
    words_only: bool = False  # all images are given to the vision tower, and all text is predicted


STAGES = {
    stage.name: stage
    for stage in (
        # Stage 0 trains the VLM if there is no pretrained one; in later stages it is frozen.
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


CODEC_GROUPS = ("latent_encoder", "feature_decoder", "pixel_decoder", "statistics")  # the last: of the latents


@dataclass(frozen=True)
class CodecStage(Trains):
    """What a stage of a codec's training trains: the row `name` of CODEC_STAGES, in training/codec/."""

    groups: tuple[str, ...] = (
        CODEC_GROUPS  # in its state, trained or not; the next stage with the same goes on from them
    )
    pixels: bool = True  # it makes pictures, so that it has their losses and may have a discriminator
    latents: bool = True  # it has the networks between the encoder's features and latents
    image_loss = text_loss = deep = False  # the terms of STARFlow2's stages


CODEC_STAGES = {
    stage.name: stage
    for stage in (
        # Trains a small frozen encoder where there is no published one: it sees pictures with masked patches.
        CodecStage("encoder", ("encoder", "unmasking"), ("encoder", "unmasking"), pixels=False, latents=False),
        CodecStage("features", ("latent_encoder", "feature_decoder"), pixels=False),
        CodecStage("pixels", ("pixel_decoder",)),  # on the encoder's features, with noise
        CodecStage("pixels_tuned", ("pixel_decoder",)),  # on features that were made from latents
        # In place of the three: a variational autoencoder of pictures, which no loss of features shapes.
        CodecStage("vae", ("latent_encoder", "feature_decoder", "pixel_decoder")),
    )
}


def find_saved(name: str) -> Stage:
    """The stage that a checkpoint names. Raises UserError if the table has no stage of that name."""
    if name not in STAGES:
        raise UserError(
            f"the checkpoint was trained in the stage {name!r}, but the known stages are {', '.join(STAGES)}; if a "
            f"Python file of yours adds this stage, name that file with --import"
        )
    return STAGES[name]
