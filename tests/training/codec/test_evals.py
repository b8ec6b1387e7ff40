"""Evaluations of a codec's training: numbers, sheets and files against the codec that the run leaves."""

import json

import jax
import numpy as np
import pytest
from PIL import Image as Pillow
from tiny_codec_training import config

from starflow2_jax.codecs.fae import read_fae
from starflow2_jax.config.loading import complete
from starflow2_jax.data.scenes.source import SceneOptions, Scenes
from starflow2_jax.errors import ConfigError
from starflow2_jax.models.fae import FeatureDecoder, LatentEncoder
from starflow2_jax.models.gaussian_distance import frechet_of
from starflow2_jax.parallel import sharding
from starflow2_jax.training.codec import measures, pictures
from starflow2_jax.training.codec.pictures import held_out_streams
from starflow2_jax.training.codec.trainer import CodecTrainer
from starflow2_jax.training.evals.table import evaluations

LABEL = r"on an? (\w+) background"
COUNT = 24  # pictures: three batches of 8


def with_evals(**changes: object) -> dict:
    c = config(**changes)
    source = dict(path="scenes", size=32)
    c["data"]["sources"] |= {
        "val": dict(source, part="validation"),
        "grounds": dict(source, kind="background", part="test"),
    }
    c["evals"] = dict(
        reconstruction=dict(mix=dict(val=1.0), batches=3, shown=5, files=True, every=0),
        ground=dict(kind="probe", mix=dict(grounds=1.0), label=LABEL, batches=10, every=0),
        sheet=dict(prompts=("a dog",)),
    )
    return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    CodecTrainer(with_evals(), folder).run(progress=False)
    return folder


def found(folder, stage: str) -> dict[str, float]:
    rows = map(json.loads, (folder / "metrics/metrics.jsonl").read_text().splitlines())
    return {name: value for row in rows if row["stage"] == stage and "loss" not in row for name, value in row.items()}


def files(folder, name: str) -> np.ndarray:
    return np.stack([np.asarray(Pillow.open(file)) for file in sorted((folder / name).iterdir())])


def test_each_stage_has_the_numbers_of_its_networks(trained):
    names = {stage: {n for n in found(trained, stage) if "/" in n} for stage in config()["order"]}
    latents = {f"reconstruction/{name}" for name in ("feature_error", "kl", "active_channels")}
    probe = {f"ground/{name}" for name in ("features", "reconstructed", "transferred", "most_common", "classes")}
    made = {f"reconstruction/{way}{name}" for way in ("", "direct_") for name in ("psnr", "ssim", "distance")}
    assert names == dict(
        encoder=set(), features=latents | probe, pixels=latents | probe | made, pixels_tuned=latents | probe | made
    )


