"""Events of the cards, from a small library that takes the place of NVML: it is loaded by pynvml like the real one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 30.0
# Two cards. Events come in turn, then what `FAKE_NVML_END` names: `hang` never returns, `lost` is a lost driver.
LIBRARY = r"""
#include <stdlib.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>
typedef struct { void *device; unsigned long long type, data; unsigned gpu, compute; } event;
static long wanted[3];
static int given;
int nvmlInitWithFlags(unsigned flags) { return getenv("FAKE_NVML_NONE") ? 9 : 0; }
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return "fake"; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)(uintptr_t)(index + 1); return 0; }
int nvmlDeviceGetUUID(void *device, char *name, unsigned length) {
    strcpy(name, "GPU-0"); name[4] += (char)((uintptr_t)device - 1); return 0;
}
int nvmlEventSetCreate(void **set) { *set = &given; return 0; }
int nvmlEventSetFree(void *set) { return 0; }
int nvmlDeviceGetSupportedEventTypes(void *device, unsigned long long *types) { *types = 0x1f; return 0; }
int nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) {
    wanted[(uintptr_t)device] = (long)types; return types == 0xb ? 0 : 2;
}
int nvmlEventSetWait_v2(void *set, event *e, unsigned milliseconds) {
    static const struct { uintptr_t card; unsigned long long type, data; } all[] = {{1, 8, 79}, {2, 2, 1}, {2, 1, 1}};
    if (given < 3) {
        e->device = (void *)all[given].card; e->type = all[given].type; e->data = all[given].data; ++given;
        return wanted[(uintptr_t)e->device] ? 0 : 999;
    }
    const char *end = getenv("FAKE_NVML_END");
    if (!strcmp(end, "hang")) for (;;) sleep(60);
    if (!strcmp(end, "lost")) return 15;
    usleep(1000);
    return 10;
}
"""
PROGRAM = """
import json, time
from api.health.card_events import CardEvents
events = CardEvents()
events.start()
end = time.monotonic() + {seconds}
while len(events.recent()) < {count} and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.1)
print(json.dumps(events.recent()))
events.stop()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nvml")
    source = folder / "nvml.c"
    source.write_text(LIBRARY, encoding="utf-8")
    compiler = shutil.which("gcc") or shutil.which("g++")
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-o", folder / "libnvidia-ml.so.1", source], check=True)
    return folder


def events(library: Path | None, count: int, seconds: float = WAIT_S, **environment: str) -> tuple[list[dict], float]:
    """What a process of its own has seen, and the seconds until it ended."""
    path = {"LD_LIBRARY_PATH": str(library)} if library else {}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(count=count, seconds=seconds)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **path, **environment},
        capture_output=True, text=True, check=True, timeout=WAIT_S,
    )  # fmt: skip
    return json.loads(done.stdout), time.monotonic() - began


@pytest.mark.parametrize("end", ["quiet", "lost", "hang"])
def test_events_of_both_cards_are_kept_whatever_the_driver_does_then(end: str, library: Path) -> None:
    seen, took_s = events(library, 3, FAKE_NVML_END=end)

    assert [(e["kind"], e["code"], e["card"]) for e in seen] == [("ecc", 1, 1), ("ecc", 2, 1), ("xid", 79, 0)]
    assert all(0 <= e["age_s"] < WAIT_S for e in seen)
    assert took_s < WAIT_S / 2  # a wait that hangs does not keep the process from ending


def test_without_a_driver_there_are_none(library: Path) -> None:
    assert events(library, 1, seconds=0.3, FAKE_NVML_NONE="1")[0] == []


def test_without_the_library_there_are_none() -> None:
    assert events(None, 1, seconds=0.3)[0] == []
