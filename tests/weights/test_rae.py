"""RAE: small random autoencoders of `diffusers`, in both versions of the names, against their own outputs."""

import json
import re

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from starflow2_jax import cli
from starflow2_jax.codecs.fae import FaeCodec, read_fae
from starflow2_jax.models.fae import FaeConfig
from starflow2_jax.weights.rae import abstract_params, import_rae, load_rae, rae_config, table
from starflow2_jax.weights.table import WeightError, expected

SIZES = dict(
    encoder_hidden_size=64,
    encoder_num_hidden_layers=2,
    encoder_input_size=56,  # 4 x 4 patches of 14 pixels; pictures of 32 x 32
    decoder_hidden_size=48,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=3,
    decoder_intermediate_size=80,
    patch_size=8,
    encoder_norm_mean=[0.4, 0.5, 0.6],
)
ENCODERS = {"dinov2": {}, "siglip2": dict(encoder_type="siglip2", encoder_patch_size=16, encoder_input_size=64)}
FILE = "diffusion_pytorch_model.safetensors"
OLDER = {  # names in older files
    r"(decoder_layers\.\d+\.attention)\.to_(query|key|value|q|k|v)\.": r"\1.attention.\2.",
    r"(decoder_layers\.\d+\.attention)\.to_out\.0\.": r"\1.output.dense.",
    r"(encoder\.layer\.\d+\.attention)\.(q|k|v)_proj\.": r"\1.attention.\2.",
    r"(encoder\.layer\.\d+\.attention)\.o_proj\.": r"\1.output.dense.",
    r"^encoder\.(?=embeddings\.(patch|position)_embedding\.|encoder\.layers|head|post_layernorm)": "encoder.vision_model.",
}


def older(name: str) -> str:
    for pattern, replacement in OLDER.items():
        name = re.sub(pattern, replacement, name)
    for short, long in {"q": "query", "k": "key", "v": "value"}.items():
        name = name.replace(f".attention.attention.{short}.", f".attention.attention.{long}.")
    return name


def reference(**options) -> diffusers.AutoencoderRAE:
    with pytest.MonkeyPatch.context() as patched:
        # diffusers 0.42 asks for an attribute that the class has in transformers 4 only.
        patched.setattr(transformers.SiglipVisionModel, "vision_model", property(lambda self: self), raising=False)
        return diffusers.AutoencoderRAE(**options)


@pytest.fixture(scope="module", params=["dinov2", "siglip2"])
def model(request):
    """A model of which every parameter is random, and the statistics of its latents differ from place to place."""
    generator = torch.Generator().manual_seed(0)
    statistics = dict(
        latents_mean=0.3 * torch.randn(64, 4, 4, generator=generator),
        latents_std=0.5 + torch.rand(64, 4, 4, generator=generator),
    )
    model = reference(**SIZES | ENCODERS[request.param], **statistics).eval()
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        scale = "norm" in name and name.endswith("weight") or name.endswith("lambda1")
        value.data = 1 + 0.1 * noise if scale else 0.1 * noise
    return model


@pytest.fixture(params=["new", "older"])
def folder(request, model, tmp_path):
    model.save_pretrained(tmp_path)
    if request.param == "older":
        tensors = load_file(tmp_path / FILE)
        renamed = {older(name): value for name, value in tensors.items()}
        siglip = model.config.encoder_type == "siglip2"
        others = [name for name in tensors if name.startswith("encoder.")] if siglip else range(4 * 2 * 2)
        assert len(renamed.keys() - tensors.keys()) == len(others) + 4 * 2 * 2  # 4 maps with biases, in 2 layers each
        save_file(renamed, tmp_path / FILE)
    return tmp_path


@pytest.mark.parametrize("side", [32, 56])
def test_features_and_pixels(folder, model, side):
    """Encoding and decoding give the numbers of the reference; 56 pixels need no resizing."""
    codec = load_rae(folder)
    pictures = np.random.default_rng(1).uniform(-1, 1, (2, side, side, 3)).astype(np.float32)
    channels_first = torch.from_numpy((pictures + 1) / 2).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = model.encode(channels_first).latent
        features = model._denormalize_latents(latents).permute(0, 2, 3, 1).reshape(2, 16, 64).numpy()
        wanted = model.decode(latents).sample.permute(0, 2, 3, 1).numpy() * 2 - 1
    got = np.asarray(codec.features_of(codec.weights, pictures))
    assert np.abs(features).mean() > 0.3 and np.abs(wanted).mean() > 0.1
    np.testing.assert_allclose(got, features, atol=1e-4)
    normalised = (features - codec.mean) / np.array(codec.std)
    np.testing.assert_allclose(codec.decode(normalised.reshape(2, 4, 4, 64).astype(np.float32)), wanted, atol=1e-4)
    if side == 32:
        np.testing.assert_allclose(codec.encode(pictures).reshape(2, 16, 64), normalised, atol=1e-4)


