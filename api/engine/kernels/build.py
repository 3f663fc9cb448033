"""Compiles the operations for this machine's CPU, has them tried out in a child process, and keeps what was found.

A library is kept in a cache folder under a name that says for which source, torch and processor it is, and beside it
whether it computed what torch computes. So a library that ends the child, hangs or computes something else is tried once
and never loaded by a server. Whatever fails here raises KernelError, and the server computes with torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
HEADERS = tuple(Path(__file__).with_name(name) for name in ("attention.h", "checks.h", "products.h"))
PROJECT = Path(__file__).resolve().parents[3]
# What kernels.cpp is written for.
PAGE_TOKENS = 16
HEAD_DIMS = range(16, 257, 16)
TARGET = ("-march=native",)
FLAGS = (
    "-std=c++20", "-O3", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-fPIC", "-DAT_PARALLEL_OPENMP=1",
)  # fmt: skip
COMPILE_LIMIT_S = 600.0
TRIAL_LIMIT_S = 120.0


class KernelError(RuntimeError):
    """There are no compiled operations; the message says why."""


def fit_processor() -> bool:
    """Whether anything is compiled for this processor."""
    return "avx512_bf16" in _processor()


def multiplies() -> bool:
    """Whether the products are faster than oneDNN's: not with AMX, which only oneDNN uses."""
    return fit_processor() and "amx_bf16" not in _processor()


def obstacle(device: str, dtype: torch.dtype, page_tokens: int, head_dims: tuple[int, ...]) -> str | None:
    """Why the kernels cannot be used for a model, or None."""
    if device != "cpu":
        return "for the CPU only"
    if dtype != torch.bfloat16:
        return f"for bfloat16 only, and this is {str(dtype).removeprefix('torch.')}"
    if page_tokens != PAGE_TOKENS or any(dim not in HEAD_DIMS for dim in head_dims):
        return f"not for heads of {' and '.join(map(str, head_dims))} in pages of {page_tokens}"
    if not fit_processor():
        return "for processors with AVX512_BF16 only"
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm-web"


class PendingLibrary:
    """Compiles and tries a library in a thread of its own, while weights are loaded."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder()
        self._library: Path | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="compile", daemon=True)
        self._thread.start()

    def wait(self, limit_s: float) -> Path:
        """The library, tried. Raises KernelError if there is none, or none yet; then it goes on for the next start."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise KernelError(f"compiling takes longer than {limit_s:g} s; the next start will use them")
        if self._library is None:
            raise KernelError(str(self._error))
        return self._library

    def _run(self) -> None:
        try:
            self._library = tried(compiled(self._folder))
        except (KernelError, OSError) as error:
            self._error = error


def compiled(folder: Path) -> Path:
    """The library for this machine: the one that is there, or a new one. Raises KernelError, OSError."""
    compiler = _compiler()
    library = folder / f"kernels-{_fingerprint(compiler)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder) as work:
        made = Path(work) / library.name
        _run([compiler, *FLAGS, *TARGET, f"-I{torch_folder / 'include'}", "-c", str(SOURCE), "-o", f"{made}.o"])
        # Not linked with -fopenmp: torch brings the one OpenMP runtime whose threads both must share.
        _run([compiler, "-shared", f"{made}.o", "-o", str(made), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"])
        made.replace(library)
    return library


def tried(library: Path) -> Path:
    """The library, once a child process has compared it with torch; what was found is kept beside it.

    Raises KernelError if it did not pass, now or at an earlier start, and OSError.
    """
    found = library.with_suffix(".trial")  # empty: it passed; else why it did not
    if not found.is_file():
        unfinished = library.with_suffix(f".trial-{os.getpid()}")
        unfinished.write_text(_try_in_child(library), "utf-8")
        unfinished.replace(found)
    if reason := found.read_text("utf-8"):
        raise KernelError(f"{reason} (remove {found} to try again)")
    return library


def _try_in_child(library: Path) -> str:
    """Why a library must not be loaded, or an empty string."""
    command = [sys.executable, "-m", "api.engine.kernels.trial", str(library)]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=TRIAL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"the compiled operations did not finish their trial within {TRIAL_LIMIT_S:g} s"
    if done.returncode < 0:
        return f"the compiled operations ended their trial with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return (done.stdout.strip() or done.stderr.strip() or "the trial failed without a message").splitlines()[-1][:300]
    return ""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise KernelError("there is no C++ compiler (install g++ for faster answers)")


def _processor() -> str:
    """What this processor can do: a library for another one may end the process."""
    with suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text("ascii"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor()


def _fingerprint(compiler: str) -> str:
    sources = (file.read_text("utf-8") for file in (SOURCE, *HEADERS))
    parts = (*sources, torch.__version__, compiler, " ".join((*FLAGS, *TARGET)), _processor())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _run(command: list[str]) -> None:
    try:  # loading the weights comes first
        done = subprocess.run(["nice", *command], capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} took longer than {COMPILE_LIMIT_S:g} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelError(f"{command[0]} ended with code {done.returncode}: {lines[0] if lines else 'no message'}")
