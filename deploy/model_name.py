"""Whether GLM_MODEL can name a model, judged in a moment and before start.sh stops the API that runs.

    python -m deploy.model_name      0 it may, 1 it cannot, and why

The API judges it again when it loads (api/engine/loading/loader.py), and knows more: what a hub has, and what fits the card.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from settings import ROOT, load

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w-][\w.-]*(/[\w-][\w.-]*)*)?", re.ASCII)


def why_none(model: str, root: Path = ROOT) -> str:
    """Empty if it is `auto`, a folder with a model, or may be a model of a hub."""
    if model == "auto":
        return ""
    folder = next((path for path in (Path(model), root / model) if path.is_dir()), None)
    if folder is None:
        return "" if HUB_ID.fullmatch(model) else f"GLM_MODEL: {model} is neither a folder nor a hub id (owner/name or owner/name@revision)."
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        return f"GLM_MODEL: {folder}: a model folder needs config.json and *.safetensors."
    return ""


if __name__ == "__main__":
    problem = why_none(load().model)
    if problem:
        print(problem, file=sys.stderr)
    sys.exit(1 if problem else 0)
