"""The parts of start.sh and stop.sh that need more than a shell: ports, pid files, launching, waiting, stopping.

    python -m deploy.service check   LOGS PART HOST PORT [--restart]   0 may be started, 10 runs already, 3 port in use, 2 not writable
    python -m deploy.service changed LOGS PART=PORT...        prints whether code or settings are others than those of what runs
    python -m deploy.service launch  LOGS PART PORT           0 launched and recorded
    python -m deploy.service wait    LOGS SECONDS PART=HOST...  0 all answer (or are still loading), 1 one does not
    python -m deploy.service follow  LOGS HOST                shows how the API loads until it has; 0 it answers, 1 it failed
    python -m deploy.service stop    LOGS SECONDS PART=PORT... [--keep | --failed-start] [--restarting=PID]   0 stopped, ports free; 1 not stopped; 3 port held by another process
    python -m deploy.service halt    PART...                  the same with the settings that can be read, for stop.sh
    python -m deploy.service alive   LOGS PART...             0 all are running, or restarted by a person, or stopped on purpose beside one that runs; 1 one is gone; 4 all were stopped
    python -m deploy.service become  PART                     records itself and becomes the server: the start command of a unit

`check`, `changed` and `launch` take what deploy/identity.py printed from START_SH_IDENTITY. With START_SH_CURE=1, which the checker sets,
`launch` starts nothing that was stopped on purpose. Standard library only and no syntax newer
than Python 3.8, so that stop.sh works when the environment is gone. Parts are `api` and `web`, and `engine` where
GLM_ENGINE_COMMAND starts one; with several replicas `api/0`, `api/1` and so on, each with a folder of its own in LOGS, and
`front`, the nginx before them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deploy import plain_settings
from deploy.loading import LoadingLine, describe
from monitor.observe import ports, process_search, processes, unit
from monitor.observe.http_exchange import exchange
from monitor.observe.processes import ProcessRecord

ROOT = Path(__file__).resolve().parent.parent
HEALTH = {"api": "/health", "web": "/_stcore/health", "engine": "/health", "front": "/glm-front"}
NAMES = {"api": "The API", "web": "The page", "engine": "The engine", "front": "nginx"}
REPLICAS, REPLICA_VARIABLE = "replicas", "START_SH_REPLICA"  # as in settings.py, which stop.sh can do without
MAY_START, FAILED, NOT_WRITABLE, PORT_IN_USE, ALL_STOPPED, RUNNING = 0, 1, 2, 3, 4, 10
LOG_LINES = 25
ANSWER_LIMIT_S = 2.0
STOP_MARGIN_S = 5.0  # beyond the delay and the time for running answers
UNIT_STOP_MARGIN_S = 30.0  # more than the unit has for its own stop
RESTART_MARGIN_S = 120.0  # of `start.sh --restart`, beyond the stops: to kill, for a unit, and for a slow machine
FRONT_CONF = process_search.FRONT_CONF
UNIT_WAIT_S = 30.0  # for systemd to start a unit, of which it waits some seconds after an end


def place_of(log_dir: Path, part: str) -> tuple[Path, str]:
    """(folder of its records and its log, what runs there: api, web or front)."""
    kind, _, number = part.partition("/")
    return (log_dir / REPLICAS / number, kind) if number else (log_dir, kind)


def name_of(part: str) -> str:
    return f"Replica {part.partition('/')[2]}" if "/" in part else NAMES[part]


def check(logs: Path, part: str, host: str, port: int, identity: dict[str, Any], restart: bool) -> int:
    """With `restart` a process of ours that runs is no obstacle, on whatever port."""
    log_dir, kind = place_of(logs, part)
    log_dir.mkdir(parents=True, exist_ok=True)
    entry = process_search.find_record(log_dir, kind, port)
    if entry is not None and not processes.is_running(entry):
        entry = None
    if entry is not None and not restart:
        if entry.port == port:
            _say(f"Already running: {part} (port {port}, since {_started(entry)})")
            if kind == "front":
                _say_other_configuration(log_dir)
            else:
                _say_differences(part, entry, identity)
            return RUNNING
        _complain(
            f"{name_of(part)} is already running on port {entry.port} (pid {entry.pid}, since {_started(entry)}), but the settings"
            f" now specify {port}. To stop it and start what is here: ./start.sh --restart {part}"
        )
        return PORT_IN_USE
    for listener in ports.listeners(port) if entry is None else ():
        folder = process_search.elsewhere(listener.pid, log_dir) if listener.pid else ""
        if folder:
            _complain(
                f"Port {port} is taken by the installation that uses {folder} (pid {listener.pid}), which has other settings (GLM_ENV_FILE)."
                " Choose other ports: GLM_API_PORT, GLM_WEB_PORT"
            )
            return PORT_IN_USE
    reason = ports.why_taken(host, port, freed=entry is not None and entry.port == port)
    if reason:
        if entry is None:
            processes.note_failed_start(log_dir, kind, f"{name_of(part)} cannot start: {reason}")
        _complain(f"{name_of(part)} cannot start: {reason}")
        return PORT_IN_USE
    log = log_dir / f"{kind}.log"
    if log.exists() and not os.access(str(log), os.W_OK):
        _complain(f"{name_of(part)} cannot start: {log} belongs to {_owner(log)} and is not writable for {processes.user_name(os.geteuid())}")
        return NOT_WRITABLE
    return RUNNING if entry is not None else MAY_START


def _say_differences(part: str, entry: ProcessRecord, identity: dict[str, Any]) -> None:
    """Whether it was started from other code or with other settings than are here now."""
    differences = []
    if not entry.code:
        differences.append("an unknown version: it was started by a start.sh that did not note its code")
    elif identity and entry.code != identity["code"]:
        differences.append(f"an older version: the code here has changed since it was started on {_started(entry)}")
    names = _changed_settings(entry, identity)
    if names:
        differences.append(f"with earlier settings: {', '.join(names)} changed since its start")
    if process_search.log_of(entry.pid).endswith(process_search.DELETED):
        differences.append("without a log: its file was deleted")
    for difference in differences:
        _say(f"  It runs {difference}")
    if differences:
        _say(f"  To stop it and start what is here: ./start.sh --restart {part}")


def _say_other_configuration(log_dir: Path) -> None:
    """Whether nginx was started with another configuration than the settings give now."""
    from deploy.proxy import render_front
    from settings import load

    with contextlib.suppress(OSError, ValueError):
        # The checker takes replicas out, which is no difference.
        if (log_dir / FRONT_CONF).read_text(encoding="utf-8").replace(" down;", ";") != render_front(load()):
            _say("  It runs with earlier settings. To stop it and start what is here: ./start.sh --restart front")


def _changed_settings(entry: ProcessRecord, identity: dict[str, Any]) -> list[str]:
    before = process_search.mark_of(entry.pid).get("settings")
    if not identity or not isinstance(before, dict):
        return []
    now = identity["settings"]
    return [f"GLM_{name.upper()}" for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def changed(logs: Path, configured_ports: dict[str, int], identities: dict[str, Any]) -> int:
    """Prints, to go on with after "What ran before was stopped", whether the same could be started again."""
    code, names = False, set[str]()
    for part, port in configured_ports.items():
        log_dir, kind = place_of(logs, part)
        entry = process_search.find_record(log_dir, kind, port) if kind != "front" else None
        if entry is not None and processes.is_running(entry):
            identity = identities.get(kind, {})
            code = code or entry.code != identity.get("code", entry.code) or not entry.code
            names.update(_changed_settings(entry, identity))
    if code:
        _say(", and its code is no longer here.")
    elif names:
        _say(f", and it had other settings: {', '.join(sorted(names))} changed since its start.")
    else:
        _say("; its code and its settings have not changed since its start.")
    return 0


def launch(logs: Path, part: str, port: int, identity: dict[str, Any], cure: bool = False) -> int:
    """The child writes the pid file before it becomes the server, so that there is no server without a pid file.

    start.sh runs this with the signals of a terminal ignored, so it is not interrupted between the two. A `cure` looks for the
    mark of a stop after it has written the pid file, and `stop` for the pid file after it has set the mark: one sees the other.
    """
    log_dir, kind = place_of(logs, part)
    owner = _owner_of(part)
    if owner:
        return _launch_unit(log_dir, part, owner, cure)
    if any(process.log_dir and process.log_dir.resolve() == log_dir.resolve() for process in process_search.search(kind, log_dir)):
        _say(f"{name_of(part)} was started meanwhile")  # as by the checker
        processes.end_restart(log_dir, kind)
        return 0
    path = log_dir / f"{kind}.log"
    variables, card = _variables_of(part)
    mark = {"port": port, "log_dir": str(log_dir), **({"card": card} if card else {}), **identity}

    def record_itself() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if not cure:
            processes.unmark_stopped(log_dir, kind)
        _record_itself(log_dir, kind, mark)
        processes.end_restart(log_dir, kind)
        if cure and processes.was_stopped_by_request(log_dir, kind):
            raise InterruptedError

    try:
        command = _prepare_front(log_dir) if kind == "front" else [sys.executable, "-m", process_search.module_of(kind)]
        with open(_open_log(path), "ab") as log:
            mark["log_offset"] = log.tell()
            subprocess.Popen(
                command, cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=record_itself,
                env={**os.environ, **variables, process_search.MARK: json.dumps(mark)},
            )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        why = (error.strerror or str(error)) if isinstance(error, OSError) else f"its pid file cannot be written to {log_dir}"
        if isinstance(error, ValueError):
            why = str(error)
        if cure and processes.was_stopped_by_request(log_dir, kind):
            why = "it was stopped on purpose meanwhile"
        processes.note_failed_start(log_dir, kind, f"{name_of(part)} was not started: {why}")
        _complain(f"{name_of(part)} was not started: {why}")
        return FAILED
    return 0


def _variables_of(part: str) -> tuple[dict[str, str], str]:
    """(what an API has in its environment of its number and its card, the card; empty if none was chosen)."""
    kind, _, number = part.partition("/")
    cards = os.environ.get("START_SH_GPUS", "")
    if kind != "api" or not (number or cards):
        return {}, ""
    card = cards.split(",")[int(number or 0)] if cards else ""
    variables = {REPLICA_VARIABLE: number} if number else {}
    # By the numbers of nvidia-smi: CUDA's own order begins with the fastest card.
    return {**variables, **({"CUDA_VISIBLE_DEVICES": card, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if card else {})}, card


def _prepare_front(log_dir: Path) -> list[str]:
    """Writes the configuration of nginx, has it checked, and returns the command. Raises OSError, and ValueError for what it refuses."""
    from deploy import replicas
    from deploy.proxy import render_front
    from settings import load

    conf, program = log_dir / FRONT_CONF, replicas.nginx()
    if not program:
        raise ValueError("nginx is not installed. On Debian and Ubuntu: apt-get install nginx")
    (log_dir / "front").mkdir(exist_ok=True)
    conf.write_text(render_front(load()), encoding="utf-8")
    command = [program, "-p", f"{log_dir}/", "-c", str(conf)]
    tested = subprocess.run([*command, "-t"], cwd=str(ROOT), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
    if tested.returncode:
        raise ValueError(f"nginx refuses {conf}: {tested.stdout.decode('utf-8', 'replace').strip()}")
    return command


def _owner_of(part: str) -> str:
    """The unit of systemd that starts it, if there is one."""
    return unit.owner_of(part) if part in unit.NAMES else ""


def _record_itself(log_dir: Path, part: str, mark: dict[str, Any]) -> None:
    itself = processes.read_stat(os.getpid())
    assert itself is not None
    entry = ProcessRecord(
        itself.pid, itself.start_time, mark["port"], processes.boot_id(), str(ROOT), mark["log_offset"], mark.get("code", ""),
        processes.id_of(ROOT),
    )  # fmt: skip
    processes.write_record(log_dir, part, entry)


def _launch_unit(log_dir: Path, part: str, owner: str, cure: bool) -> int:
    """Has systemd start what only it starts. A user who may not ask for it waits: it starts again by itself what has ended."""
    if cure and processes.was_stopped_by_request(log_dir, part):
        _complain(f"{NAMES[part]} was not started: it was stopped on purpose meanwhile")
        return FAILED
    if not cure:
        processes.unmark_stopped(log_dir, part)
    # Without waiting until it is ready: `wait` shows how it loads.
    problem = unit.systemctl("start", "--no-block", owner)
    deadline = time.monotonic() + UNIT_WAIT_S
    while time.monotonic() < deadline:
        entry = processes.read_record(log_dir, part)
        if entry is not None and processes.is_running(entry):
            processes.end_restart(log_dir, part)
            return 0
        state = unit.state_of(owner)
        if state == "failed" or (problem and state in ("inactive", "")):
            break
        time.sleep(0.2)
    state = unit.state_of(owner) or "unknown"
    _complain(f"{NAMES[part]} was not started: {owner} is {state}{f' ({problem})' if problem else ''}. See: systemctl status {owner}")
    if state == "failed":
        _complain(f"  To try again: systemctl reset-failed {owner} && systemctl start {owner}")
    return FAILED


def become(part: str) -> int:
    """The start command of a unit: leaves the pid file and the mark that `launch` leaves, and goes on as the server."""
    from deploy.identity import identity
    from monitor import swap
    from settings import ENV_FILE, SettingsError, load

    try:
        settings = load()
        if swap.journal_of(ENV_FILE).exists():
            raise SettingsError("A restore of a backup was cut off. To finish it: python health_check.py restore")
        if settings.replica_count > 1:
            raise SettingsError(f"A unit of systemd runs one API, and the settings say {settings.replica_count} replicas (GLM_GPUS, GLM_REPLICAS)")
        log_dir, port = settings.log_dir.resolve(), {"api": settings.api_port, "web": settings.web_port}[part]
        path = log_dir / f"{part}.log"
        offset = path.stat().st_size if path.is_file() else 0
        mark = {"port": port, "log_dir": str(log_dir), "log_offset": offset, **identity(ROOT, part, settings)}
        _record_itself(log_dir, part, mark)
    except SettingsError as error:
        _complain(str(error))
        return NOT_WRITABLE
    except OSError as error:
        _complain(f"{NAMES[part]} was not started: {error.filename or ROOT}: {error.strerror}")
        return FAILED
    os.environ[process_search.MARK] = json.dumps(mark)
    if part == "api" and settings.gpus:
        os.environ.update({"CUDA_VISIBLE_DEVICES": settings.gpus, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"})
    os.execv(sys.executable, [sys.executable, "-m", f"{part}.server"])


def _open_log(path: Path) -> int:
    """A descriptor for appending. A pipe or socket in its place is removed: it would hold the server whenever nobody reads.

    Raises OSError.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
    with contextlib.suppress(OSError):
        kind = os.stat(str(path)).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
            path.unlink()
    descriptor = os.open(str(path), flags, 0o644)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{path} is a pipe")
    os.set_blocking(descriptor, True)
    return descriptor


