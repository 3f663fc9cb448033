"""GPU readings from a child process, which is killed if the driver hangs. No GPU is a normal state, not an error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CHILD = Path(__file__).with_name("gpu_child.py")
CHILD_LIMIT_S = 4.0
# cron's PATH is short, and container images install nvidia-smi in different folders.
TOOL_PATHS = ("/usr/bin", "/usr/local/bin", "/usr/local/nvidia/bin", "/usr/local/cuda/bin", "/opt/bin")


def read(limit_s: float = CHILD_LIMIT_S) -> dict:
    """{gpus, source, hung, reason}; `reason` is None if every reading is present. Takes at most twice `limit_s`, and 2 s.

    Tries NVML, then GPUtil if NVML reports an error and nvidia-smi exists. After a hang there is no second try, because
    nvidia-smi would hang too.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), *TOOL_PATHS])
    answer, hung = _run_child("nvml", limit_s, path)
    source = "nvml"
    if not hung and not answer["gpus"] and shutil.which("nvidia-smi", path=path):
        nvml_reason = answer["reason"]
        answer, hung = _run_child("gputil", limit_s, path)
        source = "gputil"
        if answer["reason"]:
            answer["reason"] = f"{nvml_reason}; {answer['reason']}"
    return {"gpus": answer["gpus"], "source": source, "hung": hung, "reason": answer["reason"] or _gaps(answer["gpus"])}


def highest(gpus: list[dict], key: str) -> float | None:
    """The highest value over all cards, None if no card reports it."""
    return max((gpu[key] for gpu in gpus if gpu.get(key) is not None), default=None)


def _gaps(gpus: list[dict]) -> str | None:
    lines = [
        f"GPU {gpu['index']} does not report {key}"
        for gpu in gpus
        for key in ("load_percent", "memory_used_mib")
        if gpu.get(key) is None
    ]
    return "; ".join(lines) or None


def _run_child(mode: str, limit_s: float, path: str) -> tuple[dict, bool]:
    try:
        child = subprocess.Popen(
            [sys.executable, "-B", "-P", str(CHILD), mode],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PATH": path}, start_new_session=True,
        )  # fmt: skip
    except OSError as error:  # no more files or processes are allowed
        return {"gpus": [], "reason": f"the {mode} reader cannot be started: {error.strerror or error}"}, False
    try:
        out, errors = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"gpus": [], "reason": f"{mode} did not answer within {limit_s:g} s{_end(child)}"}, True
    try:
        return json.loads(out), False
    except ValueError:
        last = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return {"gpus": [], "reason": f"{mode} reader ended with code {child.returncode}: {last or 'no output'}"}, False


def _end(child: subprocess.Popen) -> str:
    """SIGTERM before SIGKILL, which can leave a GPU in a bad state. Does not wait for a child that cannot be killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=1.0)
            # nvidia-smi, started by the child, may outlive it.
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            return ""
        except subprocess.TimeoutExpired:
            continue
        return ""
    return f" and cannot be killed (pid {child.pid}, uninterruptible sleep)"
