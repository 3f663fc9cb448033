"""Lists the pinned packages of a requirements file that this Python does not have. Standard library only.

python deploy/packages.py requirements.txt     prints one line per package; exit 0 if none is missing
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pins(path: Path) -> dict[str, str]:
    """Name and exact version of each line; `-r other.txt` is followed."""
    found: dict[str, str] = {}
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.partition("#")[0].strip()
        if line.startswith("-r "):
            found.update(pins(path.parent / line[3:].strip()))
        elif line:
            name, _, pinned = line.partition("==")
            found[name.partition("[")[0].strip()] = pinned.strip()
    return found


def missing(path: Path) -> list[str]:
    """Lines such as `torch 2.12.0 instead of 2.13.0`."""
    lines = []
    for name, pinned in pins(path).items():
        try:
            present = version(name)
        except PackageNotFoundError:
            lines.append(f"{name} {pinned} is not installed")
            continue
        # 2.13.0+cpu is a build of 2.13.0.
        if present.partition("+")[0] != pinned:
            lines.append(f"{name} {present} instead of {pinned}")
    return lines


if __name__ == "__main__":
    problems = missing(Path(sys.argv[1]))
    for problem in problems:
        print(problem)
    sys.exit(1 if problems else 0)