def wait(logs: Path, limit_s: float, hosts: dict[str, str]) -> int:
    """Polls until every part answers. Fails at once if a part dies or reports that its engine is dead."""
    deadline = time.monotonic() + limit_s
    waiting = dict(hosts)
    line = LoadingLine(sys.stdout)
    while waiting:
        for part, host in list(waiting.items()):
            log_dir, kind = place_of(logs, part)
            entry = processes.read_record(log_dir, kind)
            if entry is None or not processes.is_running(entry):
                line.close()
                return _fail(logs, part, entry, "exited right after it was started")
            state, detail = _answer(part, host, entry)
            loading = state in ("loading", "download")
            if not loading:
                line.close()
            if state == "up":
                processes.note_failed_start(log_dir, kind, "")
                del waiting[part]
            elif state == "dead":
                return _fail(logs, part, entry, f"reports that it cannot serve: {detail}")
            elif time.monotonic() >= deadline and not loading:
                return _fail(logs, part, entry, f"does not answer after {limit_s:g} s ({detail})")
            elif time.monotonic() >= deadline:
                line.close()
                _say(f"{name_of(part)} is up and still loads the model ({detail}). Its log: {log_dir / (kind + '.log')}")
                del waiting[part]
            elif loading:
                line.show(_loads(part, state, detail), state == "download")
        time.sleep(0.2 if waiting else 0)
    return 0


