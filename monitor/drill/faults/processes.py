"""Faults of the processes: killed, stopped, starved of memory or of the processor, misbehaving by fault injection."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from monitor.drill.context import FaultContext
from monitor.drill.traffic import send_question
from monitor.observe import processes
from settings import ROOT

SPARE_BYTES = tuple(mib * 2**20 for mib in (160, 128, 96, 80, 64, 48, 32, 24, 16, 8))  # of address space, one after the other
NEXT_CAP_S = 4.0
FIRST_EFFECT_S = 60.0
SLOW_SHARE = 0.02
OPENS_PORT_S = 40  # after its start, on a machine with other work
CGROUPS = Path("/sys/fs/cgroup")
Inject = Callable[[FaultContext], AbstractContextManager[None]]


@contextmanager
def no_fault(context: FaultContext) -> Iterator[None]:
    yield


@contextmanager
def kill(context: FaultContext, part: str = "api") -> Iterator[None]:
    os.kill(context.pid(part), signal.SIGKILL)
    yield


@contextmanager
def killed_and_gone(context: FaultContext) -> Iterator[processes.ProcessRecord]:
    """The API, once the kernel has taken it away; yields its record."""
    record = processes.read_record(context.settings.log_dir, "api")
    assert record is not None
    os.kill(context.pid("api"), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes.is_running(record) and time.monotonic() < deadline:
        time.sleep(0.05)
    yield record


@contextmanager
def freeze(context: FaultContext) -> Iterator[None]:
    pid = context.pid("api")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def cap_memory(context: FaultContext) -> Iterator[None]:
    """Its address space is capped, lower and lower until a request of a user fails, so that what needs less still works."""
    pid = context.pid("api")
    soft, hard = resource.prlimit(pid, resource.RLIMIT_AS)
    context.capped_pid, context.failed_before = pid, 0
    held = min(_sampled_address_space(pid))  # while no picture is being decoded
    try:
        for spare_bytes in SPARE_BYTES:
            resource.prlimit(pid, resource.RLIMIT_AS, (held + spare_bytes, hard))
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: bool(context.traffic and context.traffic.failed), "", NEXT_CAP_S)
                break
        else:
            raise RuntimeError("no request of a user has failed under the cap")
        context.means = f"{spare_bytes // 2**20} MiB of address space left"
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, (soft, hard))


def _sampled_address_space(pid: int) -> Iterator[int]:
    for _ in range(100):
        yield address_space(pid)
        time.sleep(0.02)


def address_space(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


@contextmanager
def slow_down(context: FaultContext) -> Iterator[None]:
    """The API gets SLOW_SHARE of one processor: by a cgroup where one can be made, else by stopping it most of the time."""
    pid = context.pid("api")
    group = _new_cgroup(pid)
    context.means = "by a processor quota" if group else "by SIGSTOP and SIGCONT"
    with _in_cgroup(pid, *group) if group else _stopped_mostly(pid):
        yield


def _new_cgroup(pid: int) -> tuple[Path, Path] | None:
    """(the group of the process, a new one below it with a quota); None if this machine allows none."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        parent = CGROUPS / ("cpu" if controllers else "") / path.lstrip("/")
        group = parent / f"glm-drill-{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if (group / "cpu.max").exists():
                (group / "cpu.max").write_text(f"{int(SLOW_SHARE * 100_000)} 100000")
            else:
                (group / "cpu.cfs_quota_us").write_text(str(int(SLOW_SHARE * 100_000)))
            (group / "cgroup.procs").write_text(str(pid))
            return parent, group
        except OSError:
            group.rmdir()
    return None


@contextmanager
def _in_cgroup(pid: int, parent: Path, group: Path) -> Iterator[None]:
    try:
        yield
    finally:
        for member in (group / "cgroup.procs").read_text(encoding="ascii").split():
            with contextlib.suppress(OSError):
                (parent / "cgroup.procs").write_text(member)
        deadline = time.monotonic() + 10
        while group.exists() and time.monotonic() < deadline:  # a process that is ending still counts
            with contextlib.suppress(OSError):
                group.rmdir()
            time.sleep(0.1)


@contextmanager
def _stopped_mostly(pid: int) -> Iterator[None]:
    over = threading.Event()

    def stop_and_go() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not over.is_set():
                os.kill(pid, signal.SIGSTOP)
                over.wait(0.1 * (1 - SLOW_SHARE))
                os.kill(pid, signal.SIGCONT)
                over.wait(0.1 * SLOW_SHARE)

    thread = threading.Thread(target=stop_and_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def injected(fault: str, bound: bool = True, seconds: Callable[[FaultContext], float] = lambda context: 0.0, with_request: bool = False) -> Inject:
    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        context.inject(fault, seconds(context), bound)
        client = threading.Thread(target=ask, args=(context, seconds(context) + 120), daemon=True)
        if with_request:  # some faults are visible only under load
            client.start()
        try:
            yield
        finally:
            context.clear_fault()

    return make


def injected_at_restart(fault: str, seconds: Callable[[FaultContext], float] = lambda context: 0.0) -> Inject:
    """The API is killed, and its successors have the fault."""

    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        pid = context.pid("api")
        context.inject(fault, seconds(context), bound=False)
        os.kill(pid, signal.SIGKILL)
        try:
            yield
        finally:
            context.clear_fault()

    return make


def injected_while_loading(fault: str, seconds: Callable[[FaultContext], float]) -> Inject:
    """The API is started anew, and this process alone has the fault."""

    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        pid = context.pid("api")
        context.inject(fault, seconds(context), bound=False)
        try:
            os.kill(pid, signal.SIGKILL)
            env = {**os.environ, "GLM_START_TIMEOUT_S": str(OPENS_PORT_S)}
            subprocess.run(["bash", str(ROOT / "start.sh"), "api"], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, check=True)
            context.inject(fault, seconds(context))
            yield
        finally:
            context.clear_fault()

    return make


def injected_twice(fault: str) -> Inject:
    """A fault that affects one step: two questions of users meet it, one after the other."""

    @contextmanager
    def make(context: FaultContext) -> Iterator[None]:
        try:
            for _ in range(2):
                context.inject(fault)
                ask(context, 30)
            yield
        finally:
            context.clear_fault()

    return make


def wait_for(met: Callable[[], bool], otherwise: str, limit_s: float = FIRST_EFFECT_S) -> None:
    """Raises TimeoutError with `otherwise` if the condition is not met in time."""
    deadline = time.monotonic() + limit_s
    while not met():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.1)


def ask(context: FaultContext, limit_s: float) -> None:
    send_question(context.settings.api_base_url, context.key, limit_s)
