"""Conversations of LLaVA's, OpenAI's and ms-swift's form: what is trained equals what a chat reads and writes."""

import copy

import numpy as np
import pytest
import tiny
from etils import epath
from refused import refused

from starflow2_jax.data.documents import DocumentError, Image, Speaker, Text
from starflow2_jax.data.images import ImageReader, write_image
from starflow2_jax.data.preparation import Preparation, SourceConfig
from starflow2_jax.data.rows import RowOptions, from_conversation, from_row
from starflow2_jax.data.tokenizer import IMAGE_MARK, chat, flat

QWEN = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif "
    "%}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}" + IMAGE_MARK + "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNMARKED = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def tokenizer(template: str = QWEN):
    found = copy.deepcopy(tiny.tokenizer())
    found.chat_template = template
    return found


def prepared(row: dict, folder, template: str = QWEN, **options):
    config = SourceConfig(path="", text_drop=0.0, image_drop=0.0, both_drop=0.0, **options)
    draft = from_conversation(row, epath.Path(folder))
    return Preparation(config, ImageReader(1), tokenizer=tokenizer(template))(draft, np.random.default_rng(0))


def two_turns(folder) -> dict:
    name = write_image(folder / "a", tiny.pixels(0)).name
    turns = [("human", "<image>\nWhat is it? "), ("gpt", "A zebra."), ("human", "Sure?"), ("gpt", "Yes.")]
    return {"id": "1", "image": name, "conversations": [{"from": who, "value": said} for who, said in turns]}


def test_a_conversation_is_what_chat_reads_and_the_model_writes(tmp_path):
    document = prepared(two_turns(tmp_path), tmp_path)
    image = next(part for part in document if isinstance(part, Image))
    first = chat(tokenizer(), [("user", [image, Text("What is it?")])])
    second = chat(
        tokenizer(),
        [("user", [image, Text("What is it?")]), ("assistant", [Text("A zebra.")]), ("user", [Text("Sure?")])],
    )
    text, _ = flat(document)
    assert text == flat(second)[0] + "Yes." and text.startswith(flat(first)[0] + "A zebra.<|im_end|>\n")
    predicted = [part.text for part in document if isinstance(part, Text) and part.predict]
    assert predicted == ["A zebra.", "<|im_end|>", "Yes."]
    assert "Be kind." in text and not image.generate


def test_the_model_ends_each_answer_itself(tmp_path):
    """The tokens that are predicted: both answers, each with its end."""
    encoder = tiny.encoder()
    features = encoder(prepared(two_turns(tmp_path), tmp_path))
    predicted = features["tokens"][features["text_weight"] > 0].tolist()
    end = [encoder.ids.end]
    assert predicted == encoder.tokenize("A zebra.") + end + encoder.tokenize("Yes.") + end


def test_a_template_that_does_not_mark_ends(tmp_path):
    text, _ = flat(prepared({"messages": two_messages(), "images": [], "image": ""}, tmp_path, UNMARKED))
    assert text == "<user>one<assistant>two<|im_end|><user>three<assistant>four"


def two_messages() -> list[dict]:
    said = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"), ("user", "unanswered")]
    return [{"role": role, "content": text} for role, text in said]


@pytest.mark.parametrize("template", [QWEN, UNMARKED])
def test_words_after_the_last_answer_are_left_out(tmp_path, template):
    assert "unanswered" not in flat(prepared({"messages": two_messages()}, tmp_path, template))[0]


def test_messages_with_parts_and_with_marks(tmp_path):
    for name in "ab":
        write_image(tmp_path / name, tiny.pixels(ord(name)))
    parts = [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "mirror it"}]
    user = {"role": "user", "content": parts}
    rows = [
        {
            "messages": [user, {"role": "assistant", "content": "Done: <image>"}],
            "images": [str(tmp_path / "b.png")],
        },
        {
            "messages": [
                {"role": "user", "content": "<image>mirror it"},
                {"role": "assistant", "content": "Done: <image>"},
            ],
            "images": [{"path": "a.png"}, {"bytes": (tmp_path / "b.png").read_bytes(), "path": None}],
        },
    ]
    documents = [prepared(row, tmp_path) for row in rows]
    assert flat(documents[0])[0] == flat(documents[1])[0]
    for document in documents:
        seen, made = (part for part in document if isinstance(part, Image))
        assert not seen.generate and made.generate
        for image, name in ((seen, "a"), (made, "b")):
            levels = np.clip(np.round((tiny.pixels(ord(name)) + 1) * 127.5), 0, 255)
            np.testing.assert_allclose(image.pixels, levels / 127.5 - 1, atol=1e-6)
    assert [p for p in prepared(rows[0], tmp_path, via="vit") if isinstance(p, Image)][0].via == "vit"


def test_no_special_token_comes_from_a_text(tmp_path):
    row = {"messages": [{"role": "user", "content": "a<|im_end|>b"}, {"role": "assistant", "content": "c"}]}
    refused(DocumentError, prepared, row, tmp_path, saying=("<|im_end|>", "chat template"))


@pytest.mark.parametrize(
    "row, saying",
    [
        ({"conversations": "hello"}, ("'conversations'", "list of turns")),
        ({"messages": []}, ("'messages'",)),
        ({"messages": ["hello"]}, ("turn 0", "'hello'")),
        ({"messages": [{"role": "tool", "content": "x"}]}, ("turn 0", "'tool'", "gpt")),
        ({"messages": [{"role": "user", "content": 3}]}, ("turn 0", "3")),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, ("turn 0", "video")),
        ({"messages": [{"role": "user", "content": "<image>"}]}, ("turn 0", "no picture")),
        ({"messages": [{"role": "user", "content": "x"}], "image": "a.png"}, ("1 images", "0 places")),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": [7]}, ("path", "7")),
        (
            {"messages": [{"role": "user", "content": "<image>"}], "images": ["http://a.b/c.png"]},
            ("http://a.b/c.png", "download"),
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, ("no turn of the assistant",)),
    ],
)
def test_conversations_that_are_refused(tmp_path, row, saying):
    refused(DocumentError, prepared, row, tmp_path, saying=saying)


def test_a_tokenizer_without_a_template(tmp_path):
    refused(DocumentError, prepared, two_turns(tmp_path), tmp_path, None, saying=("no chat template",))


def test_turns_are_marked_in_a_draft(tmp_path):
    draft = from_conversation({"messages": two_messages()[:2]}, epath.Path(tmp_path))
    assert draft == [Speaker("user"), Text("one"), Speaker("assistant"), Text("two", predict=True)]


def test_a_caption_that_looks_like_json(tmp_path):
    for caption in ("{not JSON", '{"a": ' * 100_000):
        words, _ = from_row({"caption": caption, "image": "a.png"}, RowOptions(), epath.Path(tmp_path))
        assert words.texts == (caption,)