def follow(log_dir: Path, host: str) -> int:
    """For someone at a terminal. The server runs whether anyone looks or not, so that nothing is stopped at the end."""
    line, said = LoadingLine(sys.stdout), False
    while True:
        entry = processes.read_record(log_dir, "api")
        if entry is None or not processes.is_running(entry):
            line.close()
            return _fail(log_dir, "api", entry, "has ended")
        state, detail = _answer("api", host, entry)
        if state in ("loading", "download"):
            if not said:
                _say("The model is still loading. Ctrl-C ends this display, not the loading.")
                said = True
            line.show(_loads("api", state, detail), state == "download")
        elif state in ("up", "dead"):
            line.close()
            if state == "dead":
                return _fail(log_dir, "api", entry, f"reports that it cannot serve: {detail}")
            if said:
                _say("The API answers")
            return 0
        time.sleep(0.5)


def _loads(part: str, state: str, detail: str) -> str:
    return f"{name_of(part)} {'downloads' if state == 'download' else 'loads'} the model: {detail}"


def stop(
    logs: Path, grace_s: float, configured_ports: dict[str, int], certain: bool = True, keep: bool = False, why: str = "stop.sh",
    restarting: int = 0,
) -> int:  # fmt: skip
    """Stops what serves these ports or writes to this log folder. `keep`: leaves the pid files, for what is started again.

    `restarting`: the pid of the start.sh that will do so; until then the checker must take no part for crashed.

    Without `certain`, the ports and the folder may be wrong: if they match nothing, all that runs in this project is stopped.
    """
    for part in configured_ports:
        log_dir, kind = place_of(logs, part)
        if restarting:
            with contextlib.suppress(OSError):
                processes.begin_restart(log_dir, kind, restarting, len(configured_ports) * grace_s + RESTART_MARGIN_S)
        else:
            processes.end_restart(log_dir, kind)

    def one(part: str) -> int:
        return _stop_one(logs, grace_s, part, configured_ports[part], certain, keep, why)

    # Replicas drain side by side, and nginx after them: running answers go through it.
    first = [part for part in configured_ports if "/" in part]
    with ThreadPoolExecutor(max(1, len(first))) as pool:
        outcomes = list(pool.map(one, first))
    outcomes += [one(part) for part in configured_ports if part not in first]
    return next((outcome for outcome in outcomes if outcome), 0)


