"""What is wrong with a line that is no TOML, and what to write instead.

The usual mistakes are Python or YAML habits: ``True``, text without quotes, ``key: value``, a comma at the
end. Each gets the line to write; anything else gets tomllib's own words.
"""

from __future__ import annotations

import json
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from typing import Any

from nbqlora.core.errors import Problem

_LINE = re.compile(
    r"""^\s*(?P<key>[A-Za-z0-9_.-]+|"[^"]*"|'[^']*')\s*(?P<sign>==|=|:)\s*(?P<value>.*)$""",
    re.DOTALL,
)
_QUOTED = re.compile(r"""\"\"\".*?\"\"\"|'''.*?'''|"(?:\\.|[^"\\\n])*"|'[^'\n]*'""", re.DOTALL)
_QUOTED_OR_COMMENT = re.compile(rf"({_QUOTED.pattern})|#[^\n]*", re.DOTALL)
_SWITCHES = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
_NOTHING = ("none", "null", "nil")
_WORD = re.compile(r"(?<![\w.+-])[A-Za-z_$~][\w.$/~-]*(?!\s*[=\w(])")
_WHERE = re.compile(r"\s*\(at (line \d+, column \d+|end of document)\)")
_CLOSING = {'"""': '"""', "'''": "'''", "[": "]", "{": "}"}


def explain(text: str, error: str, unclosed: str, objects: Mapping[str, Any]) -> Problem:
    """A problem without its line.

    Args:
        text: the statement.
        error: what tomllib said of it.
        unclosed: the bracket or triple quotes that it never closes, "" for none.
        objects: names of the notebook that a bare word may stand for.
    """
    found = _LINE.match(text)
    shown = text.strip().split("\n")[0][:40]
    odd = _invisible(_QUOTED.sub("", text))
    if odd:
        key = found.group("key") if found else "".join(c for c in shown if c.isprintable())
        return Problem(key=key, message=f"holds an invisible character, {odd}", hint="type the line again")
    if text.lstrip().startswith("["):
        return Problem(key=shown, message="is no table's header", hint="write [trl] or [peft] alone on a line")
    if not found:
        message, hint = _no_option(shown)
        return Problem(key=shown, message=message, hint=hint)
    key, value = found.group("key").strip("\"'"), _bare(found.group("value"))
    if found.group("sign") != "=":
        message = f"expected one = between key and value, got {found.group('sign')}"
        return Problem(key=key, message=message, hint=f"write {key} = {_as_toml(value)}")
    message, hint = _unclosed(unclosed) if unclosed else _about(key, value, objects)
    generic = _WHERE.sub("", error)
    return Problem(key=key, message=message or f"not TOML: {generic}", hint=hint)


def _invisible(text: str) -> str:
    odd = (c for c in text if c not in " \t\n" and unicodedata.category(c) in ("Zs", "Zl", "Zp", "Cf", "Cc"))
    return next((f"U+{ord(c):04X}" for c in odd), "")


def _no_option(line: str) -> tuple[str, str]:
    if line[:1] in ("!", "%"):
        return "is no option", "commands go into a cell of their own"
    if line.startswith(("//", "--", ";", "<!--", "/*")):
        return "is no comment here", "a comment begins with #"
    return "expected key = value", 'for example model = "demo"'


def _unclosed(bracket: str) -> tuple[str, str]:
    kind = {"[": "list", "{": "table"}.get(bracket, "text")
    return f"the {kind} is never closed", f"add {_CLOSING[bracket]} at its end"


def _bare(value: str) -> str:
    """The value without its comments."""
    return _QUOTED_OR_COMMENT.sub(lambda found: found.group(1) or "", value).strip()