def test_the_files_are_what_the_codec_makes_of_the_pictures(trained):
    codec, folder = read_fae(trained), trained / "evals/reconstruction/00000008"
    originals, made = files(folder, "originals"), files(folder, "reconstructions")
    assert originals.shape == made.shape == (COUNT, 32, 32, 3) and len(np.unique(originals, axis=0)) == COUNT
    pixels = originals.astype(np.float32) / 127.5 - 1
    wanted = np.asarray(codec.decode(codec.encode(pixels)))
    np.testing.assert_allclose(made / 127.5 - 1, wanted.clip(-1, 1), atol=1 / 127)
    errors = ((made.astype(float) - originals) ** 2).mean((1, 2, 3))
    numbers = found(trained, "pixels_tuned")
    assert numbers["reconstruction/psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)), rel=1e-4)

    x = codec.features_of(codec.weights, pixels)
    mean, log_variance = LatentEncoder(codec.networks).apply({"params": codec.weights["latent_encoder"]}, x)
    again = FeatureDecoder(codec.networks).apply({"params": codec.weights["feature_decoder"]}, mean)
    assert numbers["reconstruction/feature_error"] == pytest.approx(float(np.mean((again - x) ** 2)), rel=1e-4)
    kl = 0.5 * (np.exp(log_variance) + mean**2 - 1 - log_variance)
    assert numbers["reconstruction/kl"] == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
    active = int((np.asarray(mean).reshape(-1, 4).var(0) > 0.01).sum())
    assert numbers["reconstruction/active_channels"] == active


def test_pictures_are_compared_in_the_encoders_features_and_by_ssim(trained):
    """Both ways to make them: through latents, and from the encoder's features."""
    task = CodecTrainer(with_evals(), trained).task("pixels_tuned")
    codec, n, numbers = read_fae(trained), task.networks, found(trained, "pixels_tuned")
    originals = files(trained, "evals/reconstruction/00000008/originals")
    pixels = originals.astype(np.float32) / 127.5 - 1
    x = n.features(codec.weights, pixels)
    direct = np.asarray(n.pictures(codec.weights, x)).clip(-1, 1)
    for way, made in {"": np.asarray(codec.decode(codec.encode(pixels))).clip(-1, 1), "direct_": direct}.items():
        again = n.features(codec.weights, made)
        distance = frechet_of(*(np.asarray(each).mean(1) for each in (again, x)))
        assert distance > 0 and numbers[f"reconstruction/{way}distance"] == pytest.approx(distance, rel=1e-3)
        levels = np.round((made + 1) * 127.5).astype(np.uint8)
        similar = float(np.mean(measures.ssim(levels, originals)))
        assert numbers[f"reconstruction/{way}ssim"] == pytest.approx(similar, rel=1e-3)


def test_the_probe_is_fitted_and_tested_on_the_features_that_it_names(trained):
    task = CodecTrainer(with_evals(), trained).task("pixels_tuned")
    codec, numbers = read_fae(trained), found(trained, "pixels_tuned")
    [ground] = [each.evaluate for each in evaluations(task, trained) if each.name == "ground"]
    pixels, classes = [], []
    with jax.set_mesh(task.mesh):
        for batch in ground.batches:
            pixels.append(np.asarray(pictures.pixels(batch, codec.networks)))
            classes.append(np.asarray(pictures.labels(batch, codec.networks)))
    x, y = codec.features_of(codec.weights, np.concatenate(pixels)), np.concatenate(classes)
    mean, _ = LatentEncoder(codec.networks).apply({"params": codec.weights["latent_encoder"]}, x)
    again = FeatureDecoder(codec.networks).apply({"params": codec.weights["feature_decoder"]}, mean)
    x, again = (np.asarray(each).mean(1) for each in (x, again))
    fit, test = slice(0, None, 2), slice(1, None, 2)
    wanted = dict(
        features=measures.probe(x[fit], y[fit], x[test], y[test]),
        reconstructed=measures.probe(again[fit], y[fit], again[test], y[test]),
        transferred=measures.probe(x[fit], y[fit], again[test], y[test]),
        most_common=np.bincount(y).max() / len(y),
        classes=len(set(y.tolist())),
    )
    assert len({wanted[name] for name in ("features", "reconstructed", "transferred")}) == 3, wanted
    assert {name: numbers[f"ground/{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-3)


def test_the_sheet_shows_originals_above_reconstructions(trained):
    sheet = np.asarray(Pillow.open(trained / "evals/reconstruction/00000008.png").convert("RGB"), int)
    folder = trained / "evals/reconstruction/00000008"
    for row, name in enumerate(("originals", "reconstructions")):
        for column, picture in enumerate(files(folder, name)[:5]):
            top, left = 32 + row * (64 + 32), 16 + column * (64 + 16)
            shown = sheet[top : top + 64 : 2, left : left + 64 : 2]
            assert np.abs(shown - picture).max() <= 1
    assert sheet.shape[1] == 16 + 5 * 80
    assert not (trained / "evals/reconstruction/00000004.png").exists()  # features: nothing makes pictures yet


def test_labels_are_the_documents_own(trained):
    """The label's token and the picture come from the same document."""
    task = CodecTrainer(with_evals(), trained).task("features")
    mix = with_evals()["evals"]["ground"]["mix"]
    [stream] = held_out_streams(task.config, mix, task.networks.cfg, LABEL)
    source = Scenes("scenes", SceneOptions(kind="background", part="test"))
    for i in range(5):
        picture, label = stream.prepare(stream.source[i], np.random.default_rng(0))
        parts = source.parts(i)
        assert label.text == parts[1].scene.background and f" {label.text} background" in parts[0].text
        np.testing.assert_array_equal(picture.pixels, source[i][1].pixels)
    [stream] = held_out_streams(task.config, mix, task.networks.cfg, "(none of this)")
    with pytest.raises(Exception, match="has the label"):
        stream.prepare(stream.source[0], np.random.default_rng(0))


def test_they_are_the_same_on_any_mesh_and_when_called_again(trained):
    results = []
    for axes in (dict(data=1, fsdp=8), dict(data=4, fsdp=2)):
        trainer = CodecTrainer(with_evals(mesh=axes), trained)
        task = trainer.task("pixels_tuned")
        frozen = task.frozen(trainer.checkpoints)
        with jax.set_mesh(trainer.mesh):
            params = trainer.checkpoints.steps.restore(8, {"params": task.abstract_state().params})["params"]
            state = task.new_state(params)
            every = evaluations(task, trained)
            assert [each.name for each in every] == ["ground", "reconstruction"]
            for _ in range(2):
                results.append({k: v for e in every for k, v in e.evaluate(8, state, frozen).numbers.items()})
    assert results[0] == results[1]
    logged = {name.partition("/")[2]: value for name, value in found(trained, "pixels_tuned").items() if "/" in name}
    for result in results:
        assert result == pytest.approx(logged, rel=2e-3, abs=1e-4)


@pytest.mark.parametrize(
    "changes, message",
    (
        (dict(label="("), "evals.ground.label is no regular expression"),
        (dict(label="a"), "evals.ground.label has 0 groups"),
        (dict(mix={"else": 1.0}), "evals.ground.mix names the source 'else'"),
    ),
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_trained(tmp_path, changes, message):
    c = with_evals()
    c["evals"]["ground"] |= changes
    with pytest.raises(ConfigError, match=message):
        CodecTrainer(c, tmp_path / "run").run(progress=False)
    assert not (tmp_path / "run").exists()


def test_evaluations_of_the_other_kind_of_run_are_left_out(trained, capsys):
    trainer = CodecTrainer(with_evals(), trained)
    with sharding.jax.set_mesh(trainer.mesh):
        assert not trainer._evals(trainer.task("encoder"))
    said = capsys.readouterr().err
    assert all(f"evals.{name} is left out of stage encoder" in said for name in ("ground", "reconstruction", "sheet"))
    assert complete(with_evals()).evals.ground.kind == "probe"