def _stop_one(logs: Path, grace_s: float, part: str, configured_port: int, certain: bool, keep: bool, why: str) -> int:
    log_dir, kind = place_of(logs, part)
    marked = [] if keep else _mark({log_dir}, kind, why)
    record = processes.read_record(log_dir, kind)
    if record is not None and process_search.elsewhere(record.pid, log_dir):
        record = None
    found = process_search.search(kind, log_dir, configured_port)
    if not found and not certain:
        found = [process for process in process_search.search(kind) if not process_search.elsewhere(process.record.pid, log_dir)]
    owner = _owner_of(part)
    if owner:
        # A user who may not ask for it ends the process below; the mark keeps the unit from starting it again.
        unit.systemctl("stop", owner, limit_s=max(unit.LIMIT_S, grace_s + UNIT_STOP_MARGIN_S))
    entries = [process.record for process in found]
    if record is not None and processes.members(record) and record.pid not in [entry.pid for entry in entries]:
        entries.append(record)
    folders = {log_dir, *(process.log_dir for process in found if process.log_dir)}
    marked += [] if keep else _mark(folders - {log_dir}, kind, why)
    failed = [entry for entry in entries if not _end(part, entry, grace_s)]
    if failed:
        for folder in marked:
            processes.unmark_stopped(folder, kind)
        return FAILED
    if not entries:
        _say(f"{name_of(part)} was not running")
    if not keep:
        for folder in folders:
            _forget(folder, kind)
    for port in sorted({entry.port for entry in entries if entry.port} or {record.port if record else configured_port}):
        others = ports.listeners(port)
        if others:
            shown = ", ".join(listener.describe() for listener in others)
            _complain(f"Port {port} is still held by {shown}, which was not started by start.sh here")
            return PORT_IN_USE
    return 0


