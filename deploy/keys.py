"""Creates the secrets of the service on the first start: writes them to `.env`, mode 0600, and prints them once.

    python deploy/keys.py API_KEY WEB_TOKEN

A secret set in the environment, in `.env` or as GLM_<NAME>_FILE is kept, and so is every other line of the file. Run after
`python settings.py` has accepted the settings.
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
DESCRIPTIONS = {"API_KEY": "key for programs (Authorization: Bearer ...)", "WEB_TOKEN": "token for the page",
                "PROBE_TOKEN": "marks the checker's questions"}


def missing(names: list[str], given: dict[str, str | None]) -> list[str]:
    return [name for name in names if not given.get(f"GLM_{name}") and not given.get(f"GLM_{name}_FILE")]


def with_secret(text: str, name: str, value: str) -> str:
    """The file's text with the secret, in place of an empty value or at the end."""
    line = f"{name}={value}"
    empty = re.compile(rf"^[ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*(?:\"\"|'')?[ \t]*$", re.MULTILINE)
    text, replaced = empty.subn(line, text, count=1)
    if replaced:
        return text
    return (text + "\n" if text and not text.endswith("\n") else text) + line + "\n"


def write(path: Path, text: str) -> None:
    """Replaces the file atomically; it is never readable by other users."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".env.")  # mkstemp uses mode 0600
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def main(names: list[str]) -> int:
    path = ENV_FILE.resolve()
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    given = {**(dotenv_values(path) if text else {}), **{k: v for k, v in os.environ.items() if v}}
    absent = missing(names, given)
    try:
        if absent:
            created = {name: secrets.token_urlsafe(24) for name in absent}
            for name, value in created.items():
                text = with_secret(text, f"GLM_{name}", value)
            write(path, text)
            print(f"First start: secrets written to {path} (readable by you only)")
            for name, value in created.items():
                print(f"  GLM_{name}={value}   # {DESCRIPTIONS.get(name, 'secret')}")
        elif text and path.stat().st_mode & 0o077 and not missing(names, dict(dotenv_values(path))):
            path.chmod(0o600)
            print(f"{path} holds secrets and was readable by other users: its mode is now 0600")
    except OSError as error:
        print(f"cannot write {path}: {error.strerror}. Set GLM_API_KEY and GLM_WEB_TOKEN yourself", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
