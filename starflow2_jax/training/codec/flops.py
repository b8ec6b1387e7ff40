"""Floating-point operations of a codec's training step, counted by hand from the sizes."""

from collections.abc import Iterator
from dataclasses import replace

from starflow2_jax.config.codec import CodecStageConfig, CriticConfig
from starflow2_jax.models.discriminators import FeatureDiscriminator
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.models.flops import FROM_INPUTS, Flops, Term, executed_attention, matrix_parameters, sums
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.lpips import GROUPS
from starflow2_jax.stages import CodecStage
from starflow2_jax.training.codec.networks import Networks

RULE = (
    "matrix products and convolutions only; a frozen parameter costs 2 FLOP per token or pixel forward, and 2 more if a "
    "gradient passes through it; a trained one costs 6; recomputation does not count"
)


def codec_flops(networks: Networks, stage: CodecStage, cfg: CodecStageConfig) -> Flops:
    """FLOP of one training step over a batch of `cfg.rows` pictures, counted by `RULE`.

    Norms, softmax, the resizing of pictures, spectral norms and the optimizer are left out.
    """
    return sums(_Step(networks, stage, cfg).terms())


class _Step:
    """Every product of a training step."""

    def __init__(self, networks: Networks, stage: CodecStage, cfg: CodecStageConfig):
        self.networks, self.stage, self.cfg = networks, stage, cfg
        self.tokens = cfg.rows * networks.tokens  # of the batch

    def terms(self) -> Iterator[Term]:
        c, moving = self.networks.cfg, self.stage.name == "encoder"
        square = c.pixel_decoder.image_channels * c.pixel_decoder.patch**2  # numbers of a token's square of pixels
        yield from self.encoder("encoder", self.cfg.rows, trained=moving, through=moving)
        if moving:
            yield self.linear("encoder", c.features * square, trained=True, into=True)
        elif self.stage.name == "features":
            yield from self.latent_encoder(trained=True)
            yield from self.feature_decoder(trained=True)
        else:
            if self.stage.name == "pixels_tuned":
                yield from self.latent_encoder(trained=False)
                yield from self.feature_decoder(trained=False)
            part, width = c.pixel_decoder, c.pixel_decoder.width
            yield self.linear("pixel decoder", c.features * width, trained=True, into=False)
            tokens = self.networks.tokens + part.class_token
            yield from self.stack("pixel decoder", c.stack(part, width), self.cfg.rows, tokens, tokens, True, True)
            yield self.linear("pixel decoder", width * square, trained=True, into=True)
            yield from self.losses()
            yield from self.critic(self.cfg.critic, width * square)

    def linear(self, part: str, parameters: float, trained: bool, into: bool) -> Term:
        """A map of every token. into: whether a gradient passes on to its input."""
        return Term(part, 2.0 * parameters * self.tokens, 1 + trained + into)

    def stack(
        self, part: str, t: TransformerConfig, rows: int, length: int, visible: float, trained: bool, through: bool
    ) -> Iterator[Term]:
        """Layers over (rows, length) in which a token sees `visible` others. through: a gradient passes to the input."""
        projections, mlp = matrix_parameters(t)
        policy = t.remat if through else "none"
        again = 1 - t.mlp_hidden * t.width / (projections + mlp) if policy in FROM_INPUTS else 0
        yield Term(part, 2.0 * t.layers * (projections + mlp) * rows * length, 1 + trained + through, again)
        products, times = 4.0 * t.layers * t.heads * t.head * rows * length * length, 3 if through else 1
        executed = executed_attention("xla", policy, trained, through)
        yield Term(f"{part} attention", products, times, executed - times, visible / length)

    def encoder(self, part: str, rows: int, trained: bool, through: bool, layers: int | None = None) -> Iterator[Term]:
        """The image encoder over `rows` pictures, up to the layer `layers`. through: a gradient passes through the layers,
        and, unless the encoder is trained, on to the pixels."""
        sizes = ENCODERS[self.networks.encoder_kind].sizes(self.networks.encoder, self.networks.cfg.grid)
        times = 1 + (trained or through)
        yield Term(part, 2.0 * sizes.before * rows, times)
        if sizes.after and layers is None:
            yield Term(part, 2.0 * sizes.after * rows, times)
        stack = sizes.stack if layers is None else replace(sizes.stack, layers=layers)
        yield from self.stack(part, stack, rows, sizes.tokens, sizes.visible, trained, through)

    def latent_encoder(self, trained: bool) -> Iterator[Term]:
        """FAE's attention encoder, whose input is frozen."""
        c, part = self.networks.cfg, "latent encoder"
        inner = c.attention_heads * c.attention_head_dim
        yield self.linear(part, c.features * 4 * inner, trained, into=False)
        yield Term(f"{part} attention", 4.0 * inner * self.tokens * self.networks.tokens, 3 if trained else 1)
        yield self.linear(part, inner * 2 * c.channels, trained, into=trained)

    def feature_decoder(self, trained: bool) -> Iterator[Term]:
        """Latents to features."""
        c, part = self.networks.cfg, "feature decoder"
        yield self.linear(part, c.channels * c.features, trained, into=trained)
        stack = c.stack(c.feature_decoder, c.features, gated_mlp=True)
        tokens = self.networks.tokens
        yield from self.stack(part, stack, self.cfg.rows, tokens, tokens, trained, trained)

    def losses(self) -> Iterator[Term]:
        """The perceptual losses: their networks see the pictures that were made, whose gradient they give, and the real ones."""
        w, rows = self.cfg.losses, self.cfg.rows
        if w.perceptual:
            last = max(w.perceptual_layers)
            yield from self.encoder("perceptual loss", rows, trained=False, through=True, layers=last)
            yield from self.encoder("perceptual loss", rows, trained=False, through=False, layers=last)
        if w.lpips:
            forward, before, pixels = 0.0, self.networks.cfg.pixel_decoder.image_channels, self.pixels
            for i, (count, channels) in enumerate(GROUPS):
                for _ in range(count):
                    forward += 2.0 * 9 * before * channels * pixels / 4**i
                    before = channels
            # The program runs both kinds of pictures as one batch, and makes the gradients of both.
            yield Term("LPIPS", forward * rows, 3, 1)

    @property
    def pixels(self) -> int:
        """Pixels of a picture."""
        return self.networks.tokens * self.networks.cfg.pixel_decoder.patch**2

    def critic(self, critic: CriticConfig, last: int) -> Iterator[Term]:
        """The discriminator: one pass for the generator's loss, whose gradient goes to the pictures, and two of its own.

        last: parameters of the decoder's last map, whose gradient the adaptive weight takes of both losses.
        """
        if critic.kind == "none":
            return
        rows, part = self.cfg.rows, "discriminator"
        if critic.adaptive:
            yield Term(part, 2.0 * last * self.tokens, 2)
        if critic.augment:  # pictures are moved by products with (H, H) and (W, W); three passes and one gradient
            height, width = (n * self.networks.cfg.pixel_decoder.patch for n in self.networks.cfg.grid)
            channels = self.networks.cfg.pixel_decoder.image_channels
            yield Term(part, 2.0 * channels * rows * height * width * (height + width), 4)
        if critic.kind == "patch":
            yield from self.patch_critic(critic)
        else:
            yield from self.encoder(part, rows, trained=False, through=True, layers=max(critic.layers))
            for _ in range(2):
                yield from self.encoder(part, rows, trained=False, through=False, layers=max(critic.layers))
            C = ENCODERS[self.networks.encoder_kind].sizes(self.networks.encoder, self.networks.cfg.grid).stack.width
            heads, first, rest = len(critic.layers), C * C, C * C * FeatureDiscriminator.width + C
            yield Term(
                part, 2.0 * heads * first * self.tokens, 2 + 2 * 2
            )  # the features have no gradient in two passes
            yield Term(part, 2.0 * heads * rest * self.tokens, 2 + 2 * 3)

    def patch_critic(self, critic: CriticConfig) -> Iterator[Term]:
        """The convolutions of PatchDiscriminator."""
        part, pixels, channels = "discriminator", self.pixels * self.cfg.rows, critic.channels
        first = 2.0 * 25 * self.networks.cfg.pixel_decoder.image_channels * channels * pixels
        yield Term(part, first, 2 + 2 * 2)
        before, rest = channels, 0.0
        for i in range(critic.stages):
            rest += 2.0 * 9 * before * channels * 2**i * pixels / 4**i
            before = channels * 2**i
        rest += 2.0 * (before * before + 25 * before) * pixels / 4**critic.stages
        yield Term(part, rest, 2 + 2 * 3)
