"""The files of the worked example in docs/evaluation.md, whose judges cannot be had everywhere: they answer at random.

captions.txt   128 captions of digits, for the benchmark coco
scans/         the 297 held-out scans of digits, as PNG files
untrained.pth  torch-fidelity's Inception after initialisation (extra `fid`)
judges/        modules in the places of mmdet, open_clip and clip_benchmark, for GenEval's evaluate_images.py

python benchmarks/evaluation_example.py --out files
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from starflow2_jax.data import digits

CAPTIONS = 128
JUDGES = {
    # A detector of GenEval's 80 classes: it finds each twice, in random places of 8 x 8 pixels.
    "mmdet/apis.py": """
import zlib
import numpy as np
def init_detector(*args, **more): return None
def inference_detector(model, file):
    rng = np.random.default_rng(zlib.crc32("/".join(file.split("/")[-3:]).encode()))
    boxes = np.sort(rng.uniform(0, 8, (80, 2, 2, 2)), 2).reshape(80, 2, 4)
    return list(np.concatenate([boxes, rng.uniform(0, 0.5, (80, 2, 1))], -1))
""",
    "mmdet/__init__.py": "",
    "open_clip.py": """
import torch
def create_model_and_transforms(*args, **more): return None, None, lambda image: torch.zeros(1)
def get_tokenizer(name): return None
""",
    # One of GenEval's ten colours for each box.
    "clip_benchmark/metrics/zeroshot_classification.py": """
import torch
def zero_shot_classifier(*args): return None
def run_classification(model, classifier, loader, device): return torch.rand(len(loader.dataset), 10), None
""",
    "clip_benchmark/metrics/__init__.py": "",
    "clip_benchmark/__init__.py": "",
    "sitecustomize.py": """
import torch
torch.cuda.is_available = lambda: True
torch.manual_seed(0)
""",
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="a new folder")
    out = p.parse_args().out
    (out / "scans").mkdir(parents=True)
    pixels, labels = digits.split("held_out")
    captions = [digits.caption(int(labels[i]), pixels[i], i)[0].text for i in range(CAPTIONS)]
    (out / "captions.txt").write_text("\n".join(captions) + "\n")
    for i, picture in enumerate(pixels):
        Image.fromarray(np.uint8((picture[..., 0] + 1) * 127.5)).save(out / "scans" / f"{i:03d}.png")
    torch.save({}, out / "untrained.pth")
    torch.save(untrained(out / "untrained.pth"), out / "untrained.pth")
    for name, text in JUDGES.items():
        file = out / "judges" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    print(json.dumps({"captions": len(captions), "scans": len(pixels), "folder": str(out)}))


def untrained(file: Path) -> dict[str, torch.Tensor]:
    """Inception's parameters: convolutions by He's rule, all others as torch-fidelity makes them.

    file: any file that torch.load reads. Without one, torch-fidelity would download its weights.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_, **__) -> None:
            """Keep the first parameters."""

    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=str(file))
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    return network.state_dict()


if __name__ == "__main__":
    main()
