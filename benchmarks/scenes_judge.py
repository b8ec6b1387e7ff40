"""How well the judge of scenes reads pictures, whole and damaged, as a Markdown table.

    python benchmarks/scenes_judge.py --each 60

"exact": the ground and every sprite with its place and side are read as they were rendered; "right": the ground and the
number of each sprite are. Times are CPU seconds of the process.
"""

import argparse
import io
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image as Pillow
from PIL import ImageFilter

from starflow2_jax.data.images import as_pillow, from_pillow
from starflow2_jax.data.scenes.kinds import CAPTIONS, Shown
from starflow2_jax.data.scenes.scene import Scene, render
from starflow2_jax.data.scenes.source import SceneOptions, Scenes
from starflow2_jax.evaluation.scenes_judge import Judge

Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def noise(deviation: float) -> Damage:
    """Normal noise, of levels in [-1, 1]."""
    return lambda picture, rng: picture + deviation * rng.standard_normal(picture.shape)


def blur(radius: float) -> Damage:
    """A Gaussian of this deviation, in units of 1/32 of the picture."""

    def blurred(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return from_pillow(as_pillow(picture).filter(ImageFilter.GaussianBlur(radius * len(picture) / 32)))

    return blurred


def jpeg(quality: int) -> Damage:
    """A JPEG file of Pillow's."""

    def compressed(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        as_pillow(picture).save(file := io.BytesIO(), "jpeg", quality=quality)
        return from_pillow(Pillow.open(file))

    return compressed


def drift(most: float) -> Damage:
    """Each colour channel shifted by up to `most`, of levels in [-1, 1]."""
    return lambda picture, rng: picture + rng.uniform(-most, most, 3)


DAMAGES: dict[str, Damage] = {"none": lambda picture, rng: picture, "drift 0.1": drift(0.1)}
DAMAGES |= {f"noise {x}": noise(x) for x in (0.1, 0.2, 0.3, 0.4)}
DAMAGES |= {f"blur {x}": blur(x) for x in (0.5, 0.7, 1.0, 1.5, 2.0)}
DAMAGES |= {f"JPEG {x}": jpeg(x) for x in (75, 50, 25)}


def main() -> None:
    """Print a table for each size and vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=60, help="scenes of each kind (default: 60)")
    args = parser.parse_args()
    for size, objects in ((32, 60), (64, 0)):
        scenes: list[Scene] = []
        for kind in (*CAPTIONS, "story", "think"):
            source = Scenes(options=SceneOptions(kind=kind, part="test", objects=objects))
            documents = map(source.parts, range(args.each))
            scenes += [next(part.scene for part in parts if isinstance(part, Shown)) for parts in documents]
        judge, rng = Judge(objects), np.random.default_rng(0)
        print(f"\n{len(scenes)} scenes, {size} pixels, {objects or 'all'} nouns\n")
        print("| damage | exact | right | ms a picture |\n|---|---|---|---|")
        for name, damage in DAMAGES.items():
            pictures = [damage(render(scene, size), rng) for scene in scenes]
            begin = time.process_time()
            found = [judge(picture) for picture in pictures]
            each = 1e3 * (time.process_time() - begin) / len(scenes)
            right = [a.background == b.background and a.counts == b.counts for a, b in zip(scenes, found, strict=True)]
            exact = [
                ok and Counter(a.placed) == Counter(b.placed) for ok, a, b in zip(right, scenes, found, strict=True)
            ]
            print(f"| {name} | {np.mean(exact):.3f} | {np.mean(right):.3f} | {each:.0f} |", flush=True)
        grey = [rng.uniform(-1, 1, (size, size, 3)) for _ in range(args.each)]
        print(f"\nsprites in {len(grey)} pictures of uniform noise: {sum(len(judge(x).placed) for x in grey)}")


if __name__ == "__main__":
    main()