def halt(parts: list[str]) -> int:
    settings = plain_settings.read(ROOT)
    log_dir = settings.log_dir.resolve()
    stopped: dict[str, int] = {}
    for part in parts:
        if part == "api":
            stopped.update(_with_replicas(log_dir, settings))
        elif part in settings.ports:
            stopped[part] = settings.ports[part]
        else:  # the engine, whose command is no longer in the settings
            record = processes.read_record(log_dir, part)
            if record is not None:
                stopped[part] = record.port
    return stop(log_dir, settings.stop_s + STOP_MARGIN_S, stopped, settings.certain)


def _with_replicas(log_dir: Path, settings: plain_settings.StopSettings) -> dict[str, int]:
    """The parts of the API and their ports: what the settings say, and what runs of an earlier start with other settings."""
    api_port = settings.ports["api"]
    known = {int(entry.name) for entry in (log_dir / REPLICAS).glob("*") if entry.name.isdigit()}
    replicas = {f"api/{number}": api_port + 10 + number for number in sorted(known | set(range(settings.replicas)))}
    if settings.replicas > 1:
        alone = {"api": api_port} if _is_there(log_dir, "api") else {}
        return {**replicas, "front": api_port, **alone}
    found = {part: port for part, port in {**replicas, "front": api_port}.items() if _is_there(log_dir, part)}
    if not settings.certain and process_search.search("front"):
        found["front"] = api_port
    return {"api": api_port, **found}


