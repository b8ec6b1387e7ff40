"""Text files are UTF-8 whatever the locale: what the package reads, what it writes, and what a user names or types."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from refused import refused

from starflow2_jax import text_files
from starflow2_jax.commands.chat import converse
from starflow2_jax.errors import UserError
from starflow2_jax.text_files import read_json_file, read_lines, read_text_file

PACKAGE = Path(__file__).parents[1] / "starflow2_jax"
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that read or write text in the locale's encoding."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        modes = [a.value for a in (*call.args, *keywords.values()) if isinstance(a, ast.Constant)]
        opens = name == "open" and (
            isinstance(call.func, ast.Name) or any(mode in ("r", "w", "a", "x") for mode in modes)
        )
        opens = opens and not any("b" in mode for mode in modes if isinstance(mode, str))
        runs = name in ("run", "Popen", "check_output") and "text" in keywords
        if "encoding" not in keywords and (opens or runs or name in ("read_text", "write_text")):
            yield call.lineno


def test_all_text_files_are_opened_as_utf8():
    examples = "open(p)\nPath(p).read_text()\np.open('w')\nrun(c, text=True)\nopen(p, 'rb')"
    assert [*without_encoding(ast.parse(examples))] == [1, 2, 3, 4]
    trees = {str(file.relative_to(PACKAGE)): ast.parse(file.read_bytes()) for file in PACKAGE.rglob("*.py")}
    assert not {file: lines for file, tree in trees.items() if (lines := [*without_encoding(tree)])}


@pytest.mark.parametrize("locale", [ASCII, {"LC_ALL": "C"}, {"LC_ALL": "en_US.ISO-8859-1"}])
def test_the_command_line_takes_any_locale(tmp_path, locale):
    """Arguments, file names, a file's text and what is printed."""
    file = tmp_path / "Stra\u00dfe \u4e03.py"
    file.write_text("import sys\nprint('\u4e03', *sys.argv[-1:])\n", encoding="utf-8")
    command = [sys.executable, "-m", "starflow2_jax.cli", "config", "--import", str(file), "--config", "gr\u00fcn"]
    kept = {name: value for name, value in os.environ.items() if name not in ("LANG", "LC_ALL", "PYTHONUTF8")}
    done = subprocess.run([part.encode() for part in command], env=kept | locale, capture_output=True)
    assert done.returncode == 2 and done.stdout.decode() == "\u4e03 gr\u00fcn\n"
    assert "gr\u00fcn" in done.stderr.decode() and "Traceback" not in done.stderr.decode()


def test_text_is_read_with_and_without_a_byte_order_mark(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfa \xc3\x9f\xe2\x80\xa8b\r\n\r\nc")
    assert read_text_file(tmp_path / "text") == "a \u00df\u2028b\n\nc"
    assert read_lines(tmp_path / "text") == ["a \u00df\u2028b", "c"]
    (tmp_path / "json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00 \\\\ud83d"}')
    assert read_json_file(tmp_path / "json") == {"a": "\U0001f600 \\ud83d"}


@pytest.mark.parametrize(
    "content, saying",
    [
        (b"\xff\xfea\0", ("byte 0 is not UTF-8", "save it as UTF-8")),
        (b'{"a":\n 1,}', ("not valid JSON", "line 2, column 4")),
        (b'["a",\n\n "\\ud83d"]', (r"half of a character (the lone surrogate \ud83d: line 3, column 3)",)),
        (b'["\\ude00\\ud83d"]', (r"surrogate \ude00: line 1, column 3)",)),
        (b"[" * 100_000, ("nested too deeply",)),
        (b"9" * 5000, ("thousands of digits",)),
        (b"", ("not valid JSON", "line 1, column 1")),
    ],
)
def test_text_that_cannot_be_used(tmp_path, content, saying):
    (tmp_path / "file").write_bytes(content)
    refused(UserError, read_json_file, tmp_path / "file", saying=(str(tmp_path / "file"), *saying))


@pytest.mark.parametrize("path", ["none", "", ".", "a\0b", "data:" + "x" * 20_000])
def test_files_that_cannot_be_opened(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    refused(UserError, read_text_file, path, saying=())


def test_a_line_of_a_chat_that_is_no_text(tmp_path, monkeypatch, capsys):
    lines = iter(["nice \udcff", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    converse(SimpleNamespace(sampler=SimpleNamespace(codec=tiny.CODEC)), tmp_path)
    assert "! the line is not valid UTF-8" in capsys.readouterr().out


def test_a_huge_file(tmp_path, monkeypatch):
    """A sparse file of a terabyte is not read at all, and an endless device not to its end."""
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 10**12)
    refused(UserError, read_text_file, tmp_path / "huge", saying=("huge is larger than 2000000000 bytes",))
    monkeypatch.setattr(text_files, "LARGEST", 10**6)
    refused(UserError, read_text_file, "/dev/zero", saying=("/dev/zero is larger than 1000000 bytes",))
