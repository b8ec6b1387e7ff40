"""How long the next turn of a conversation waits: from its caches, or with everything said so far read anew.

    python benchmarks/turns.py --checkpoint quickstart/checkpoint --images 1 4 8      # a trained model
    python benchmarks/turns.py --mid --images 1 4                                     # a random one of width 512

The conversation has so many images that the model wrote. Then a question comes; the time is that from the question to the
answer's first token. "reuse" reads the question behind what the caches hold; "re-encode" reads a new session of all: each
image through the shallow flow, the adapter and both streams. Both take turns; medians.
"""

import argparse
import json
import statistics
import time

import jax
from sampling import mid_size

from starflow2_jax.data.documents import Image, Text
from starflow2_jax.sampling.engine import SampleOptions, Sampler, Session

ASKED, QUESTION = [Text("draw a seven")], [Text("which digit is this?")]
ONE_TOKEN = SampleOptions(temperature=0, max_tokens=1, max_images=0)


def conversation(sampler: Sampler, images: int) -> tuple[Session, list]:
    """A session in which so many images were written, and the same as a document."""
    draw = SampleOptions(0, 0.9, max_tokens=sampler.model.cfg.tokens + 1, image_first=True, max_images=1)
    session, told = sampler.session(draw, [0]), []
    for _ in range(images):
        session.read([ASKED], room=draw.max_tokens)
        [[image]] = session.write(draw)
        told += [*ASKED, Image(image.pixels)]
    return session, told


def reuse(session: Session) -> Session:
    """The question and its answer, on a fork, so that it can be asked again."""
    turn = session.fork([0], [0])
    turn.read([QUESTION], room=1)
    turn.write(ONE_TOKEN)
    return turn


def reencode(sampler: Sampler, told: list) -> Session:
    turn = sampler.session(ONE_TOKEN, [0])
    turn.read([told + QUESTION], room=1)
    turn.write()
    return turn


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = p.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint")
    model.add_argument("--mid", action="store_true")
    p.add_argument("--images", type=int, nargs="+", default=[1, 4])
    p.add_argument("--repeats", type=int, default=9)
    a = p.parse_args()
    sampler = mid_size() if a.mid else Sampler.restore(a.checkpoint)
    print(jax.devices()[0].device_kind, len(jax.devices()), "devices, jax", jax.__version__)
    for images in a.images:
        session, told = conversation(sampler, images)
        runs = {"reuse": lambda s=session: reuse(s), "re-encode": lambda t=told: reencode(sampler, t)}
        times = {name: [] for name in runs}
        for repeat in range(a.repeats + 1):
            for name, run in runs.items():
                begin = time.perf_counter()
                run()
                if repeat:  # the first compiles
                    times[name].append(time.perf_counter() - begin)
        found = {name: round(1000 * statistics.median(t), 1) for name, t in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["reuse"], times["re-encode"], strict=True))
        print(json.dumps({"images": images, "milliseconds": found, "ratio": round(ratio, 2)}), flush=True)


if __name__ == "__main__":
    main()
