"""A conversation that continues from its caches against one that is read again from its beginning."""

import builtins
import copy
from pathlib import Path

import numpy as np
import pytest
import tiny

from starflow2_jax.commands.chat import converse, parse
from starflow2_jax.data import tokenizer as tokenizers
from starflow2_jax.data.documents import DocumentError, Image, Text
from starflow2_jax.data.images import ImageReader, as_pillow
from starflow2_jax.errors import UserError
from starflow2_jax.sampling.chat import Chat
from starflow2_jax.sampling.engine import SampleOptions, Sampler
from starflow2_jax.sampling.events import End, Progress

N = tiny.CONFIG.tokens
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sampler(template: str | None = None) -> Sampler:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = template
    return Sampler(tiny.MODEL, tiny.params(), tokenizer, tiny.CODEC, max_positions=256)


def lengths(sampler: Sampler, document) -> int:
    return len(sampler.encoder(document, closed=False)["tokens"])


def state(session) -> np.ndarray:
    return np.asarray(session.rows.mean[0])


def test_a_turn_reads_only_what_is_new():
    """Two turns with a template, the first answer with an image, against reading the whole conversation."""
    model = sampler(TEMPLATE)
    options = SampleOptions(max_tokens=N + 2, image_first=True)
    chat = Chat(model, options, seed=3)
    asked = [Image(tiny.pixels(1)), Text("mirror it")]
    answer = chat.say(asked)
    assert any(isinstance(part, Image) for part in answer)
    computed = int(chat.session.computed[0])
    more = chat.added([*chat.turns, ("user", [Text("and now?")])])
    text, images = tokenizers.flat(more)
    assert images == [] and text == "<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    chat.session.read([more])
    assert chat.session.computed[0] == computed + lengths(model, more)
    turns = [("user", asked), ("assistant", answer), ("user", [Text("and now?")])]
    anew = model.session(options, [3])
    anew.read([tokenizers.chat(model.tokenizer, turns)])
    assert anew.computed == chat.session.computed
    np.testing.assert_allclose(state(chat.session), state(anew), atol=1e-4)


@pytest.mark.parametrize("written", [1, 3, N + 1])
def test_an_image_that_was_cut_off(written):
    """The caches keep nothing of an image that max_tokens cut off; an image that lacks only its end token gets it."""
    model = sampler()
    chat = Chat(model, SampleOptions(max_tokens=written, image_first=True, guidance=1.0), seed=1)
    answer = chat.say([Text("draw an eight")])
    assert len(answer) == (written == N + 1)
    chat.say([Text(" and now?")], SampleOptions(max_tokens=1, guidance=1.0, max_images=0, temperature=0))
    anew = model.session(SampleOptions(max_tokens=1, guidance=1.0, max_images=0, temperature=0), [1])
    anew.read([[Text("draw an eight"), *answer, Text(" and now?")]])
    anew.write()
    assert (np.asarray(anew.rows.caches.length)[0] == np.asarray(chat.session.rows.caches.length)[0]).all()
    assert anew.rows.token == chat.session.rows.token
    np.testing.assert_allclose(state(chat.session), state(anew), atol=1e-4)


def test_a_refused_turn_leaves_all_as_it_was():
    """An empty turn is refused also after an image that was cut off, however often."""
    chat, other = (
        Chat(sampler(), SampleOptions(max_tokens=3, image_first=True, guidance=1.0), seed=1) for _ in range(2)
    )
    for c in (chat, other):
        c.say([Text("draw an eight")])
    refused = ([Image(tiny.pixels(1, (8, 8)))], "", [], [Text("")], "a<|im_end|>", "draw " * 300)
    for said in (*refused, *refused):
        with pytest.raises(DocumentError):
            chat.say(said)
    with pytest.raises(UserError):
        chat.say("draw", SampleOptions(image_first=True, max_images=0, guidance=1.0))
    assert len(chat.turns) == 2
    for name in ("token", "in_image", "offset", "drawn"):
        np.testing.assert_array_equal(*(np.asarray(getattr(c.session.rows, name)) for c in (chat, other)))
    np.testing.assert_array_equal(*(np.asarray(c.session.rows.caches.length) for c in (chat, other)))
    for a, b in zip(
        *(c.say("and now?", SampleOptions(max_tokens=N + 4, guidance=1.0)) for c in (chat, other)), strict=True
    ):
        assert a.text == b.text if isinstance(a, Text) else (a.pixels == b.pixels).all()


def test_nothing_said_draws_nothing():
    """After an image that was cut off, with and without a template."""
    for template in (None, TEMPLATE):
        chat = Chat(sampler(template), SampleOptions(max_tokens=3, image_first=True))
        chat.say("draw an eight")
        for said in ("", [], [Text("")]):
            with pytest.raises(DocumentError, match="nothing was said"):
                chat.say(said, SampleOptions(max_tokens=N + 4, max_images=0))
    assert Chat(sampler(), SampleOptions(max_tokens=N + 1, image_first=True)).say("")  # an image of nothing said at all


