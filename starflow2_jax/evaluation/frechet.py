"""The Fréchet distance of two folders of pictures, in the features of a file that the user brings.

The means and covariances of a folder are kept in a cache, under a hash of the features' file and of all pictures.
"""

import importlib
import pickle
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from tqdm import tqdm

from starflow2_jax.errors import UserError
from starflow2_jax.evaluation.user_files import sha256
from starflow2_jax.models.gaussian_distance import frechet
from starflow2_jax.text_files import reason, shorten

NEEDS = "a Fréchet distance needs torch and torch-fidelity; install them with `pip install 'starflow2_jax[fid]'`"
NO_NETWORK = (
    "is neither a TorchScript file nor the weights of torch-fidelity's Inception; docs/evaluation.md names some"
)
MAP = "pictures (B, 3, H, W) uint8 to features (B, D)"
SUFFIXES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of the features of n pictures: mean (D,) and covariance (D, D), fp64. n is None if a file does not tell it."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int | None

    def save(self, path: Path) -> None:
        """Write an .npz file with the names that other programs use, too."""
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, mu=self.mean, sigma=self.covariance, n=self.n or 0)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read an .npz file with the arrays mu and sigma, and n if there is one. Raises UserError."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["mu"], file["sigma"], int(file["n"]) or None if "n" in file else None)
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path} is no .npz file with the arrays mu and sigma ({reason(error)})") from None


def distance(images: Path, reference: Path, features: Path, cache: Path, batch: int = 64) -> dict[str, Any]:
    """The Fréchet distance, the numbers of pictures, and the hashes of what was compared.

    images: a folder of .png and .jpg files. reference: the same, or an .npz file of statistics (mu, sigma). features: a
    TorchScript file that maps pictures (B, 3, H, W) uint8 to features (B, D), or the weights of torch-fidelity's
    Inception. Raises UserError.
    """
    network = _features(features)
    known = sha256(features)
    a, b = (_statistics(path, network, known, cache, batch) for path in (images, reference))
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"{reference} has statistics of {len(b.mean)} features, but {features} makes {len(a.mean)} features; give "
            f"the --features file that made these statistics"
        )
    return {
        "frechet_distance": frechet(a.mean, a.covariance, b.mean, b.covariance),
        "images": a.n,
        "reference": b.n,
        "images_sha256": sha256(images),
        "reference_sha256": sha256(reference),
        "features_sha256": known,
    }


def _statistics(path: Path, network: Callable[[Any], Any], known: str, cache: Path, batch: int) -> Statistics:
    """The statistics of a folder, from the cache if it has them, or those in an .npz file. Raises UserError."""
    if path.is_file():
        return Statistics.load(path)
    kept = cache / f"{known[:16]}-{sha256(path)[:16]}.npz"
    if not kept.is_file():
        found = _measured(path, network, batch)
        cache.mkdir(parents=True, exist_ok=True)
        found.save(kept)
    return Statistics.load(kept)


def _measured(folder: Path, network: Callable[[Any], Any], batch: int) -> Statistics:
    import torch

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if len(files) < 2:
        raise UserError(
            f"{folder} holds {len(files)} pictures (.png, .jpg), but a Fréchet distance needs thousands; add pictures"
        )
    found = []
    with torch.inference_mode(), tqdm(total=len(files), desc=folder.name, unit="picture") as bar:
        for pictures in _batches(files, batch):
            made = network(torch.from_numpy(pictures))
            found.append(made.reshape(len(pictures), -1).double().cpu().numpy())
            bar.update(len(pictures))
    features = np.concatenate(found)
    return Statistics(features.mean(0), np.cov(features, rowvar=False), len(features))


def _batches(files: list[Path], batch: int) -> Iterator[np.ndarray]:
    """Batches (B, 3, H, W) uint8 of pictures of one size. Raises UserError."""
    several: list[np.ndarray] = []
    for file in files:
        try:
            with Pillow.open(file) as opened:
                pixels = np.asarray(opened.convert("RGB")).transpose(2, 0, 1)
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError) as error:
            raise UserError(f"the picture {file} cannot be read ({reason(error)})") from None
        if several and (len(several) == batch or several[0].shape != pixels.shape):
            yield np.stack(several)
            several = []
        several.append(pixels)
    yield np.stack(several)


def _features(path: Path) -> Callable[[Any], Any]:
    """The network in a file: pictures (B, 3, H, W) uint8 -> features (B, D). Nothing in the file is unpickled. Raises
    UserError.
    """
    try:
        import torch
    except ImportError:
        raise UserError(NEEDS) from None

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return _scripted(path, torch.jit.load(str(path), map_location=device).eval(), device)
    except RuntimeError:
        pass  # it is no TorchScript
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself would unpickle anything
    except (RuntimeError, pickle.UnpicklingError, OSError, EOFError, ValueError) as error:
        raise UserError(f"{path} {NO_NETWORK} ({reason(error)})") from None
    try:
        fidelity: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except (ImportError, RuntimeError) as error:  # the second: a torchvision that does not fit torch
        raise UserError(f"{NEEDS} ({reason(error)})") from None
    try:
        inception = fidelity.FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=str(path)
        )
    except (RuntimeError, AttributeError, TypeError) as error:
        raise UserError(f"{path} {NO_NETWORK} ({reason(error)})") from None
    return lambda pictures: inception.to(device)(pictures.to(device))[0]


def _scripted(path: Path, script: Any, device: str) -> Callable[[Any], Any]:
    """The network of a TorchScript file. It raises UserError for pictures that the script cannot take."""
    forward = getattr(script, "forward", None)
    if forward is None:
        raise UserError(f"the TorchScript file {path} has no method forward; give one that maps {MAP}")
    names = {argument.name for argument in forward.schema.arguments}
    chosen = {"return_features": True} if "return_features" in names else {}  # of NVIDIA's Inception

    def network(pictures: Any) -> Any:
        try:
            return script(pictures.to(device), **chosen)
        except RuntimeError as error:
            last = shorten(str(error).strip().rpartition("\n")[2])  # of a traceback
            raise UserError(
                f"the TorchScript file {path} fails on pictures ({last}); give one that maps {MAP}, or set a smaller "
                f"--batch"
            ) from None

    return network
