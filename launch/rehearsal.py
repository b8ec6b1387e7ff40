"""The parts of rehearsal.sh that are Python: the files that a rehearsal begins with, a request, and a table of
plans.
"""

import base64
import json
import sys
import urllib.request
from pathlib import Path

# The sizes of the experiments' --runlocal: fae_dinov2_g's encoder, and the vision-language model of starflow2_7b_*.
DINO = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=3, use_swiglu_ffn=True, image_size=56)
TEXT = dict(
    vocab_size=416,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
)
VISION = dict(
    depth=2,
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    out_hidden_size=32,
    patch_size=2,
    window_size=8,
    fullatt_block_indexes=[1],
)
PROCESSOR = dict(
    patch_size=2, merge_size=2, min_pixels=64, max_pixels=4096, image_mean=[0.5, 0.5, 0.5], image_std=[0.3, 0.3, 0.3]
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PICTURES = 48


def inputs(folder: Path) -> None:
    """Write random models as `transformers` saves them, dinov2/ and qwen/, and pictures with captions.

    captions.jsonl: captions, then pictures to draw. questions.jsonl: pictures, then captions to write. documents.jsonl:
    both.
    """
    import torch
    from transformers import Dinov2Config, Dinov2Model, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from starflow2_jax.data import tokenizer
    from starflow2_jax.data.images import as_pillow
    from starflow2_jax.data.scenes.source import SceneOptions, Scenes

    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**DINO)).save_pretrained(folder / "dinov2")
    qwen = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION))
    qwen.to(torch.bfloat16).save_pretrained(folder / "qwen")
    (folder / "qwen/preprocessor_config.json").write_text(json.dumps(PROCESSOR))

    scenes, captions, questions = Scenes("scenes", SceneOptions(size=64)), [], []
    (folder / "pictures").mkdir()
    for i in range(PICTURES):
        caption, picture = scenes[i]
        name = f"pictures/{i:03d}.png"
        as_pillow(picture.pixels).save(folder / name)
        captions.append([{"text": caption.text}, {"image": name, "generate": True}])
        questions.append([{"image": name}, {"text": caption.text, "predict": True}])
    for name, documents in dict(captions=captions, questions=questions, documents=captions + questions).items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    trained = tokenizer.train([parts[0]["text"] for parts in captions], TEXT["vocab_size"])
    trained.chat_template = TEMPLATE
    trained.save_pretrained(folder / "qwen")


def ask(address: str, file: Path) -> None:
    """Ask a server to draw, and save the picture of its answer."""
    body = dict(
        model="", messages=[dict(role="user", content="a dog")], max_tokens=40, max_images=1, image_first=True, seed=0
    )
    with urllib.request.urlopen(f"{address}/v1/models") as models:
        body["model"] = json.load(models)["data"][0]["id"]
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        [picture] = json.load(answer)["choices"][0]["message"]["images"]
    file.write_bytes(base64.b64decode(picture["image_url"]["url"].split(",")[1]))


def table(folder: Path) -> None:
    """Print days and chip-hours of each stage, by the plans STAGE.json in a folder."""
    print(f"{'stage':32}{'steps':>10}{'s a step':>10}{'days':>9}{'chip-hours':>13}{'MFU':>7}  memory of a chip, GiB")
    for file in sorted(folder.glob("*.json")):
        [plan] = json.loads(file.read_text())
        steps, used = plan["steps"], f"{plan['peak'] / 2**30:.1f} of {plan['memory'] / 2**30:.0f}"
        if not plan["fits"]:
            print(f"{file.stem:32}{steps:10,}  does not fit: {used}")
            continue
        hours = plan["seconds"] * steps / 3600
        print(
            f"{file.stem:32}{steps:10,}{plan['seconds']:10.3f}{hours / 24:9.1f}{hours * plan['chips']:13,.0f}"
            f"{plan['mfu']:7.1%}  {used}"
        )


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "ask":
        ask(arguments[0], Path(arguments[1]))
    else:
        {"inputs": inputs, "table": table}[command](Path(arguments[0]))