def test_an_answer_told_as_it_comes():
    """A streamed answer equals that of `say`; a stream that is not read to its end ends the conversation."""
    options = SampleOptions(max_tokens=2 * N, image_first=True, guidance=1.0)
    said, told = (Chat(sampler(), options, seed=1) for _ in range(2))
    for turn in ("draw an eight", "and now?"):
        answer, events = said.say(turn), []
        for event in told.stream(turn):
            events.append(event)
            if isinstance(event, End):
                break  # nothing comes behind it
        assert any(isinstance(e, Progress) for e in events)
        for a, b in zip(answer, told.turns[-1][1], strict=True):
            assert a == b if isinstance(a, Text) else np.allclose(a.pixels, b.pixels, atol=1e-5)
    assert (said.session.computed == told.session.computed).all()
    next(told.stream("one more"))
    for _ in range(2):
        with pytest.raises(UserError, match="broken off"):
            told.say("one more")
    with pytest.raises(DocumentError, match="shorten"):
        said.say("draw " * 9000)
    assert said.say("one more")  # what is refused changes nothing


def test_refusals():
    with pytest.raises(ValueError, match="stop strings"):
        Chat(sampler(), SampleOptions(stop=("a",)))
    with pytest.raises(DocumentError, match="nothing was said"):
        Chat(sampler()).say([])
    chat = Chat(sampler(TEMPLATE.replace("{{ m.role }}", "{{ messages | length }}")), SampleOptions(max_tokens=2))
    chat.say([Text("draw")])
    with pytest.raises(DocumentError, match="changes earlier turns"):
        chat.say([Text("draw")])
    with pytest.raises(DocumentError, match="template refuses this conversation: no users"):
        Chat(sampler(TEMPLATE + "{{ raise_exception('no users') }}")).say("draw")
    document = [Text("a"), Image(tiny.pixels(1)), Image(tiny.pixels(2)), Text("b")]
    assert tokenizers.unflat(*tokenizers.flat(document)) == document


def test_terminal(tmp_path, monkeypatch, capsys):
    as_pillow(tiny.pixels(1)).save(tmp_path / "a.png")
    a = str(tmp_path / "a.png")
    assert [type(p) for p in parse(f"add {a} and /image {a}", ImageReader(1))] == [Text, Image, Text, Image]
    assert parse("draw a.png", ImageReader(1)) == [Text("draw a.png")]
    (spaced := tmp_path / "a scan.png").write_bytes(Path(a).read_bytes())
    for line in (f'say "it is" /image "{spaced}" read it', f'say "it is" "{spaced}" read it'):
        before, image, after = parse(line, ImageReader(1), "vit")
        assert (before.text, image.via, after.text) == ('say "it is"', "vit", "read it")
    lines = iter(["", "/image missing.png", f"{a} mirror it", KeyboardInterrupt])

    def given(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", given)
    converse(Chat(sampler(), SampleOptions(max_tokens=N + 2, image_first=True)), tmp_path / "out")
    shown = capsys.readouterr().out
    assert "! the image missing.png does not exist" in shown and f"[{tmp_path / 'out' / '000.png'}]" in shown
    before = (tmp_path / "out" / "000.png").read_bytes()
    lines = iter(["draw", KeyboardInterrupt])
    converse(Chat(sampler(), SampleOptions(max_tokens=N + 2, image_first=True), seed=1), tmp_path / "out")
    assert f"[{tmp_path / 'out' / '001.png'}]" in capsys.readouterr().out  # another conversation's images stay
    assert (tmp_path / "out" / "000.png").read_bytes() == before


STRINGS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PRINTS = STRINGS.replace("m.role + '\\n' + m.content +", "m.role ~ '\\n' ~ m.content ~")
BOTH = TEMPLATE.replace(
    "{% for c in m.content %}", "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
).replace("{% endif %}{% endfor %}<|im_end|>", "{% endif %}{% endfor %}{% endif %}<|im_end|>")
TEXT_ONLY = "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ c.text }}{% endfor %}\n{% endfor %}"


@pytest.mark.parametrize("template", [TEMPLATE, STRINGS, PRINTS, BOTH])
def test_a_template_gets_the_content_that_it_was_written_for(template):
    """Templates for strings, which fail on lists or print them as Python does, and templates for lists."""
    tokenizer = sampler(template).tokenizer
    image = Image(tiny.pixels(1))
    said = [("system", [Text("be brief")]), ("user", [Text("mirror "), image, Text("'it'")])]
    document = tokenizers.chat(tokenizer, said)
    text, images = tokenizers.flat(document)
    assert images == [image]
    assert text == (
        f"<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nmirror {tokenizers.IMAGE_MARK}'it'<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    [alone] = tokenizers.chat(tokenizer, [("user", [Text("hello")])])
    assert alone.text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_for_lists_of_text_alone():
    tokenizer = sampler(TEXT_ONLY).tokenizer
    assert tokenizers.chat(tokenizer, [("user", [Text("hello")])]) == [Text("user: hello")]
    with pytest.raises(DocumentError, match="must place each image once"):
        tokenizers.chat(tokenizer, [("user", [Image(tiny.pixels(1)), Text("hello")])])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no\nsystem message') }}",
        "{% for m in messages %}{{ m.content.text.more }}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{% for",
        "{{ messages[99].content }}",
        "{% include 'other' %}",
        {"tool_use": "{{ 1 }}"},
    ],
)
def test_any_error_of_a_template_is_one_sentence(template):
    tokenizer = sampler(template).tokenizer
    with pytest.raises(DocumentError, match="chat template refuses this conversation") as caught:
        tokenizers.chat(tokenizer, [("user", [Text("hello")])])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
