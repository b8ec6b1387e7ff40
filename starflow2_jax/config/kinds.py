"""The options of each kind of codec and of each source, which the config's sections `codec` and `data` hold."""

from dataclasses import dataclass

from starflow2_jax.errors import ConfigError
from starflow2_jax.fields import option


@dataclass(frozen=True)
class PatchOptions:
    patch: int = option("side of a patch, in pixels; each becomes one token", 2, least=1)
    image_channels: int = option("channels of an image: 1 gray, 3 red, green and blue", 1, least=1, most=4)

    @property
    def channels(self) -> int:
        """Of a token."""
        return self.image_channels * self.patch**2


@dataclass(frozen=True)
class LatentOptions:
    grid: tuple[int, int] = option("rows and columns of tokens", least=1)
    channels: int = option("channels of a token", least=1)
    shift: float = option("what is subtracted from the latents in the files", 0.0)
    scale: float = option("what they are divided by after that", 1.0, above=0)


@dataclass(frozen=True)
class DigitOptions:
    warp: float = option("share of the scans that are turned, sheared, shifted and bent a little", 0.0, least=0, most=1)


CODECS = {"patch": PatchOptions, "latents": LatentOptions}
SOURCES = {"digits": DigitOptions}


def codec_options(kind: str) -> type:
    """The options of a kind of codec. Raises ConfigError for an unknown kind."""
    if kind not in CODECS:
        raise ConfigError(f"codec.kind is {' or '.join(map(repr, CODECS))}, not {kind!r}")
    return CODECS[kind]


def source_options(source: str) -> type | None:
    """The options of a source, or None where it has none, as files of documents."""
    return SOURCES.get(source)