def test_statistics_of_channels(folder, model):
    """The same mean and deviation as of samples from the normal distributions of all places."""
    draws = np.random.default_rng(0).standard_normal((20_000, 64, 4, 4))
    features = model._denormalize_latents(torch.from_numpy(draws)).numpy()
    codec = load_rae(folder)
    np.testing.assert_allclose(codec.mean, features.mean((0, 2, 3)), atol=0.02)
    np.testing.assert_allclose(codec.std, features.std((0, 2, 3)), rtol=0.02)


def test_the_command_makes_a_codec_folder(folder, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("out") / "codec"
    assert cli.main(["convert", "rae", "--from", str(folder), "--to", str(out)]) == 0
    made, wanted = read_fae(out), load_rae(folder)
    assert made == wanted and made.channels == 64 and made.image_shape == (32, 32, 3)
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(made.weights), dict(wanted.weights)))
    options = FaeCodec.Options(path=str(out), grid=(4, 4), channels=64, patch=8)
    assert FaeCodec.make(options, ()) == made
    assert cli.main(["convert", "rae", "--from", str(folder), "--to", str(out)]) == 2
    assert cli.main(["convert", "rae", "--from", str(folder), "--to-hf", str(out)]) == 2
    assert "--to-hf writes vision-language models only" in capsys.readouterr().err


@pytest.mark.parametrize("encoder", ENCODERS)
def test_published_sizes(encoder):
    """RAE-dinov2-wReg-base-ViTXL-n08 and RAE-siglip2-base-p16-i256-ViTXL-n08: every tensor of the reference's full size
    has its place, by shape alone.
    """
    xl = dict(decoder_hidden_size=1152, decoder_num_hidden_layers=28, decoder_intermediate_size=4096)
    with torch.device("meta"):
        model = reference(**xl | ENCODERS[encoder] | {"encoder_input_size": 256 if encoder == "siglip2" else 224})
    numbers = {"encoder_mean": np.zeros(3), "encoder_std": np.ones(3)}
    networks, sizes = rae_config(dict(model.config) | {"_class_name": "AutoencoderRAE"}, numbers)
    assert networks == FaeConfig(features=768, channels=0, pixel_decoder=networks.pixel_decoder)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    rules, tree = table(networks, sizes, shapes), abstract_params(networks, sizes)
    wanted, faults = expected(rules, tree)
    assert not faults
    extra = {name for name in shapes if name.startswith("encoder.head.")}  # of SigLIP, which pools its features
    extra |= {"encoder.embeddings.mask_token", "encoder_mean", "encoder_std", "_latents_mean", "_latents_std"}
    assert wanted.keys() == shapes.keys() - extra
    count = sum(x.size for x in jax.tree.leaves(tree))
    assert count == sum(int(np.prod(shapes[name])) for name in wanted)


def refused(*args) -> str:
    with pytest.raises(WeightError) as error:
        import_rae(*args)
    return str(error.value)


def test_every_fault_at_once(folder):
    tensors, config = load_file(folder / FILE), json.loads((folder / "config.json").read_text())
    wrong = dict(tensors)
    del wrong["decoder.decoder_norm.weight"]
    wrong["decoder.decoder_pred.bias"] = np.zeros(5, np.float32)
    wrong["decoder.trainable_cls_token"] = np.full((1, 1, 48), np.nan, np.float32)
    wrong["decoder.head.weight"] = np.zeros(2, np.float32)
    message = refused(wrong, config)
    assert "(4 faults)" in message
    for part in (
        "missing tensor decoder.decoder_norm.weight, of pixel_decoder/norm/scale",
        "tensor decoder.decoder_pred.bias has shape (5,) where (192,) is expected",
        "tensor decoder.trainable_cls_token has 48 numbers that are not finite",
        "unexpected tensor decoder.head.weight (2,)",
    ):
        assert part in message
    del wrong["_latents_std"]
    assert "missing tensor _latents_std" in refused(wrong, config)
    odd = tensors | {"_latents_mean": np.zeros((32, 4, 4), np.float32)}
    assert "does not have 64 channels" in refused(odd, config)
    for change, part in (
        (
            {"encoder_type": "mae", "patch_size": None},
            "patch_size is missing; encoder_type = 'mae' is not supported, only",
        ),
        ({"decoder_num_attention_heads": 5}, "decoder_num_attention_heads does not divide decoder_hidden_size"),
        ({"encoder_input_size": 60}, "encoder_input_size = 60 must be a multiple of 1"),
        ({"_class_name": "AutoencoderKL"}, "names the class 'AutoencoderKL'; only AutoencoderRAE is known"),
    ):
        assert part in refused(tensors, config | change)
