"""Chat templates get what was said in the form that they were written for: a list of parts, or one string."""

import copy
import json

import pytest
import tiny
from refused import refused

from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.tokenizer import IMAGE_MARK, chat, flat, load, train

OPEN, CLOSE = (
    "{% for m in messages %}<{{ m.role }}>",
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
)
PART = "{% if c.type == 'image' %}" + IMAGE_MARK + "{% else %}{{ c.text }}{% endif %}"
LIST = OPEN + "{% for c in m.content %}" + PART + "{% endfor %}" + CLOSE
EITHER = (
    OPEN
    + "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    + PART
    + "{% endfor %}{% endif %}"
    + CLOSE
)
PRINTED = OPEN + "{{ m.content }}" + CLOSE
AS_JSON = OPEN + "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | tojson }}{% endif %}" + CLOSE
JOINED = OPEN + "{{ m.role + m.content }}" + CLOSE
STRIPPED = OPEN + "{{ m.content.strip() }}" + CLOSE
STRINGS_ONLY = OPEN + "{% if m.content is string %}{{ m.content }}{% endif %}" + CLOSE
FIRST_PART = (
    OPEN + "{% if m.content is string %}{{ m.content[:1] }}{% else %}{{ m.content[0].text }}{% endif %}" + CLOSE
)
SEEN = Image(tiny.pixels(0))
WORDS = [("system", [Text("be brief, ß")]), ("user", [Text("what is "), Text("this?")])]


def tokenizer(template: object):
    found = copy.deepcopy(tiny.tokenizer())
    found.chat_template = template
    return found


@pytest.mark.parametrize(
    "template", [LIST, EITHER, PRINTED, AS_JSON, STRIPPED, STRINGS_ONLY, {"default": PRINTED, "tools": LIST}]
)
def test_words(template):
    text, _ = flat(chat(tokenizer(template), WORDS))
    assert text == "<system>be brief, ß<user>what is this?<assistant>"


@pytest.mark.parametrize("template", [LIST, EITHER, PRINTED, AS_JSON, STRIPPED, STRINGS_ONLY])
def test_images(template):
    document = chat(tokenizer(template), [("user", [Text("one "), SEEN, Text(" two")])])
    assert flat(document)[0] == f"<user>one {IMAGE_MARK} two<assistant>" and document[1] is SEEN


def test_a_template_that_joins_strings():
    assert flat(chat(tokenizer(JOINED), WORDS))[0] == "<system>systembe brief, ß<user>userwhat is this?<assistant>"


def test_a_template_that_leaves_words_out():
    """As some do with the thoughts of earlier answers: the first form that it takes is used."""
    assert flat(chat(tokenizer(FIRST_PART), [("user", [Text("one"), Text("two")])]))[0] == "<user>one<assistant>"


@pytest.mark.parametrize(
    "template, saying",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ missing.attribute }}", "is undefined"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{% if %}", "Expected an expression"),
        ({"tools": LIST}, "default"),
        ("{{ raise_exception('long ' * 1000) }}", "long"),
    ],
)
def test_templates_that_fail(template, saying):
    refused(DocumentError, chat, tokenizer(template), WORDS, saying=("chat template", saying))


@pytest.mark.parametrize("file", ["processor_config.json", "chat_template.json"])
def test_a_template_in_a_file_of_the_processor(tmp_path, file):
    tiny.tokenizer().save_pretrained(tmp_path)
    assert not load(tmp_path).chat_template
    (tmp_path / file).write_text(json.dumps({"chat_template": LIST}), encoding="utf-8-sig")
    assert load(tmp_path).chat_template == LIST
    named = [{"name": "default", "template": LIST}, {"name": "tools", "template": PRINTED}]
    (tmp_path / file).write_text(json.dumps({"chat_template": named}))
    assert load(tmp_path).chat_template == {"default": LIST, "tools": PRINTED}
    tokenizer(EITHER).save_pretrained(tmp_path)
    assert load(tmp_path).chat_template == EITHER


def test_files_with_a_byte_order_mark(tmp_path):
    """In each file that `transformers` reads, and in a template of another name, which lies in a folder below."""
    tokenizer({"default": LIST, "tools": PRINTED}).save_pretrained(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".jinja"} and len(files) == 4
    for path in files:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load(tmp_path).chat_template == {"default": LIST, "tools": PRINTED}
    assert flat(chat(load(tmp_path), WORDS))[0] == "<system>be brief, ß<user>what is this?<assistant>"
    assert all(path.read_bytes().startswith(b"\xef\xbb\xbf") for path in files)


@pytest.mark.parametrize("content", [b"", b"null", b'"x"', b"[" * 100_000, b"9" * 5000, b"\xff\xfe[\0"])
def test_a_tokenizer_that_cannot_be_read(tmp_path, content):
    tiny.tokenizer().save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError) as error:
            load(tmp_path)
        assert str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300
        (tmp_path / name).write_bytes(kept)


def test_a_vocabulary_may_be_larger_than_any_text_needs():
    """2**31 - 1 makes the trainer of `tokenizers` abort the process, because it reserves memory for so many tokens."""
    few, many = (train(["a seven", "a two"], size) for size in (5000, 2**31 - 1))
    assert few.get_vocab() == many.get_vocab() and len(few) < 300
