"""Compiles the kernels for this machine's CPU, tries them in a child process, and caches library and result.

The library's file name is a fingerprint of source, torch, compiler and processor; the result of its trial is stored
beside it. So a library that crashes, hangs or computes wrong results is tried once and never loaded by a server. Every
failure raises KernelError, and the server computes with torch.
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
# The limits of kernels.cpp.
PAGE_TOKENS = 16
HEAD_DIMS = range(16, 257, 16)
TARGET = ("-march=native",)
FLAGS = (
    "-std=c++20", "-O3", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-fPIC", "-DAT_PARALLEL_OPENMP=1",
)  # fmt: skip
COMPILE_LIMIT_S = 600.0
TRIAL_LIMIT_S = 120.0


class KernelError(RuntimeError):
    """The compiled kernels cannot be used; the message is the reason."""


def processor_supported() -> bool:
    return "avx512_bf16" in _processor_flags()


def has_fast_products() -> bool:
    """Whether the compiled products are faster than oneDNN's: not with AMX, which only oneDNN uses."""
    return processor_supported() and "amx_bf16" not in _processor_flags()


def unsupported(device: str, dtype: torch.dtype, page_tokens: int, head_dims: tuple[int, ...]) -> str | None:
    """Why the kernels do not support a model, or None if they do."""
    if device != "cpu":
        return "the compiled kernels are for the CPU only"
    if dtype != torch.bfloat16:
        return f"the compiled kernels are for bfloat16 only. Given: {str(dtype).removeprefix('torch.')}"
    if page_tokens != PAGE_TOKENS or any(dim not in HEAD_DIMS for dim in head_dims):
        dims = " and ".join(map(str, head_dims))
        return f"the compiled kernels do not support heads of {dims} dimensions in pages of {page_tokens} tokens"
    if not processor_supported():
        return "the compiled kernels need a processor with AVX512_BF16"
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm-web"


class PendingLibrary:
    """Compiles and tries the library in a background thread while weights are loaded."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or cache_folder()
        self._library: Path | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="compile", daemon=True)
        self._thread.start()

    def wait(self, limit_s: float) -> Path:
        """The library, once it has passed its trial. Raises KernelError if it fails or is not ready in time; in the
        latter case the thread continues, for the next start."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise KernelError(f"compiling takes longer than {limit_s:g} s; the next start will use them")
        if self._library is None:
            raise KernelError(str(self._error))
        return self._library

    def _run(self) -> None:
        try:
            self._library = try_library(compile_library(self._folder))
        except (KernelError, OSError) as error:
            self._error = error


def compile_library(folder: Path) -> Path:
    """The library for this machine, compiled unless it is in the cache `folder`. Raises KernelError, OSError."""
    compiler = _compiler()
    library = folder / f"kernels-{_fingerprint(compiler)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=folder) as work:
        output = Path(work) / library.name
        _run([compiler, *FLAGS, *TARGET, f"-I{torch_folder / 'include'}", "-c", str(SOURCE), "-o", f"{output}.o"])
        # Not linked with -fopenmp: the kernels must share the OpenMP runtime and threads of torch.
        _run([compiler, "-shared", f"{output}.o", "-o", str(output), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"])
        output.replace(library)
    return library


def try_library(library: Path) -> Path:
    """Compare the library with torch in a child process, unless an earlier start has done so; returns it if it passes.

    Raises KernelError if it fails, now or at an earlier start, and OSError.
    """
    result = library.with_suffix(".trial")  # empty if it passed, else the reason
    if not result.is_file():
        unfinished = library.with_suffix(f".trial-{os.getpid()}")
        unfinished.write_text(_try_in_child(library), "utf-8")
        unfinished.replace(result)
    if reason := result.read_text("utf-8"):
        raise KernelError(f"{reason} (remove {result} to try again)")
    return library


def _try_in_child(library: Path) -> str:
    """Why the library must not be loaded, or an empty string."""
    command = [sys.executable, "-m", "api.engine.kernels.trial", str(library)]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=TRIAL_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"their trial did not finish within {TRIAL_LIMIT_S:g} s"
    if done.returncode < 0:
        return f"their trial was killed by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        return (done.stdout.strip() or done.stderr.strip() or "the trial failed without a message").splitlines()[-1][:300]
    return ""


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise KernelError("no C++ compiler was found (install g++ for faster answers)")


def _processor_flags() -> str:
    with suppress(OSError):
        flags = re.search(r"^(?:flags|Features)\s*:(.*)$", Path("/proc/cpuinfo").read_text("ascii"), re.MULTILINE)
        if flags:
            return flags[1]
    return platform.processor()


def _fingerprint(compiler: str) -> str:
    sources = (file.read_text("utf-8") for file in (SOURCE, *HEADERS))
    parts = (*sources, torch.__version__, compiler, " ".join((*FLAGS, *TARGET)), _processor_flags())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _run(command: list[str]) -> None:
    try:  # at low priority: the weights are being loaded
        done = subprocess.run(["nice", *command], capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} took longer than {COMPILE_LIMIT_S:g} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelError(f"{command[0]} failed with exit code {done.returncode}: {lines[0] if lines else 'no message'}")