def _about(key: str, value: str, objects: Mapping[str, Any]) -> tuple[str, str]:
    """What is wrong with a value and what to do; ``("", "")`` when only tomllib can say."""
    rules = (
        (r"", "has no value", f"write {key} = value, or leave the line out"),
        (r"[fFrRbBuU]{1,2}[\"'].*", "is Python, which is not run here", "leave out the letter before the quote"),
        (r".*[“”‘’„].*", "has curly quotes", "use straight ones, \" or '"),
        (r"\"[^\"]*\\.*\"", 'in "...", a backslash begins a special character', f"write {key} = {_as_toml(value)}"),
        (r"\"[^\"]*|'[^']*|\"[^\"]*'|'[^']*\"", "the quote is never closed", f"end the text with {value[:1]}"),
        (r".*\S\s*,", "ends with a comma", f"write {key} = {_as_toml(value)}"),
        (r"[+-]?\.\d.*", "a number starts with a digit", f"write {key} = {value.replace('.', '0.', 1)}"),
        (r"\d+\.", "a number ends with a digit", f"write {key} = {value}0"),
        (r"\d+\.[eE][+-]?\d+", "a number has a digit behind its point", f"write {key} = {value.replace('.', '.0', 1)}"),
        (r"0\d+", "a number does not start with 0", f"write {key} = {value.lstrip('0')}"),
        (r"\d{1,3}(,\d{3})+", "a number has no commas", f"write {key} = {value.replace(',', '')}"),
        (r"[\d.]+(\s*([kKmMgGtT]i?[bB]?|%|min|s|h)|\s+[A-Za-z]+)", "a number has no unit", "write the number alone"),
        (r"\[\s*\{.*[\"']\s*:.*", "a list of dicts is Python", f'name it in a cell above, and write {key} = "$name"'),
        (r"\{.*\n.*", "a table in braces stands on one line", f"write {key} = {_as_toml(' '.join(value.split()))}"),
        (r"\{.*[\"\w]\s*:.*", "a table reads {name = value}", f"write {key} = {_as_toml(value)}"),
    )  # fmt: skip
    for pattern, message, hint in rules:
        if re.fullmatch(pattern, value, re.DOTALL):
            return message, hint
    return _about_words(key, value, objects)


def _about_words(key: str, value: str, objects: Mapping[str, Any]) -> tuple[str, str]:
    outside = _QUOTED.sub('""', value)
    second = re.search(r"\s([\w.]+)\s*=\s*\S", outside)
    if second and not outside.startswith("{"):
        return "one key a line", f"begin a new line before {second.group(1)}"
    if re.search(r"\w[(\[]|\d\s*(\*\*?|//?|\+)\s*\d|\s[*+]\s", outside):
        return "is Python, which is not run here", 'write the value itself, or "$name" for an object of the notebook'
    if re.match(r"""\"\"\s*[^\s,"]""", outside):
        return "something stands behind the text", "put it into the quotes; a comment begins with #"
    words = _WORD.findall(outside)
    wrong = next((w for w in words if w not in ("true", "false", "inf", "nan")), "")
    if wrong.lower() in _SWITCHES:
        return "TOML has only true and false", f"write {_SWITCHES[wrong.lower()]} instead of {wrong}"
    if wrong.lower() in _NOTHING:
        whole = wrong == value
        return f"TOML has no {wrong}", "leave the line out" if whole else "leave it out"
    if not wrong and not re.fullmatch(r"[\w./~$][\w./~$ -]*[A-Za-z][\w./~$ -]*", value):
        return "", ""
    if wrong in objects and wrong == value:
        return "text needs quotes", f'write {key} = "${wrong}" for the object of this notebook'
    if '""' in outside or outside[:1] in ("[", "{"):
        return "text needs quotes", f'write "{wrong}" instead of {wrong}'
    return "text needs quotes", f"write {key} = {_as_toml(value)}"


def _as_toml(value: str) -> str:
    """How a value is to be written, as far as can be told."""
    value = value.strip().rstrip(",").strip()
    value = re.sub(r"\bTrue\b", "true", re.sub(r"\bFalse\b", "false", value))
    if value.startswith("{"):
        value = re.sub(r"""["']?(\w+)["']?\s*:\s*""", r"\1 = ", value)
    try:
        tomllib.loads(f"x = {value}")
    except (ValueError, RecursionError):
        inner = value.strip("\"'")
        if re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", inner):
            return json.dumps(re.split(r"\s*,\s*", inner))
        return f"'{inner}'" if "\\" in inner else json.dumps(inner, ensure_ascii=False)
    return value
