"""Measures what a codec keeps of held-out pictures, and shows them beside their reconstructions."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from PIL import Image as Pillow

from starflow2_jax.errors import ConfigError
from starflow2_jax.models.gaussian_distance import frechet_of
from starflow2_jax.parallel import processes
from starflow2_jax.sequence import Sequence
from starflow2_jax.training.codec import losses, measures, pictures
from starflow2_jax.training.codec.step import CodecState
from starflow2_jax.training.codec.task import CodecTask
from starflow2_jax.training.evals.batches import HeldOutBatches
from starflow2_jax.training.evals.protocol import Findings
from starflow2_jax.training.evals.sheet import drawn

WAYS = {
    "": "through latents",
    "direct_": "from the encoder's features",
}  # prefix of the numbers -> caption on the sheet


class Reconstruction:
    """See protocol.Evaluator. Measures the moving average of the parameters; latents are the means of their Gaussians:

    feature_error     mean squared error of the features that are made again
    kl                nats a token
    active_channels   latent channels that vary
    psnr, ssim        of the pictures that are made, as 8-bit levels: means over the pictures
    distance          Fréchet distance of these pictures from the originals, in the encoder's features, averaged over
    tokens

    "direct_NAME" is measured on pictures that the pixel decoder makes from the encoder's own features. Before the pixel
    decoder is trained, there are no pictures. The sheet is evals/NAME/STEP.png; with `files`, pictures are in the
    folders evals/NAME/STEP/originals and evals/NAME/STEP/reconstructions.
    """

    def __init__(self, name: str, config: Any, task: CodecTask, folder: Path):
        networks = task.networks.cfg
        self.config, self.folder = config, folder / "evals" / name
        self.pictures = task.stage.pixels or bool(task.config.start)
        if (side := min(networks.grid) * networks.pixel_decoder.patch) < measures.WINDOW:
            raise ConfigError(
                f"evals.{name}: SSIM needs pictures of at least {measures.WINDOW} pixels a side, and these have "
                f"{side}; take it out of the config"
            )
        streams = pictures.held_out_streams(task.config, config.mix, networks)
        self.batches = HeldOutBatches(streams, task.reader, config.batches, task.mesh)
        self.measure = jax.jit(partial(_measure, task, self.pictures))

    def __call__(self, number: int, state: CodecState, frozen: dict[str, Any]) -> Findings:
        """See protocol.Evaluator."""
        params = frozen | state.params | state.ema
        kept: dict[str, list[np.ndarray]] = {}
        shown: dict[str, list[np.ndarray]] = {"originals": [], **{prefix: [] for prefix in WAYS}}
        count = 0
        for batch in self.batches:
            found = self.measure(params, batch)
            there = whole(found["there"])
            for name, values in found["numbers"].items():
                kept.setdefault(name, []).append(whole(values)[there])
            if self.pictures and (self.config.files or count < self.config.shown):
                levels = {name: whole(values)[there] for name, values in found["levels"].items()}
                for name, several in levels.items():
                    shown[name] += list(several[: max(0, self.config.shown - count)])
                if self.config.files:
                    self._write(number, count, levels)
            count += int(there.sum())
        if count < 2:
            raise ConfigError(f"{self.folder.name}: an evaluation needs at least two pictures; give it more in evals")
        numbers = _numbers({name: np.concatenate(parts) for name, parts in kept.items()})
        return Findings(numbers, self._sheet(number, shown))

    def _write(self, number: int, first: int, levels: dict[str, np.ndarray]) -> None:
        """Write PNG files, of which the first has the number `first`."""
        if not processes.primary():
            return
        for name, key in (("originals", "originals"), ("reconstructions", "")):
            folder = self.folder / f"{number:08d}" / name
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(levels[key]):
                Pillow.fromarray(picture).save(folder / f"{first + i:06d}.png")

    def _sheet(self, number: int, shown: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
        if not shown["originals"]:
            return {}
        rows = [[x / 127.5 - 1 for x in several] for several in shown.values()]
        sheet = drawn(["originals", *WAYS.values()], rows)
        if processes.primary():
            self.folder.mkdir(parents=True, exist_ok=True)
            sheet.save(self.folder / f"{number:08d}.png")
        return {"pictures": np.asarray(sheet)}


def whole(x: jax.Array) -> np.ndarray:
    """A global array as a NumPy array, in every process. All processes call it together."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True) if jax.process_count() > 1 else x)


def _measure(task: CodecTask, makes_pictures: bool, params: dict[str, Any], batch: Sequence) -> dict[str, Any]:
    """The measured numbers of each picture of a batch, the pictures as 8-bit levels, and which rows hold a picture."""
    n = task.networks
    real = pictures.pixels(batch, n.cfg)
    x = n.features(params, real)
    mean, log_variance = n.gaussian(params, x)
    again = n.features_again(params, mean)
    numbers = {
        "feature_error": jnp.mean((again - x) ** 2, (1, 2)),
        "kl": jnp.mean(jnp.sum(losses.kl(mean, log_variance), -1), 1),
        "latent_mean": jnp.mean(mean, 1),
        "latent_square": jnp.mean(mean**2, 1),
    }
    levels = {"originals": measures.as_levels(real)}
    if makes_pictures:
        numbers["pooled"] = jnp.mean(x, 1)
        for prefix, features in zip(WAYS, (again, x), strict=True):
            made = jnp.clip(n.pictures(params, features), -1, 1)
            levels[prefix] = measures.as_levels(made)
            numbers[f"{prefix}psnr"] = measures.psnr(levels[prefix], levels["originals"])
            numbers[f"{prefix}ssim"] = measures.ssim(levels[prefix], levels["originals"])
            numbers[f"{prefix}pooled_again"] = jnp.mean(n.features(params, made), 1)
    return {"there": jnp.max(batch.segments, 1) > 0, "numbers": numbers, "levels": levels}


def _numbers(of_pictures: dict[str, np.ndarray]) -> dict[str, float]:
    """The numbers of the evaluation, from those of each picture."""
    channels = [np.float64(of_pictures.pop(name)).mean(0) for name in ("latent_mean", "latent_square")]
    found: dict[str, float] = {"active_channels": measures.active_channels(*channels)}
    pooled = of_pictures.pop("pooled", None)
    for name, values in of_pictures.items():
        if name.endswith("pooled_again"):
            assert pooled is not None
            found[name.removesuffix("pooled_again") + "distance"] = frechet_of(values, pooled)
        else:
            found[name] = float(np.float64(values).mean())
    return dict(sorted(found.items()))
