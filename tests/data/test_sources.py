"""One's own documents: the codec and the tokenizer that are fitted to them, and the captions that are left out."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from starflow2_jax.config import loading as configs
from starflow2_jax.data import sources
from starflow2_jax.data.images import write_image
from starflow2_jax.errors import UserError

QUICK = Path(__file__).parents[2] / "starflow2_jax/experiments" / "digits_quick.py"


def config_of(folder: Path, images: list[np.ndarray], via: str = "flow", **codec):
    """A config whose source has one captioned image a document; the images must fit as they are."""
    documents = []
    for i, pixels in enumerate(images):
        file = write_image(folder / str(i), pixels)
        documents.append([{"text": f"zebra {i}"}, {"image": file.name, "via": via}])
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, documents)))
    config = configs.load(QUICK).unlock()
    config.data.sources = dict(mine=dict(path=str(folder / "data.jsonl"), crop="none"))
    config.codec.update(codec)
    return config


def test_patches_are_fitted_to_the_images(tmp_path):
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, (4, 6, 3)).astype(np.float32) for _ in range(20)]
    codec = sources.make_codec(config_of(tmp_path, images, image_channels=3))
    assert (codec.image_size, codec.grid, codec.channels) == ((4, 6), (2, 3), 12)
    latents = codec.encode(np.stack(images)).reshape(-1, 12)
    np.testing.assert_allclose(latents.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(latents.std(0), 1, atol=0.02)


def test_what_cannot_be_read_is_not_fitted_to(tmp_path):
    """A damaged image, a missing one and a line that is no document are passed over. Without any other document, the
    error names the first of them.
    """
    images = [np.full((4, 4, 1), level, np.float32) for level in (-1, 0, 1)]
    config = config_of(tmp_path, images)
    fitted = sources.make_codec(config)
    lines = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "bad.png").write_bytes(b"\x89PNG")
    bad = [json.dumps([{"image": name}]) for name in ("bad.png", "missing.png")] + ['{"no": "document"}']
    (tmp_path / "data.jsonl").write_text("\n".join([*bad, lines]))
    assert sources.make_codec(config) == fitted and "zebra" in sources.make_tokenizer(config).get_vocab()
    (tmp_path / "data.jsonl").write_text("\n".join(bad))
    with pytest.raises(UserError, match="bad.png cannot be read"):
        sources.make_codec(config)


def test_blank_images_have_finite_latents(tmp_path):
    blank = np.full((4, 4, 1), -1, np.float32)
    codec = sources.make_codec(config_of(tmp_path, [blank, blank]))
    latents = codec.encode(blank[None])
    assert np.isfinite(latents).all() and np.isfinite(codec.log_volume)
    np.testing.assert_allclose(codec.decode(latents)[0], blank, atol=1e-6)


def test_the_tokenizer_learns_the_documents_words(tmp_path):
    config = config_of(tmp_path, [np.zeros((4, 4, 1), np.float32)] * 9)
    tokenizer = sources.make_tokenizer(config)
    assert len(tokenizer) <= config.model.vlm.vocabulary
    assert len(tokenizer.encode("zebra")) == 1 and tokenizer.decode(tokenizer.encode("zebra 3, yak")) == "zebra 3, yak"


@pytest.mark.parametrize(
    "sides, via, codec, saying",
    [
        ((4, 4), "vit", {}, 'no images via "flow"'),
        ((4, 6), "flow", {}, r"sizes \[\(4, 4\), \(4, 6\)\]; bring them to one size"),
        ((4, 4), "flow", {"patch": 3}, "codec.patch=3 does not divide an image's side of 4 pixels"),
        ((4, 4), "flow", {"kind": "vae"}, "codec.kind must be 'patch' or 'latents' or 'fae', not 'vae'"),
    ],
)
def test_images_that_no_codec_fits(tmp_path, sides, via, codec, saying):
    images = [np.zeros((4, side, 1), np.float32) for side in sides]
    with pytest.raises(UserError, match=saying):
        sources.make_codec(config_of(tmp_path, images, via, **codec))


def test_a_source_is_found_by_name_scheme_suffix_or_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "cloud://", sources.Digits)
    monkeypatch.setitem(sources.SOURCES, "/shelf.txt", sources.Digits)
    assert sources.find("digits") is sources.find("cloud://bucket/rows.jsonl") is sources.Digits
    assert sources.find("folder/digits.jsonl") is sources.JsonlDocuments
    (tmp_path / "shelf.txt").touch()
    assert sources.find(str(tmp_path)) is sources.Digits
    for wrong in ("digit", "rows.json5", "sftp://rows", str(tmp_path.parent)):
        with pytest.raises(UserError, match="names no source; there are digits, scenes, .jsonl"):
            sources.find(wrong)


def test_options_of_a_source_are_keys_of_its_entry():
    config = configs.load(QUICK, ["data.sources.*.warp=0.5", "data.sources.read.part=held_out"])
    named = {each.name: each.open().options for each in sources.named(config, "joint")}
    assert set(named) == {"caption", "read", "sum", "mirror", "count"}
    assert {options.warp for options in named.values()} == {0.5}
    assert named["read"].part == "held_out" and named["sum"].part == "train"


def test_one_source_takes_the_place_of_all(tmp_path):
    lines = [[{"text": "a"}, {"image": "b.png", "generate": True}]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = configs.load(QUICK, [f"data.source={tmp_path / 'data.jsonl'}"])
    for stage in (None, *config.order):
        [alone] = sources.named(config, stage)
        assert alone.name == "documents" and alone.weight == 1 and len(alone.open()) == 1


def test_a_mix_names_the_sources_of_a_stage():
    config = configs.load(QUICK, ["stages.joint.mix.read=0"])
    assert [each.name for each in sources.named(config, "joint")] == ["caption", "count", "mirror", "sum"]
    weights = {each.name: each.weight for each in sources.named(config, "image_to_text")}
    assert weights == {"read": 2.0, "sum": 1.0}
    config.unlock().stages.joint.mix = {}
    assert {each.weight for each in sources.named(config, "joint")} == {1.0}
    assert len(sources.named(config)) == 5


@pytest.mark.parametrize(
    "overrides, saying",
    [
        (["stages.joint.mix.raed=1"], "stages.joint.mix names the source 'raed'; data.sources has caption"),
        (
            ["stages.image_to_text.mix.read=0", "stages.image_to_text.mix.sum=0"],
            "stages.image_to_text.mix has a weight of 0",
        ),
        (["data.sources.a/b.path=digits"], "a source's name has letters"),
        (["data.sources.new.path=digit"], "the path 'digit' names no source"),
        (["data.sources.new.path=digits", "data.sources.new.wrap=1"], "data.sources.new.wrap"),
        (["data.sources.new.warp=1"], "data.sources.new"),
        (["data.sources.read.text_drop=0.9", "data.sources.read.both_drop=0.2"], "at most 1"),
    ],
)
def test_sources_and_mixes_that_mean_nothing(overrides, saying):
    with pytest.raises(UserError) as caught:
        configs.load(QUICK, overrides)
    assert saying in str(caught.value), str(caught.value)


def test_who_trains_on_other_data_needs_no_scikit_learn():
    code = (
        "import sys; import starflow2_jax.training.loop, starflow2_jax.sampling.engine, "
        "starflow2_jax.evaluation.table\nprint(*[name for name in ('sklearn', 'scipy.ndimage') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
