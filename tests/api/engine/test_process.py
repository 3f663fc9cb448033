"""The settings of the host process, and that importing the engine changes none of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# Prints GOMP_SPINCOUNT and whether 8 MiB come from a mapping of their own, as they do by glibc's defaults.
PROBE = """
import ctypes, os
class Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2
libc.malloc.restype = ctypes.c_void_p
def probe():
    before = libc.mallinfo2().hblks
    libc.malloc(ctypes.c_size_t(8 << 20))
    print(os.environ.get("GOMP_SPINCOUNT"), "mapped" if libc.mallinfo2().hblks > before else "kept")
"""


def output_of(code: str, **environment: str) -> list[str]:
    env = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT" and not k.startswith("GLM_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE + code], cwd=ROOT, env=env | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_importing_the_engine_changes_neither_environment_nor_malloc() -> None:
    modules = "api.engine, api.engine.engine, api.engine.process, api.engine.text.grammar"

    assert output_of(f"import {modules}\nprobe()") == ["None mapped"]


def test_importing_any_module_of_the_engine_calls_no_malloc_setting_and_starts_no_thread() -> None:
    code = """
import pkgutil, threading
import torch, transformers  # whose own doings do not count
calls, threads = [], threading.active_count()
from api.engine import process
process.configure = process.keep_freed_memory = process.release_freed_memory = lambda: calls.append("called")
import api.engine
for module in pkgutil.walk_packages(api.engine.__path__, "api.engine."):
    __import__(module.name)
print(calls, threading.active_count() - threads, os.environ.get("GOMP_SPINCOUNT"))
"""

    assert output_of(code) == ["[] 0 None"]


def test_the_server_configures_both_before_torch_is_imported() -> None:
    code = """
import sys
from api import server
server.serve = lambda settings, engine: probe() or print("torch" in sys.modules) or 0
server.main(["--host", "127.0.0.1"])
"""

    assert output_of(code) == ["5000 kept", "False"]


def test_a_value_from_the_environment_takes_precedence() -> None:
    assert output_of("from api.engine import process\nprocess.configure()\nprobe()", GOMP_SPINCOUNT="7") == ["7 kept"]


def test_frozen_objects_are_not_visited_by_the_garbage_collector() -> None:
    code = """
import gc
from api.engine import process
kept = [[number] for number in range(100_000)]
process.freeze_objects()
print(gc.get_freeze_count() > 100_000, len(gc.get_objects()) < 1_000)
"""

    assert output_of(code) == ["True True"]
