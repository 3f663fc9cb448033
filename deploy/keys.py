"""Creates the secrets of the service on the first start: writes them to `.env`, mode 0600, and prints them once.

    python -m deploy.keys API_KEY WEB_TOKEN

A secret set in the environment, in `.env` or as GLM_<NAME>_FILE is kept, and so is every other line of the file. Run after
`python settings.py` has accepted the settings. With GLM_ENV_FILE it is that file; the checker's copy of an earlier `.env`,
with which it restarts while `.env` is invalid, is never written to.
"""

from __future__ import annotations

import io
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path

from dotenv import dotenv_values

from settings import LAST_GOOD

ENV_FILE = Path(__file__).resolve().parent.parent / (os.environ.get("GLM_ENV_FILE") or ".env")
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
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def main(names: list[str]) -> int:
    path = ENV_FILE.resolve()
    if path.name == LAST_GOOD:
        return 0
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
        in_file = dotenv_values(stream=io.StringIO(text))
        absent = missing(names, {**in_file, **{k: v for k, v in os.environ.items() if v}})
        if absent:
            created = {name: secrets.token_urlsafe(24) for name in absent}
            for name, value in created.items():
                text = with_secret(text, f"GLM_{name}", value)
            write(path, text)
            print(f"First start: secrets written to {path} (readable by you only)")
            for name, value in created.items():
                print(f"  GLM_{name}={value}   # {DESCRIPTIONS.get(name, 'secret')}")
        elif text and path.stat().st_mode & 0o077 and not missing(names, in_file):
            close_to_others(path)
    except OSError as error:
        wanted = " and ".join(f"GLM_{name}" for name in names)
        print(
            f"Nothing was started: {path} cannot be written ({error.strerror}), and the first start writes {wanted} to it."
            " Set them in the environment, or make it writable", file=sys.stderr,
        )  # fmt: skip
        return 1
    return 0


def close_to_others(path: Path) -> None:
    try:
        path.chmod(0o600)
        print(f"{path} holds secrets and was readable by other users: its mode is now 0600")
    except OSError as error:
        print(f"{path} holds secrets and is readable by other users, which cannot be changed: {error.strerror}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
