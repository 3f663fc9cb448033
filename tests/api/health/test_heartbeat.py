"""The heartbeat file and the state that it gives, while the loop and the engine work or hang."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_model import fake_model
from served import image_part, text_part, wait_for

from api.engine.engine import Stats
from api.health import heartbeat
from api.health.card_events import CardEvents
from api.health.heartbeat import READ_UNIT_BYTES, Heartbeat, _bytes_read
from api.health.outcomes import Outcomes

WAIT_S = 30.0


def beat_file(served) -> Path:
    return served.app.state.server.settings.log_dir / "api.heartbeat.json"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_the_file_identifies_the_process_and_is_rewritten(serve) -> None:
    path = beat_file(serve())
    wait_for(path.exists)
    first = read(path)
    wait_for(lambda: read(path)["written_at"] > first["written_at"])

    record = read(path)
    assert record["pid"] == os.getpid() and record["start_time"] > 0 and record["boot_id"]
    assert record["state"] == "idle" and record["phase"] == "idle" and record["steps"] == 0
    assert record["beat_at"] > first["beat_at"], "the loop beats"
    assert 0 <= time.monotonic() - record["written_at"] < WAIT_S


def test_work_without_progress_past_its_deadline_is_stalled_until_the_next_step(serve) -> None:
    served = serve()
    heart = served.app.state.server.heartbeat
    asking = threading.Thread(target=lambda: served.chat("HANG"))
    asking.start()
    assert served.runner.hanging.wait(WAIT_S)
    early = served.client.get("/health")
    wait_for(lambda: heart.pulse.no_progress_s > 1)
    stats = served.engine.stats()

    assert (early.status_code, early.json()["state"]) == (200, "busy")
    wait_for(lambda: read(beat_file(served))["in_flight"])
    text = beat_file(served).read_text()
    (request,) = json.loads(text)["in_flight"]
    assert request["running"] and request["prompt_tokens"] > 0 and "HANG" not in text, "progress, but no content"
    heart._end.set()  # the observer must not interfere
    heart._thread.join(WAIT_S)
    guess = Stats(**{**stats.__dict__, "phase_deadline_s": 0.5})
    heart._pulse = heart._take_pulse(guess)
    assert served.client.get("/health").json()["state"] == "busy", "the engine's estimate does not shorten the limit"
    heart._stall_s = 0.5
    heart._pulse = heart._take_pulse(guess)
    stalled = served.client.get("/health")
    assert (stalled.status_code, stalled.json()["state"]) == (503, "stalled")
    assert int(stalled.headers["Retry-After"]) > 0
    served.runner.release.set()
    asking.join(WAIT_S)
    wait_for(lambda: served.client.get("/health").json()["state"] == "idle")


def test_a_blocked_loop_shows_in_the_file_and_the_stacks_name_the_line(serve) -> None:
    served = serve()
    path = beat_file(served)
    go = threading.Event()

    @served.app.get("/block", include_in_schema=False)
    async def block() -> None:
        go.wait(WAIT_S)

    blocked = threading.Thread(target=lambda: served.client.get("/block"))
    blocked.start()
    wait_for(lambda: path.exists() and read(path)["loop_lag_s"] > 1)
    os.kill(os.getpid(), signal.SIGUSR1)
    stacks = path.with_name("api.stacks.txt").read_text()
    go.set()
    blocked.join(WAIT_S)

    assert "in block" in stacks and "test_heartbeat.py" in stacks
    assert "in _observe" in stacks, "every thread is there"


def test_a_silent_checker_is_reported(serve) -> None:
    served = serve(check_silent_s=60)
    report = served.app.state.server.settings.log_dir / "health.json"
    ask = lambda: served.client.get("/health").json()["checker"]["state"]  # noqa: E731

    assert ask() == "never seen"
    wait_for(report.parent.exists)
    report.write_text("{}")
    wait_for(lambda: ask() == "watching")
    old = time.time() - 61
    os.utime(report, (old, old))
    wait_for(lambda: ask() == "silent")


def test_the_last_success_is_recorded_by_kind(serve) -> None:
    served = serve()
    success_age_s = served.app.state.server.outcomes.success_age_s

    assert success_age_s() == {}
    assert served.chat("hi").status_code == 200
    assert set(success_age_s()) == {"text"}
    assert served.chat([image_part(), text_part("hi")]).status_code == 200
    assert set(success_age_s()) == {"text", "picture"}
    path = beat_file(served)
    wait_for(lambda: path.exists() and set(read(path)["success_age_s"]) == {"text", "picture"})


def test_a_full_disk_is_reported_and_does_not_stop_the_server(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeat, "_open_anew", full)
    served = serve()

    wait_for(lambda: served.client.get("/health").json()["heartbeat_error"] == "No space left on device")
    assert served.chat("hello").status_code == 200


def test_waiting_work_after_a_long_idle_time_is_not_stalled(tmp_path: Path) -> None:
    heart = Heartbeat(None, tmp_path, 5, 60, Outcomes(), CardEvents())  # type: ignore[arg-type]
    idle = Stats("idle", 1.0, "idle", 0, 0, 7, 900.0, 0.1, None)
    heart._progress_at -= 900
    heart._pulse = heart._take_pulse(idle)

    busy = Stats("busy", 1.0, "idle", 0, 1, 7, 900.0, 0.1, None)
    heart._pulse = heart._take_pulse(busy)

    assert heart.state(busy) == "busy"


def test_a_users_answer_counts_as_a_success_and_a_probes_does_not(serve) -> None:
    served = serve(probe_token="pt")

    served.client.headers["x-glm-probe"] = "pt"
    assert served.chat("hi").status_code == 200
    assert served.client.get("/health").json()["success_age_s"] == {}
    del served.client.headers["x-glm-probe"]
    assert served.chat("hi").status_code == 200

    assert set(served.client.get("/health").json()["success_age_s"]) == {"text"}


def still_s(served) -> float:
    return served.client.get("/health").json()["loading_still_s"]


def test_loading_is_still_when_neither_the_loader_nor_the_disk_moves(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report of the loader counts, also one below what has been reached: bytes have come."""
    reports: queue.Queue[float] = queue.Queue()
    disk = [0]

    def load(progress):
        for fraction in iter(reports.get, 1.0):
            progress(fraction)
        return fake_model()

    monkeypatch.setattr("api.health.heartbeat._bytes_read", lambda: disk[0])
    served = serve(load=load)
    reports.put(0.5)
    wait_for(lambda: still_s(served) > 2.5)  # the observer looks each second
    reports.put(0.1)
    wait_for(lambda: still_s(served) < 1.5)
    disk[0] += READ_UNIT_BYTES - 1
    wait_for(lambda: still_s(served) > 2.5)
    disk[0] += 1
    wait_for(lambda: still_s(served) < 1.5)
    record = read(beat_file(served))
    assert record["state"] == "loading" and record["loading_still_s"] < WAIT_S and record["load_reports"] == 2
    reports.put(1.0)
    wait_for(lambda: served.client.get("/health").json()["state"] == "idle")

    assert still_s(served) == 0.0


