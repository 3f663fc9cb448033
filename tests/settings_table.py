"""Writes docs/settings.md from settings.py: `python tests/settings_table.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import SecretStr  # noqa: E402

from settings import ENV_FILE_NAME, HUB_VARIABLES, LEAST, PREFIX, SECRETS, Settings  # noqa: E402

PAGE = ROOT / "docs" / "settings.md"
TYPES = {str: "text", int: "integer", float: "number", bool: "`true` or `false`", Path: "path", SecretStr: "secret"}
SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
HEAD = f"""# Settings

Written by `tests/settings_table.py` from `settings.py`; a test compares them.

Every setting is a variable, in the environment or in `.env` in the project's folder, and the environment wins. `.env.example`
has all of them with their defaults, to copy from. An unknown name, one in lower case, or a value that is not allowed stops the start with a message
that says what is. Units are in the names: `_S` seconds, `_MIB`, `_BYTES`, `_PIXELS`, `_TOKENS`. An empty value is none.

A change takes effect with `./start.sh --restart`; the checker reads the settings in each run. What already runs is not stopped by
a mistake in `.env`: the page keeps what it read, and the checker goes on with the last valid file.

`{ENV_FILE_NAME}`, in the environment only, names another file than `.env`. Each secret can also be given as the path of a file that
holds it, in a variable with `_FILE` at its end (`{PREFIX}API_KEY_FILE`). The variables of the hubs' own clients are read from `.env`
too: {", ".join(f"`{name}`" for name in HUB_VARIABLES)}.
"""


def page() -> str:
    parts = [HEAD]
    for title, text, names in sections():
        rows = [f"| `{PREFIX}{name.upper()}` | {allowed(name)} | {default(name)} | {meaning(name)} |" for name in names]
        about = f"{text}\n\n" if text else ""
        parts.append(f"\n## {title}\n\n{about}| name | value | default | meaning |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n")
    return "".join(parts)


def sections() -> list[tuple[str, str, list[str]]]:
    """(title, what else its comment says, the settings below it) of each comment in the class."""
    source = (ROOT / "settings.py").read_text(encoding="utf-8")
    body = source[source.index("class Settings(") :].split("    @field_validator", 1)[0]
    found: list[tuple[str, str, list[str]]] = []
    for line in body.splitlines():
        if comment := re.fullmatch(r"    # (.+?)\.(?: (.+))?", line):
            found.append((comment[1], comment[2] or "", []))
        elif (field := re.match(r"    (\w+): ", line)) and field[1] in Settings.model_fields:
            found[-1][2].append(field[1])
    return found


def allowed(name: str) -> str:
    field = Settings.model_fields[name]
    kinds = [kind for kind in (get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    bounds = [f"{sign} {value:g}" for limit in field.metadata for key, sign in SIGNS.items() if (value := getattr(limit, key, None)) is not None]
    if name in LEAST:
        bounds = [f"0 or >= {LEAST[name]}"]
    if kinds[0] is SecretStr:
        assert name.upper() in SECRETS, f"{name} holds a secret, and SECRETS does not name it"
    return " ".join([TYPES[kinds[0]], *bounds])


def default(name: str) -> str:
    value: Any = Settings.model_fields[name].default
    if value is None or value == "":
        return "none"
    if isinstance(value, Path):
        value = value.relative_to(ROOT)
    if isinstance(value, bool):
        value = str(value).lower()
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def meaning(name: str) -> str:
    description = Settings.model_fields[name].description
    assert description, f"{name} has no description in settings.py"
    return description


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
