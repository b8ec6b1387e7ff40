"""FAE's codec: the features of a frozen image encoder, compressed to a few channels, and decoded to pixels."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from starflow2_jax.codecs.folder import read_codec
from starflow2_jax.codecs.protocol import Codec, require_shape
from starflow2_jax.errors import ConfigError, UserError, require_one_of
from starflow2_jax.fields import build, option
from starflow2_jax.models.fae import FaeConfig, FeatureDecoder, Grid, LatentEncoder, PixelDecoder
from starflow2_jax.models.feature_encoders import ENCODERS
from starflow2_jax.models.layers import DTYPES
from starflow2_jax.parallel import sharding


@dataclass(frozen=True)
class FaeOptions:
    """Which codec, and what it makes of a picture. A plan needs only the sizes; training reads the folder."""

    path: str = option("folder of the codec, which `starflow2 convert rae` or the training of a codec makes", "")
    grid: tuple[int, int] = option(
        "rows and columns of tokens; other grids than the codec's resize its positions", (16, 16), least=1
    )
    channels: int = option("channels of a token", 32, least=1)
    patch: int = option("side of the square of pixels that a token stands for", 16, least=1)
    dtype: str = option("type of the codec's matrix products", "float32", choices=DTYPES)

    image_channels: ClassVar[int] = 3

    def image_shape(self, grid: Grid) -> tuple[int, int, int]:
        """(height, width, 3) of the pictures with this grid of tokens."""
        return grid[0] * self.patch, grid[1] * self.patch, self.image_channels


@dataclass(frozen=True)
class FaeCodec(Codec):
    """Pictures -> normalised means of the latent Gaussians -> pictures. It is no bijection: only latents have a
    density.

    networks: sizes of the codec's networks. If its `channels` is 0, there are only a frozen encoder and a pixel
    decoder, and the latents are the features themselves. encoder_kind: a key of ENCODERS; encoder: the config of that
    row. weights: the groups "encoder", "latent_encoder", "feature_decoder" and "pixel_decoder", as far as there are
    such networks.
    """

    networks: FaeConfig
    encoder_kind: str
    encoder: Any
    grid: Grid
    mean: tuple[float, ...]  # (D,)
    std: tuple[float, ...]  # (D,)
    weights: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    kind = "fae"
    Options = FaeOptions
    is_pixels = True
    image_channels = FaeOptions.image_channels
    log_volume = None
    in_step = True

    def __post_init__(self):
        if not len(self.mean) == len(self.std) == self.channels:
            raise UserError(
                f"mean and std must have one entry for each of the {self.channels} channels of a latent token"
            )

    @classmethod
    def make(cls, options: FaeOptions, images: Iterable[np.ndarray]) -> "FaeCodec":
        """The codec in the folder that the options name; it reads no image. Raises ConfigError if the options do not
        fit it.
        """
        if not options.path:
            raise ConfigError(
                "codec.path names no folder of a codec; give it, or `--codec` of `starflow2 init`; "
                "docs/guides/codec.md says how to make one"
            )
        return read_fae(Path(options.path)).fitted(options)

    def fitted(self, options: FaeOptions) -> "FaeCodec":
        """The codec with the grid and the type of the options. Raises ConfigError if their other sizes are not the
        codec's.
        """
        own = {"channels": self.channels, "patch": self.networks.pixel_decoder.patch}
        if wrong := [name for name, value in own.items() if getattr(options, name) != value]:
            place = f" in {options.path}" if options.path else ""
            raise ConfigError(
                f"codec.{wrong[0]} is {getattr(options, wrong[0])}, but the codec{place} has {own[wrong[0]]}; set the "
                "config to that"
            )
        return self.computing(options.dtype).for_grid(options.grid)

    @classmethod
    def restored(cls, description: dict[str, Any], weights: Mapping[str, Any]) -> "FaeCodec":
        """See Codec. Raises UserError for a description of another version."""
        kind = description["encoder_kind"]
        require_one_of("the codec's encoder_kind", kind, ENCODERS)
        return cls(
            build(FaeConfig, description["networks"], "networks"),
            kind,
            build(ENCODERS[kind].config, description["encoder"], "encoder"),
            tuple(description["grid"]),
            tuple(description["mean"]),
            tuple(description["std"]),
            weights,
        )

    def description(self) -> dict[str, Any]:
        """See Codec."""
        values = {name: getattr(self, name) for name in ("encoder_kind", "grid", "mean", "std")}
        return {"networks": asdict(self.networks), "encoder": asdict(self.encoder), **values}

    def computing(self, dtype: str) -> "FaeCodec":
        """The same codec with matrix products in `dtype`."""
        return replace(self, networks=replace(self.networks, dtype=dtype), encoder=replace(self.encoder, dtype=dtype))

    def for_grid(self, grid: Grid) -> "FaeCodec":
        """The same codec for pictures with another grid of tokens."""
        return replace(self, grid=grid)

    @property
    def channels(self) -> int:
        """D."""
        return self.networks.channels or self.networks.features

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, 3)."""
        patch = self.networks.pixel_decoder.patch
        return self.grid[0] * patch, self.grid[1] * patch, self.image_channels

    def encode(self, images: Any) -> Any:
        """Pictures (B, height, width, 3) -> latents (B, h, w, D), on the mesh of `jax.set_mesh`. Raises ValueError as
        Codec.
        """
        require_shape(images, self.image_shape, "pixels")
        return _encode(self._program, self._weights("encoder", "latent_encoder"), images)

    def without_weights(self) -> "FaeCodec":
        """See Codec."""
        return self._program

    def encoder_weights(self) -> dict[str, Any]:
        """See Codec."""
        return {name: self.weights[name] for name in ("encoder", "latent_encoder") if name in self.weights}

    def encode_with(self, weights: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """See Codec."""
        return _encode(self._program, weights, images)

    def decode(self, latents: Any) -> Any:
        """Latents (B, h, w, D) -> pictures (B, height, width, 3), not clipped, on the mesh of `jax.set_mesh`."""
        return decode_with(self._program, self._weights("feature_decoder", "pixel_decoder"), latents)

    def features_of(self, weights: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
        """Pictures (B, height, width, 3) -> the frozen encoder's features (B, N, C). Pure: `weights` as this
        object's.
        """
        return ENCODERS[self.encoder_kind].features(self.encoder, weights["encoder"], pixels, self.grid)

    @cached_property
    def _program(self) -> "FaeCodec":
        """All that decides the compiled programs."""
        return replace(self, weights={})

    @cached_property
    def _placed(self) -> dict[Any, Any]:
        """(group, mesh) -> the group's weights on the devices, so that they are moved there once."""
        return {}

    def _weights(self, *groups: str) -> dict[str, Any]:
        """Groups of weights on the mesh of `jax.set_mesh`; without one, on the default device."""
        mesh = jax.sharding.get_mesh()
        for name in groups:
            if name in self.weights and (name, mesh) not in self._placed:
                tree = self.weights[name]
                where = None if mesh.empty else sharding.tree_shardings(tree, mesh)
                self._placed[name, mesh] = jax.device_put(tree, where)
        return {name: self._placed[name, mesh] for name in groups if name in self.weights}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_program", "_placed")}


def read_fae(folder: Path) -> FaeCodec:
    """The codec in a folder. Raises UserError if it holds no codec of this kind, or a damaged one."""
    kind, description, weights = read_codec(folder)
    if kind != FaeCodec.kind:
        raise UserError(f"{folder} holds a codec of the kind {kind!r}, not {FaeCodec.kind!r}; name the folder of one")
    try:
        return FaeCodec.restored(description, weights)
    except (TypeError, KeyError) as error:
        raise UserError(f"codec.json in {folder} is damaged ({error}); restore it from a copy") from None


@partial(jax.jit, static_argnums=0)
def _encode(codec: FaeCodec, weights: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
    x = codec.features_of(weights, sharding.constrain(pixels, "batch", None, None, None))
    if codec.networks.channels:
        x, _ = LatentEncoder(codec.networks).apply({"params": weights["latent_encoder"]}, x)
    x = (x - np.asarray(codec.mean, np.float32)) / np.asarray(codec.std, np.float32)
    return x.reshape(len(x), *codec.grid, codec.channels)


@partial(jax.jit, static_argnums=0)
def decode_with(codec: FaeCodec, weights: Mapping[str, Any], latents: jax.Array) -> jax.Array:
    """`codec.decode` as a pure function of its decoders' weights. codec: without weights, as they would not be
    hashed.
    """
    x = latents * np.asarray(codec.std, np.float32) + np.asarray(codec.mean, np.float32)
    x = sharding.constrain(x.reshape(len(x), -1, codec.channels), "batch", None, None)
    if codec.networks.channels:
        x = FeatureDecoder(codec.networks).apply({"params": weights["feature_decoder"]}, x, codec.grid)
    pixels: Any = PixelDecoder(codec.networks).apply({"params": weights["pixel_decoder"]}, x, codec.grid)
    return pixels