def test_the_kernel_tells_what_is_read_from_disks() -> None:
    assert "read_bytes" in Path("/proc/self/io").read_text()
    assert _bytes_read() >= 0


def test_a_pipe_in_the_place_of_its_files_holds_nobody(serve, tmp_path: Path) -> None:
    for name in ("api.stacks.txt", "api.heartbeat.tmp"):
        os.mkfifo(tmp_path / name)
    heart = Heartbeat(serve().engine, tmp_path, 60, 60, Outcomes(), CardEvents())
    started = threading.Thread(target=lambda: asyncio.run(beat_once(heart)), daemon=True)
    started.start()
    started.join(WAIT_S)

    assert not started.is_alive()
    wait_for((tmp_path / "api.heartbeat.json").exists)
    assert read(tmp_path / "api.heartbeat.json")["pid"] == os.getpid()
    assert (tmp_path / "api.stacks.txt").is_file()
    heart.stop()


def test_health_does_not_wait_for_a_disk_that_does_not_answer(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The observer hangs in a write, and /health must not go on saying what it saw last."""
    hung, open_anew = threading.Event(), heartbeat._open_anew

    def open_slowly(path: Path):
        if path.suffix == ".tmp":
            hung.wait(WAIT_S)
        return open_anew(path)

    monkeypatch.setattr(heartbeat, "_open_anew", open_slowly)
    monkeypatch.setattr(heartbeat, "OLD_PULSE_S", 0.5)
    served = serve()
    heart = served.app.state.server.heartbeat
    asking = threading.Thread(target=lambda: served.chat("HANG"))
    asking.start()
    assert served.runner.hanging.wait(WAIT_S)

    wait_for(lambda: heart.pulse.no_progress_s > 1)

    served.runner.release.set()
    asking.join(WAIT_S)
    hung.set()


async def beat_once(heart: Heartbeat) -> None:
    heart.start()
    await asyncio.sleep(1.5)
