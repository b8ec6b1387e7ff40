"""Measures how long the next turn of a conversation waits for its first token, with and without reuse of the caches.

    python benchmarks/turns.py --checkpoint quickstart/checkpoint --images 1 4 8      # a trained model
    python benchmarks/turns.py --mid --images 1 4                                     # a random one of width 512

The model writes `--images` images; then a question comes. The time is that from the question to the answer's first
token. "reuse" reads only the question, after the contents of the caches. "re-encode" reads the whole conversation in a
new session: each image goes through the shallow flow, the adapter and both streams. Both run in turn; the numbers are
medians.
"""

import argparse
import json
import statistics
import time

import jax
from sampling import mid_size

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.sampling.engine import SampleOptions, Sampler, Session

REQUEST, QUESTION = Text("draw a seven"), Text("which digit is this?")
ONE_TOKEN = SampleOptions(temperature=0, max_tokens=1, max_images=0)


def conversation(sampler: Sampler, images: int) -> tuple[Session, list]:
    """A session in which the model wrote `images` images, and the same conversation as a document."""
    room = sampler.model.cfg.tokens + 1
    draw = SampleOptions(0, 0.9, max_tokens=room, image_first=True, max_images=1)
    session, document = sampler.session(draw, [0]), []
    for _ in range(images):
        session.read([[REQUEST]], room=room)
        [[image]] = session.write(draw)
        assert isinstance(image, Image)
        document += [REQUEST, Image(image.pixels)]
    return session, document


def reuse(session: Session) -> Session:
    """Ask the question in a fork of the session, so that it can be asked again."""
    turn = session.fork([0], [0])
    turn.read([[QUESTION]], room=1)
    turn.write(ONE_TOKEN)
    return turn


def reencode(sampler: Sampler, document: list) -> Session:
    """Read the whole conversation and the question in a new session."""
    turn = sampler.session(ONE_TOKEN, [0])
    turn.read([[*document, QUESTION]], room=1)
    turn.write()
    return turn


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = p.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="a trained model's checkpoint directory")
    model.add_argument("--mid", action="store_true", help="a random model of width 512 instead")
    p.add_argument("--images", type=int, nargs="+", default=[1, 4], help="images in the conversation")
    p.add_argument("--repeats", type=int, default=9, help="timed runs")
    a = p.parse_args()
    sampler = mid_size() if a.mid else Sampler.restore(a.checkpoint)
    print(jax.devices()[0].device_kind, len(jax.devices()), "devices, jax", jax.__version__)
    for images in a.images:
        session, document = conversation(sampler, images)
        runs = {"reuse": lambda s=session: reuse(s), "re-encode": lambda d=document: reencode(sampler, d)}
        times = {name: [] for name in runs}
        for repeat in range(a.repeats + 1):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                if repeat:  # the first run compiles
                    times[name].append(time.perf_counter() - begin)
        found = {name: round(1000 * statistics.median(t), 1) for name, t in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["reuse"], times["re-encode"], strict=True))
        print(json.dumps({"images": images, "milliseconds": found, "ratio": round(ratio, 2)}), flush=True)


if __name__ == "__main__":
    main()
