"""Makes the secrets that close the service, on first start: writes them to `.env`, mode 0600, and prints them once.

    python deploy/keys.py API_KEY WEB_TOKEN

A secret given by the environment, by `.env` or as GLM_<NAME>_FILE is left alone. Every other line of the
file stays as it is. Run after `python settings.py` has accepted the settings.
"""

from __future__ import annotations

import os
import re
import secrets
import sys
import tempfile
from pathlib import Path

from dotenv import dotenv_values

ENV_FILE = Path(__file__).resolve().parent.parent / ".env"
WHAT = {"API_KEY": "key for programs (Authorization: Bearer ...)", "WEB_TOKEN": "token for the page",
        "PROBE_TOKEN": "marks the checker's own questions"}


def missing(names: list[str], given: dict[str, str | None]) -> list[str]:
    return [name for name in names if not given.get(f"GLM_{name}") and not given.get(f"GLM_{name}_FILE")]


def with_secret(text: str, name: str, value: str) -> str:
    """The file's text with one more secret: in place of an empty line for it, or at the end."""
    line = f"{name}={value}"
    empty = re.compile(rf"^[ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*(?:\"\"|'')?[ \t]*$", re.MULTILINE)
    text, replaced = empty.subn(line, text, count=1)
    if replaced:
        return text
    return (text + "\n" if text and not text.endswith("\n") else text) + line + "\n"


def write(path: Path, text: str) -> None:
    """Replace the file in one step; nobody else may read it at any moment."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".env.")  # made with mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def main(names: list[str]) -> int:
    path = ENV_FILE.resolve()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    given = {**(dotenv_values(path) if text else {}), **{k: v for k, v in os.environ.items() if v}}
    wanted = missing(names, given)
    try:
        if wanted:
            made = {name: secrets.token_urlsafe(24) for name in wanted}
            for name, value in made.items():
                text = with_secret(text, f"GLM_{name}", value)
            write(path, text)
            print(f"First start: written to {path} (readable by you only)")
            for name, value in made.items():
                print(f"  GLM_{name}={value}   # {WHAT.get(name, 'secret')}")
        elif text and path.stat().st_mode & 0o077 and not missing(names, dict(dotenv_values(path))):
            path.chmod(0o600)
            print(f"{path} holds secrets and others could read it: its mode is now 0600")
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}. Give GLM_API_KEY and GLM_WEB_TOKEN yourself", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
