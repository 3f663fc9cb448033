"""Matrix products, attention and the operations between them compiled for this machine's CPU, where there is a compiler.

kernels.cpp is compiled in the background while the server starts and answers with torch's operations, tried
against those, and then used. What was compiled is kept for the next start under a name that says for which
source, torch and processor it is. Nothing here can stop a server: where it fails, torch goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from api.engine.loading.placement import Selection
from api.engine.model.linear import Linear
from api.engine.model.operations import AttentionMetadata, Operations, TorchOperations

logger = logging.getLogger(__name__)

SOURCE, *HEADERS = (Path(__file__).with_name(name) for name in ("kernels.cpp", "attention.h", "products.h"))
# What kernels.cpp is written for.
PAGE_TOKENS = 16
HEAD_DIMS = range(16, 257, 16)
FLAGS = (
    "-std=c++20", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffast-math", "-fopenmp", "-fPIC",
    "-DAT_PARALLEL_OPENMP=1",
)  # fmt: skip
COMPILE_LIMIT_S = 600.0
TOLERANCE = 0.05  # of numbers about 1, in bfloat16


class KernelError(RuntimeError):
    """There will be no compiled operations; the message says why."""


class CompiledOperations:
    needs_masks = False

    def add_norm(
        self, x: torch.Tensor, part: torch.Tensor, after: torch.Tensor, before: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.glm.add_norm(x, part, after, before, eps)

    def rotate_store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, kv: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        torch.ops.glm.rotate_store(qkv, cos, sin, kv, places)
        return qkv

    def attend_single(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
        return torch.ops.glm.attend_pages(qkv, kv, group.pages, group.lengths)

    def attend_chunk(self, qkv: torch.Tensor, kv: torch.Tensor, group: AttentionMetadata) -> torch.Tensor:
        return torch.ops.glm.attend_chunk(qkv, kv, group.pages, group.first)

    def attend_image(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, frames: int, heads: int
    ) -> torch.Tensor:
        return torch.ops.glm.attend_image(qkv, cos, sin, frames, heads)


def fit_processor() -> bool:
    """Whether anything is compiled for this processor."""
    return "avx512_bf16" in _processor()


def multiplies() -> bool:
    """Whether the products are faster than oneDNN's: not with AMX, which only that knows."""
    return fit_processor() and "amx_bf16" not in _processor()


def obstacle(device: torch.device, dtype: torch.dtype, page_tokens: int, head_dims: tuple[int, ...]) -> str | None:
    """Why the kernels cannot be used there, or None."""
    if device.type != "cpu":
        return "for the CPU only"
    if dtype != torch.bfloat16:
        return f"for bfloat16 only, and this is {str(dtype).removeprefix('torch.')}"
    if page_tokens != PAGE_TOKENS or any(dim not in HEAD_DIMS for dim in head_dims):
        return f"not for heads of {' and '.join(map(str, head_dims))} in pages of {page_tokens}"
    if not fit_processor():
        return "for processors with AVX512_BF16 only"
    return None


def prepare(use: Callable[[Operations], None], tell: Callable[[Selection], None], folder: Path | None = None) -> None:
    """Compile in a thread of its own, then `use` the operations; `tell` says each time what is in use and why."""
    tell(Selection("compiling", "torch computes meanwhile"))
    threading.Thread(target=_prepare, args=(use, tell, folder), name="compile", daemon=True).start()


def _prepare(use: Callable[[Operations], None], tell: Callable[[Selection], None], folder: Path | None) -> None:
    try:
        library = compiled(folder or cache_folder())
        torch.ops.load_library(str(library))
        _try_out(CompiledOperations())
        use(CompiledOperations())  # may fail for want of memory; what is in use by then goes on
    except (KernelError, OSError, RuntimeError, MemoryError) as error:
        choice = Selection("torch", f"no compiled operations: {error}")
    else:
        choice = Selection("compiled", str(library))
    tell(choice)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm-web"


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
        _run([compiler, *FLAGS, f"-I{torch_folder / 'include'}", "-c", str(SOURCE), "-o", f"{made}.o"])
        # Not linked with -fopenmp: torch brings the one OpenMP runtime whose threads both must share.
        _run([compiler, "-shared", f"{made}.o", "-o", str(made), f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"])
        made.replace(library)
    return library


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
    parts = (*sources, torch.__version__, compiler, " ".join(FLAGS), _processor())
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def _run(command: list[str]) -> None:
    try:  # the answers of a server that has started already come first
        done = subprocess.run(["nice", *command], capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} took longer than {COMPILE_LIMIT_S:g} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise KernelError(f"{command[0]} ended with code {done.returncode}: {said[0] if said else 'no message'}")


@torch.inference_mode()
def _try_out(own: Operations) -> None:
    """Compare with torch on a few numbers: a miscompiled library must not answer anybody."""
    theirs = TorchOperations(PAGE_TOKENS)
    numbers = torch.Generator().manual_seed(46)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers).to(torch.bfloat16)

    rows, kv_heads, shared, dim = 5, 2, 5, 64
    x, part, after, before = some(rows, 96), some(rows, 96), some(96), some(96)
    qkv, kv = some(rows, kv_heads * (shared + 2), dim), some(8 * PAGE_TOKENS, 2 * kv_heads, dim)
    patches = some(10, 96)
    cos, sin, places = some(*qkv.shape), some(*qkv.shape), torch.arange(rows) * 7
    cos[:, -kv_heads:], sin[:, -kv_heads:] = 1, 0  # values are not turned
    lengths = torch.tensor([1, 16, 17, 40, 48])
    hidden = torch.where(torch.arange(48) < lengths[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    singles = AttentionMetadata(0, rows, torch.arange(15).view(rows, 3) % 8, hidden[:, None, None], lengths)
    later = torch.where(torch.arange(48) <= torch.arange(40, 40 + rows)[:, None], 0.0, -torch.inf).to(torch.bfloat16)
    chunk = AttentionMetadata(0, rows, torch.tensor([5, 0, 3]), later, first=40)
    turns = some(10, 16).float(), some(10, 16).float()
    for name in ("add_norm", "rotate_store", "attend_single", "attend_chunk", "attend_image"):
        found = []
        for operations in (own, theirs):
            stored = kv.clone()
            arguments = {
                "add_norm": (x, part, after, before, 1e-5),
                "rotate_store": (qkv.clone(), cos, sin, stored, places),
                "attend_single": (qkv, stored, singles),
                "attend_chunk": (qkv, stored, chunk),
                "attend_image": (patches, *turns, 2, 2),
            }[name]
            result = getattr(operations, name)(*arguments)
            found.append([*(result if isinstance(result, tuple) else [result]), stored])
        _compare(name, *found)
    if multiplies():
        for gated in (False, True):
            linear = Linear(some(64, 96), None if gated else some(64), gated)
            wanted = linear(x)
            linear.pack()
            _compare("product", [linear(x)], [wanted])


def _compare(name: str, found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, wanted, strict=True):
        if not torch.allclose(ours.float(), theirs.float(), rtol=TOLERANCE, atol=TOLERANCE):
            raise KernelError(f"{name} computes something else than torch")
