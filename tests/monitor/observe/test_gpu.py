"""GPU readings in the real child process, with drivers and tools that hang, fail and report only part."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from nvml_stand_in import NVML

from monitor.observe import gpu, gpu_child, processes
from monitor.tell import report

# A second card does not tell its load.
TWO_CARDS = f"""{NVML}
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetUtilizationRates(handle):
    if handle == 1: raise NVMLError("Not Supported")
    return _Rates
"""
FAILING_NVML = "class NVMLError(Exception): pass\ndef nvmlInit(): raise NVMLError('Driver Not Loaded')\n"
SMI_LINE = "0, GPU-1, [N/A], 24576, 3000, 21576, 550.1, NVIDIA Test, 123, Disabled, Disabled, 55"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Replaces pynvml and nvidia-smi for the child process."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    def put(nvml: str | None = None, smi: str | None = None) -> None:
        if nvml is not None:
            (tmp_path / "pynvml.py").write_text(nvml)
        if smi is not None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/bash\n{smi}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)

    return put


def test_cards_are_read_and_a_missing_reading_is_null_with_a_reason(driver):
    driver(nvml=TWO_CARDS)

    reading = gpu.read()

    assert reading["source"] == "nvml"
    assert reading["gpus"][0]["load_percent"] == 37
    assert reading["gpus"][0]["memory_used_mib"] == 3072
    assert reading["gpus"][1]["load_percent"] is None
    assert reading["reason"] == "GPU 1 does not report load_percent"
    assert gpu.highest(reading["gpus"], "load_percent") == 37


def test_hung_driver_is_killed_and_not_tried_a_second_way(driver, tmp_path):
    pid_file = tmp_path / "pid"
    nvml = f"import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\n"
    driver(nvml=nvml + "time.sleep(600)", smi="sleep 600")
    started = time.monotonic()

    reading = gpu.read(limit_s=3)

    assert time.monotonic() - started < 10
    assert reading["hung"] is True and reading["gpus"] == []
    assert "did not answer within 3 s" in reading["reason"]
    assert not Path(f"/proc/{pid_file.read_text()}").exists()


def test_hung_tool_dies_with_the_child(driver, tmp_path):
    pid_file = tmp_path / "pid"
    driver(nvml=FAILING_NVML, smi=f"echo $$ > {pid_file}; exec sleep 600")

    reading = gpu.read(limit_s=3)

    assert reading["hung"] is True
    tool = processes.read_stat(int(pid_file.read_text()))
    # The signal has been sent; on a loaded machine the process ends later.
    deadline = time.monotonic() + 30
    while tool is not None and tool.running and time.monotonic() < deadline:
        time.sleep(0.05)
        tool = processes.read_stat(tool.pid)
    assert tool is None or not tool.running


def test_nan_from_gputil_becomes_null_with_a_reason(driver):
    driver(nvml=FAILING_NVML, smi=f"echo '{SMI_LINE}'")

    reading = gpu.read()

    assert reading["source"] == "gputil"
    assert reading["gpus"][0]["load_percent"] is None
    assert reading["gpus"][0]["memory_used_mib"] == 3000
    assert reading["reason"] == "GPU 0 does not report load_percent"
    assert "NaN" not in report.to_json(reading)


def test_tool_that_prints_an_error_is_a_reason(driver):
    driver(nvml=FAILING_NVML, smi="echo 'Failed to initialize NVML: Unknown Error'; exit 255")

    reading = gpu.read()

    assert reading["gpus"] == []
    assert "Driver Not Loaded" in reading["reason"] and "GPUtil" in reading["reason"]


def test_child_that_crashes_is_a_reason(driver):
    driver(nvml="import os\nos.abort()\n")

    reading = gpu.read()

    assert reading["gpus"] == [] and "ended with code -6" in reading["reason"]


def test_no_gpu_is_a_normal_state(driver):
    driver(nvml=FAILING_NVML)

    reading = gpu.read()

    assert reading["gpus"] == [] and reading["hung"] is False
    assert gpu.highest(reading["gpus"], "load_percent") is None
    assert reading["reason"]


def test_gputil_finds_what_python_3_12_removed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    for name in ("distutils", "distutils.spawn"):
        monkeypatch.delitem(sys.modules, name, raising=False)

    gpu_child._supply_distutils()

    assert sys.modules["distutils"].spawn.find_executable("sh")
    monkeypatch.delitem(sys.modules, "distutils.spawn")
    monkeypatch.delitem(sys.modules, "distutils")


def test_a_tool_that_prints_for_ever_fills_no_memory(driver):
    driver(nvml=FAILING_NVML, smi=f"exec yes '{SMI_LINE}'")
    started = time.monotonic()

    reading = gpu.read()

    assert reading["gpus"] == [] and "nvidia-smi prints without end" in reading["reason"]
    assert time.monotonic() - started < gpu.CHILD_LIMIT_S + 4
