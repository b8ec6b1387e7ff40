"""Floating-point operations of a codec's training step, counted by hand from the sizes."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from starflow2_jax.config.codec import CodecStageConfig, CriticConfig, PictureLosses
from starflow2_jax.models.discriminators import FeatureDiscriminator
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.models.flops import FROM_INPUTS, Flops, Term, executed_attention, matrix_parameters, sums
from starflow2_jax.models.layers import TransformerConfig
from starflow2_jax.models.lpips import GROUPS
from starflow2_jax.stages import CodecStage
from starflow2_jax.training.codec.networks import Networks

RULE = (
    "matrix products and convolutions only; a frozen parameter costs 2 FLOP per token or pixel forward, and 2 more if "
    "a gradient passes through it; a trained one costs 6; recomputation does not count"
)


def codec_flops(networks: Networks, stage: CodecStage, cfg: CodecStageConfig) -> Flops:
    """FLOP of one training step over a batch of `cfg.rows` pictures, counted by `RULE`.

    Norms, softmax, the resizing of pictures, spectral norms and the optimizer are left out.
    """
    return sums(_Products(networks, cfg.rows).of_step(stage, cfg))


def encoding_flops(networks: Networks, pictures: int) -> Flops:
    """FLOP of encoding that many pictures to latents."""
    p = _Products(networks, pictures)
    latents = p.latent_encoder(trained=False) if networks.cfg.channels else ()
    return _joined("codec", [*p.encoder("", pictures, trained=False, through=False), *latents])


def decoding_flops(networks: Networks, pictures: int) -> Flops:
    """FLOP of decoding the latents of that many pictures."""
    p = _Products(networks, pictures)
    features = p.feature_decoder(trained=False) if networks.cfg.channels else ()
    return _joined("codec", [*features, *p.pixel_decoder(trained=False)])


def _joined(part: str, terms: Iterable[Term]) -> Flops:
    return sums(replace(term, part=part) for term in terms)


class _Products:
    """The products of a codec's networks over `rows` pictures."""

    def __init__(self, networks: Networks, rows: int):
        self.networks, self.rows = networks, rows
        self.tokens = rows * networks.tokens

    def of_step(self, stage: CodecStage, cfg: CodecStageConfig) -> Iterator[Term]:
        """Every product of a training step."""
        moving = stage.name == "encoder"
        yield from self.encoder("encoder", self.rows, trained=moving, through=moving)
        if moving:
            yield self.linear("encoder", self.networks.cfg.features * self.square, trained=True, into=True)
        elif stage.name == "features":
            yield from self.latent_encoder(trained=True)
            yield from self.feature_decoder(trained=True)
        else:
            through = "latent_encoder" in stage.trains
            if stage.name != "pixels":
                yield from self.latent_encoder(trained=through)
                yield from self.feature_decoder(trained=through)
            yield from self.pixel_decoder(trained=True, through=through)
            yield from self.losses(cfg.losses)
            yield from self.critic(cfg.critic)

    @property
    def square(self) -> int:
        """Numbers of a token's square of pixels."""
        part = self.networks.cfg.pixel_decoder
        return part.image_channels * part.patch**2

    def linear(self, part: str, parameters: float, trained: bool, into: bool) -> Term:
        """A map of every token. into: whether a gradient passes on to its input."""
        return Term(part, 2.0 * parameters * self.tokens, 1 + trained + into)

    def stack(
        self, part: str, t: TransformerConfig, rows: int, length: int, visible: float, trained: bool, through: bool
    ) -> Iterator[Term]:
        """Layers over (rows, length) in which a token sees `visible` others. through: a gradient passes to the
        input.
        """
        projections, mlp = matrix_parameters(t)
        policy = t.remat if through else "none"
        last = t.mlp_hidden * t.width  # is needed again only for the gradient of a layer scale
        kept = 0 if t.layer_scale and trained else last / (projections + mlp)
        again = 1 - kept if policy in FROM_INPUTS else 0
        yield Term(part, 2.0 * t.layers * (projections + mlp) * rows * length, 1 + trained + through, again)
        products, times = 4.0 * t.layers * t.heads * t.head * rows * length * length, 3 if through else 1
        executed = executed_attention("xla", policy, trained, through)
        yield Term(f"{part} attention", products, times, executed - times, visible / length)

    def encoder(self, part: str, rows: int, trained: bool, through: bool, layers: int | None = None) -> Iterator[Term]:
        """The image encoder over `rows` pictures, up to the layer `layers`. through: a gradient passes through the
        layers, and, unless the encoder is trained, on to the pixels."""
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
        yield from self.stack(part, stack, self.rows, tokens, tokens, trained, trained)

    def pixel_decoder(self, trained: bool, through: bool = False) -> Iterator[Term]:
        """Features to pixels. through: a gradient passes on to the features."""
        c, part = self.networks.cfg, self.networks.cfg.pixel_decoder
        yield self.linear("pixel decoder", c.features * part.width, trained, into=through)
        tokens = self.networks.tokens + part.class_token
        stack = c.stack(part, part.width, gated_mlp=part.gated_mlp)
        yield from self.stack("pixel decoder", stack, self.rows, tokens, tokens, trained, trained)
        yield self.linear("pixel decoder", part.width * self.square, trained, into=trained)

    def losses(self, w: PictureLosses) -> Iterator[Term]:
        """The perceptual losses: their networks see the pictures that were made, whose gradient they give; LPIPS also
        sees the real ones, which the encoder has seen already."""
        if w.perceptual:
            last = max(w.perceptual_layers)
            yield from self.encoder("perceptual loss", self.rows, trained=False, through=True, layers=last)
        if w.lpips:
            forward, before = 0.0, self.networks.cfg.pixel_decoder.image_channels
            for i, (count, channels) in enumerate(GROUPS):
                for _ in range(count):
                    forward += self.convolution(3, before, channels, halved=i)
                    before = channels
            # The program runs both kinds of pictures as one batch, and makes the gradients of both.
            yield Term("LPIPS", forward, 3, 1)

    def convolution(self, side: int, before: int, after: int, halved: int) -> float:
        """FLOP of a forward pass over the batch, padding left out. halved: how often the pictures' sides were halved
        before.
        """
        c, half = self.networks.cfg, side // 2
        height, width = (n * c.pixel_decoder.patch >> halved for n in c.grid)
        taps = [side * n - half * (half + 1) for n in (height, width)]
        return 2.0 * self.rows * before * after * taps[0] * taps[1]

    def critic(self, critic: CriticConfig) -> Iterator[Term]:
        """The discriminator: one pass for the generator's loss, whose gradient goes to the pictures, and two of its
        own.

        The adaptive weight takes the gradient of the decoder's last kernel from both losses.
        """
        if critic.kind == "none":
            return
        rows, part = self.rows, "discriminator"
        if critic.adaptive:
            yield Term(part, 2.0 * self.networks.cfg.pixel_decoder.width * self.square * self.tokens, 2)
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
        """The FLOP of the convolutions of PatchDiscriminator."""
        part, before = "discriminator", critic.channels
        yield Term(part, self.convolution(5, self.networks.cfg.pixel_decoder.image_channels, before, 0), 2 + 2 * 2)
        rest = 0.0
        for i in range(critic.stages):
            channels = critic.channels * 2**i
            rest, before = rest + self.convolution(3, before, channels, i), channels
        rest += self.convolution(1, before, before, critic.stages) + self.convolution(5, before, 1, critic.stages)
        yield Term(part, rest, 2 + 2 * 3)
