"""Chat templates get what was said in the form that they were written for: a list of parts, or one string."""

import copy
import json

import pytest
import tiny
from refused import refused

from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.tokenizer import IMAGE_MARK, chat, flat, load

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
    tokenizer(EITHER).save_pretrained(tmp_path)
    assert load(tmp_path).chat_template == EITHER