def _is_there(logs: Path, part: str) -> bool:
    log_dir, kind = place_of(logs, part)
    record = processes.read_record(log_dir, kind)
    return (record is not None and bool(processes.members(record))) or bool(process_search.search(kind, log_dir))


def _end(part: str, entry: ProcessRecord, grace_s: float) -> bool:
    owner = processes.foreign_owner(entry)
    if owner:
        who = owner if owner == "root" else f"{owner} or root"
        _complain(f"{name_of(part)} (pid {entry.pid}) was started by {owner}, so only {who} can stop it")
        return False
    # nginx ends at once on SIGTERM, with the answers that go through it.
    left = processes.end(entry, grace_s, first=signal.SIGQUIT if part == "front" else signal.SIGTERM)
    if left:
        shown = ", ".join(f"pid {pid} ({processes.command_of(pid)})" for pid in left)
        _complain(f"{name_of(part)} could not be killed: {shown}. Reboot the machine.")
        return False
    _say(f"{name_of(part)} is stopped (pid {entry.pid})")
    return True


def _mark(folders: set[Path], part: str, why: str) -> list[Path]:
    """The folders that were not marked before. On a full disk `_forget` makes the mark of the pid file."""
    marked = []
    for folder in folders:
        with contextlib.suppress(OSError):
            if processes.mark_stopped(folder, part, why):
                marked.append(folder)
    return marked


def _forget(log_dir: Path, part: str) -> None:
    path = processes.record_path(log_dir, part)
    try:
        processes.forget(log_dir, part)
    except OSError as error:
        _complain(f"{path} cannot be removed ({error.strerror}); it names a process that no longer runs and may stay")


def alive(logs: Path, parts: list[str]) -> int:
    if "api" in parts and plain_settings.read(ROOT).replicas > 1:
        parts = [*(part for part in parts if part != "api"), *_with_replicas(logs, plain_settings.read(ROOT))]
    places = {part: place_of(logs, part) for part in parts}
    records = {part: process_search.find_record(*place) for part, place in places.items()}
    down = [part for part, entry in records.items() if entry is None or not processes.is_running(entry)]
    down = [part for part in down if not processes.is_restarting(*places[part])]
    if any(not processes.was_stopped_by_request(*places[part]) for part in down):
        return FAILED
    return ALL_STOPPED if len(down) == len(parts) else 0


