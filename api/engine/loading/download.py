"""Downloads a model from Hugging Face (or the mirror in HF_ENDPOINT) or ModelScope."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from api.engine.loaded_model import LoadError
from api.engine.loading.progress import Progress

FILES = ["*.json", "*.jinja", "*.txt", "*.safetensors"]
# A download reports each piece: on the slowest usable line one comes within seconds, so that only a dead line is still.
PIECE_BYTES = 256 * 1024


def download(model: str, hub: str, progress: Progress) -> Path:
    """The folder of a downloaded model. `progress` is called for each piece that has come. Raises LoadError."""
    fetch = _from_modelscope if hub == "modelscope" else _from_huggingface
    try:
        return fetch(model, progress)
    except LoadError:
        raise
    except Exception as error:  # the hubs' clients raise many types; the operator needs one sentence
        raise LoadError(
            f"{model} is not a local folder and cannot be downloaded from {hub}: {type(error).__name__}: {str(error).splitlines()[0][:200]}. "
            "Set GLM_MODEL to a folder, GLM_HUB to another hub, or HF_ENDPOINT to a mirror."
        ) from error


def _from_huggingface(model: str, progress: Progress) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import tqdm

    constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES
    with open(os.devnull, "w", encoding="utf-8") as nowhere:

        class Bar(tqdm):
            """Reports the downloaded bytes instead of printing them."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, "file": nowhere, "disable": False})

            def update(self, n: float | None = 1) -> bool | None:
                shown = super().update(n)
                if self.unit == "B" and n:
                    progress(self.n / self.total if self.total else 0.0)
                return shown

        return Path(snapshot_download(model, allow_patterns=FILES, tqdm_class=Bar))


def _from_modelscope(model: str, progress: Progress) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise LoadError("GLM_HUB=modelscope needs the package modelscope: pip install modelscope") from None

    class Pieces:
        """Made for each file. The total is unknown, so that only the coming of bytes can be reported."""

        def __init__(self, *_: Any) -> None:
            pass

        def update(self, size: int) -> None:
            progress(0.0)

        def end(self) -> None:
            progress(0.0)

    return Path(snapshot_download(model, allow_patterns=FILES, progress_callbacks=[Pieces]))