def _answer(part: str, host: str, entry: ProcessRecord) -> tuple[str, str]:
    """(`up`, `loading`, `download`, `dead` or `silent`, detail)."""
    pids = {listener.pid for listener in ports.listeners(entry.port)} - {None}
    ours = set(processes.members(entry))
    if pids and not pids & ours:
        return "silent", f"port {entry.port} belongs to pid {min(p for p in pids if p)}, which is another process"
    kind = part.partition("/")[0]
    reply = exchange(f"http://{_reachable(host)}:{entry.port}{HEALTH[kind]}", ANSWER_LIMIT_S)
    if kind != "api":
        return ("up", "") if reply.status == 200 else ("silent", reply.detail or f"HTTP {reply.status}")
    health = reply.json() or {}
    state = health.get("state")
    if part == "engine" and state is None:
        # Of whatever kind: vLLM opens its port only once it has loaded, llama.cpp says 503 until then.
        return ("up", "") if reply.status == 200 else ("loading", reply.detail or f"HTTP {reply.status}")
    if state is None:
        return "silent", reply.detail or f"HTTP {reply.status} without a state"
    if state in ("idle", "busy"):
        return "up", ""
    if state == "loading" and health.get("engine"):
        return "loading", str(health.get("reason"))
    if state == "loading":
        return "download" if health.get("download") else "loading", describe(health)
    return ("dead" if state == "dead" else "silent"), str(health.get("reason") or state)


def _reachable(host: str) -> str:
    """The address of a server bound to `host`, from this machine."""
    if host in ("", "0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _fail(logs: Path, part: str, entry: ProcessRecord | None, why: str) -> int:
    log_dir, kind = place_of(logs, part)
    path = log_dir / f"{kind}.log"
    lines: list[str] = []
    if path.is_file():
        with path.open("rb") as file:
            size = path.stat().st_size
            file.seek(max(min(entry.log_offset if entry else 0, size), size - 65536))  # a crash loop may have written gigabytes
            lines = file.read(65536).decode("utf-8", "replace").splitlines()[-LOG_LINES:]
    why = why.rstrip(".")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    processes.note_failed_start(log_dir, kind, f"{name_of(part)} {why}" + (f". Last line of {path.name}: {last}" if last else ""))
    _complain(f"{name_of(part)} {why}. The last lines of {path}:")
    for line in lines or ["(empty)"]:
        _complain(f"  {line}")
    return FAILED


def _started(entry: ProcessRecord) -> str:
    age_s = processes.age_s(entry)
    return "an unknown time" if age_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - age_s))


def _owner(path: Path) -> str:
    return processes.user_name(path.stat().st_uid)


def _say(text: str) -> None:
    _print(text, sys.stdout)


def _complain(text: str) -> None:
    _print(text, sys.stderr)


def _print(text: str, stream: Any) -> None:
    """Goes on without output if the terminal is gone, the reader has ended or the disk is full: the work matters more."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _pairs(arguments: list[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments)


def main(arguments: list[str]) -> int:
    command, flags = arguments[0], [argument for argument in arguments if argument.startswith("--")]
    rest = [argument for argument in arguments[1:] if argument not in flags]
    cure = os.environ.pop("START_SH_CURE", "") == "1"
    identities = json.loads(os.environ.pop("START_SH_IDENTITY", "") or "{}")
    if command == "halt":
        return halt(rest)
    if command == "become":
        return become(rest[0])
    log_dir, rest = Path(rest[0]), rest[1:]
    if command == "check":
        return check(log_dir, rest[0], rest[1], int(rest[2]), identities.get(rest[0].partition("/")[0], {}), "--restart" in flags)
    if command == "changed":
        return changed(log_dir, {part: int(port) for part, port in _pairs(rest).items()}, identities)
    if command == "launch":
        return launch(log_dir, rest[0], int(rest[1]), identities.get(rest[0].partition("/")[0], {}), cure)
    if command == "wait":
        return wait(log_dir, float(rest[0]), _pairs(rest[1:]))
    if command == "follow":
        return follow(log_dir, rest[0])
    if command == "stop":
        configured_ports = {part: int(port) for part, port in _pairs(rest[1:]).items()}
        why = processes.FAILED_START if "--failed-start" in flags else "stop.sh"
        restarting = next((int(flag.partition("=")[2]) for flag in flags if flag.startswith("--restarting=")), 0)
        return stop(log_dir, float(rest[0]), configured_ports, keep="--keep" in flags, why=why, restarting=restarting)
    if command == "alive":
        return alive(log_dir, rest)
    raise SystemExit(__doc__)


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
