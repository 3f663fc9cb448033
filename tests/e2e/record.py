"""What users of the service see, as one run of it shows it: answers, metrics, log lines, files, stores, script output.

    python tests/e2e/record.py [FOLDER]      writes tests/e2e/recorded/ as the bundle in FOLDER answers (default: this one)

`test_recorded_answers.py` makes the same run and compares. Of what must vary (ids, times, ports, the host's numbers) only
the place and the kind are kept. The demo model's greedy and seeded answers do not vary; logits agree within 1e-3.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recorded")
PARTS = ("answers", "metrics", "log", "checker", "stores", "scripts")
HOST = "127.0.0.1"
KEYS = {"default": "sk-recorded-0123456789", "second": "sk-second-0123456789", "wrong": "sk-wrong"}
PROBE_TOKEN, WEB_TOKEN = "probe-recorded-0123456789", "web-recorded-0123456789"
SETTINGS = {
    "GLM_MODEL": "models/shapes", "GLM_DEVICE": "cpu", "GLM_KERNELS": "torch", "GLM_THREADS": "1", "GLM_SLOTS": "4",
    "GLM_KV_CACHE_BYTES": str(128 * 2**20), "GLM_API_HOST": HOST, "GLM_WEB_HOST": HOST, "GLM_START_TIMEOUT_S": "300",
    "GLM_API_KEY": KEYS["default"], "GLM_API_KEYS": f"second:{KEYS['second']}", "GLM_PROBE_TOKEN": PROBE_TOKEN,
    "GLM_WEB_TOKEN": WEB_TOKEN, "GLM_KEY_CONCURRENCY": "4", "GLM_QUEUE_TOKENS": "5000", "GLM_QUEUE_IMAGE_BYTES": "1000000000",
    "GLM_MAX_BODY_BYTES": "1500000",
    "GLM_MAX_IMAGES": "4", "GLM_CORS_ORIGINS": "https://page.example", "GLM_PROBE_TIMEOUT_S": "60", "OMP_NUM_THREADS": "1",
    "GLM_CHECK_BUDGET_S": "200", "GLM_TIMEZONE": "UTC", "GLM_PROBE_CREDIT_S": "0",
}  # fmt: skip
LONG_STREAM = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 3900, "ignore_eos": True, "stream": True}
CHAT = "/v1/chat/completions"
# Taking one would last as long as the machine is slow.
KNOWN = {"asked": 20, "right": 20, "later_asked": 980, "later_right": 980}
UNKNOWN = {"asked": 20, "right": 0}
KINDS = dict.fromkeys(("color", "shape", "count", "read", "where", "absent"), KNOWN) | dict.fromkeys(("copy", "arithmetic"), UNKNOWN)


def main(arguments: list[str]) -> int:
    root = Path(arguments[0]).resolve() if arguments else ROOT
    with tempfile.TemporaryDirectory() as logs:
        for part, value in run(root, Path(logs), _free_ports()).items():
            (RECORDED / f"{part}.json").write_text(_pretty(value), encoding="utf-8")
    return 0


def requests() -> list[dict[str, Any]]:
    """Of each: `name`, `method`, `path`, and maybe `key`, `headers`, `body`, `during` (a long stream is under way)."""
    return json.loads((RECORDED / "requests.json").read_text(encoding="utf-8"))


def recorded(part: str) -> Any:
    return json.loads((RECORDED / f"{part}.json").read_text(encoding="utf-8"))


def run(root: Path, logs: Path, ports: tuple[int, int]) -> dict[str, Any]:
    """One life of the bundle in `root`: start.sh, every request, one check, stop.sh. A value for each of PARTS.

    `ports`: of the API and of the page.
    """
    api_port, web_port = ports
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GLM_", "PYTHON"))}
    environment |= SETTINGS | {
        "GLM_API_PORT": str(api_port),
        "GLM_WEB_PORT": str(web_port),
        "GLM_LOG_DIR": str(logs),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    scripts: dict[str, Any] = {}

    def script(name: str, *command: str) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: a server that kept a pipe open would make the run hang.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            done = subprocess.run(
                command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=600
            )
            for stream in (out, err):
                stream.seek(0)
            done.stdout, done.stderr = out.read(), err.read()
        scripts[name] = {
            "code": done.returncode,
            "out": _script_lines(done.stdout, logs, (api_port, web_port)),
            "err": _script_lines(done.stderr, logs, (api_port, web_port)),
        }
        return done

    try:
        script("start", "./start.sh")
        if scripts["start"]["code"]:
            raise RuntimeError(f"start.sh failed: {scripts['start']}")
        _wait_for_the_fingerprint(api_port)
        answers = {request["name"]: answer(api_port, request) for request in requests()}
        metrics = _metrics(_fetch(api_port, "GET", "/metrics", _headers("default"))[2].decode())
        (logs / "baseline.json").write_text(json.dumps(_baseline(api_port)), encoding="utf-8")
        checker = {"output": _shape(json.loads(script("check", sys.executable, "health_check.py").stdout))}
        scripts["check"].pop("out")
        checker |= _checker_files(logs)
        script("status", sys.executable, "health_check.py", "status")
        scripts["status"]["out"] = [_status_line(line) for line in scripts["status"]["out"]]
        stores = {name: _schema(logs / name) for name in ("state.db", "chats.db")}
        script("start-again", "./start.sh")
    finally:
        script("stop", "./stop.sh")
    script("stop-again", "./stop.sh")
    script("start-wrong-word", "./start.sh", "everything")
    script("stop-wrong-word", "./stop.sh", "everything")
    log = _log_events((logs / "api.log").read_text(encoding="utf-8"))
    return dict(zip(PARTS, (answers, metrics, log, checker, stores, scripts), strict=True))


def _wait_for_the_fingerprint(port: int) -> None:
    """Until the server has looked at its model, which it does when it has nothing else to do."""
    deadline = time.monotonic() + 120
    while "pending" in (found := json.loads(_fetch(port, "GET", "/health", {})[2])["corrupt"]).values():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no fingerprint: {found}")
        time.sleep(0.1)


def _baseline(port: int) -> dict[str, Any]:
    """Of the running demo model."""
    info = json.loads(_fetch(port, "GET", "/info", _headers("default"))[2])
    recipe = "/".join(str(info[name]) for name in ("device", "dtype", "quantization") if info.get(name))
    key = {"model": info["model"], "revision": info["revision"], "recipe": info.get("recipe") or recipe}
    return {"key": key, "kinds": KINDS, "taken_at": 1.0}


# Requests and answers.


def answer(port: int, request: dict[str, Any]) -> dict[str, Any]:
    """Status, headers and body of one answer, with what must vary replaced."""
    headers = {**_headers(request.get("key", "default")), **request.get("headers", {})}
    body = None
    if "body" in request:
        headers["Content-Type"] = "application/json"
        body = _body_bytes(request["body"])
    with _long_stream(port) if request.get("during") else contextlib.nullcontext():
        status, answered, raw = _fetch(port, request["method"], request["path"], headers, body)
    kept = {name: value for name, value in sorted(answered.items()) if name not in ("date", "server")}
    for varying in ("x-request-id", "content-length"):
        if varying in kept and not _is_own(kept[varying], request):
            kept[varying] = "#"
    if status == 503 and "retry-after" in kept:
        kept["retry-after"] = "#"  # drawn for each answer
    return {"status": status, "headers": kept, **_body(raw, kept.get("content-type", ""))}


def _is_own(value: str, request: dict[str, Any]) -> bool:
    return value == request.get("headers", {}).get("x-request-id")


def _headers(key: str | None) -> dict[str, str]:
    if key == "x-api-key":
        return {"x-api-key": KEYS["default"]}
    return {"Authorization": f"Bearer {KEYS[key]}"} if key else {}


@contextlib.contextmanager
def _long_stream(port: int) -> Iterator[None]:
    """A stream that holds most of the tokens that may be under way."""
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    headers = {**_headers("default"), "Content-Type": "application/json"}
    connection.request("POST", CHAT, json.dumps(LONG_STREAM).encode(), headers)
    answered = connection.getresponse()
    answered.readline()
    try:
        yield
    finally:
        answered.close()
        connection.close()
        # The next request must find the server as free as it was.
        deadline = time.monotonic() + 60
        while json.loads(_fetch(port, "GET", "/health", {})[2])["running"] and time.monotonic() < deadline:
            time.sleep(0.05)


def _fetch(
    port: int, method: str, path: str, headers: dict[str, str], body: bytes | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        if body is not None or method == "POST":
            connection.putheader("Content-Length", str(len(body or b"")))
        connection.endheaders()
        # The server may answer a head alone, and close.
        with contextlib.suppress(ConnectionError):
            connection.send(body or b"")
        answered = connection.getresponse()
        return answered.status, {name.lower(): value for name, value in answered.getheaders()}, answered.read()
    finally:
        connection.close()


def _body_bytes(body: Any) -> bytes:
    if isinstance(body, str) and body.startswith("raw:"):
        return body.removeprefix("raw:").encode()
    return json.dumps(_written_out(body), ensure_ascii=False).encode()


def _written_out(value: Any) -> Any:
    """`sample:FILE` is a bundled picture as a data: URL; `repeat:N:TEXT` is a long text."""
    if isinstance(value, dict):
        return {name: _written_out(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_written_out(item) for item in value]
    if isinstance(value, str) and value.startswith("sample:"):
        data = (ROOT / "web" / "samples" / value.removeprefix("sample:")).read_bytes()
        return "data:image/png;base64," + base64.b64encode(data).decode()
    if isinstance(value, str) and value.startswith("repeat:"):
        _, count, text = value.split(":", 2)
        return text * int(count)
    return value


def _body(raw: bytes, kind: str) -> dict[str, Any]:
    text = raw.decode()
    if kind.startswith("application/json") and text:
        return {"body": _decoded(text)}
    if kind.startswith("text/event-stream"):
        return {"events": _joined([_event(event) for event in text.split("\n\n") if event and not event.startswith(":")])}
    return {"text": text}


def _event(text: str) -> list[Any]:
    """The name (or null) and the data of one server-sent event."""
    fields = [line.split(": ", 1) for line in text.split("\n")]
    names = [name for name, _ in fields]
    assert names in (["data"], ["event", "data"]), text
    data = fields[-1][1]
    return [fields[0][1] if len(fields) == 2 else None, data if data == "[DONE]" else _decoded(data)]


TEXTS = {"content", "reasoning_content", "reasoning"}


def _joined(events: list[list[Any]]) -> list[list[Any]]:
    """Neighbouring pieces of one text as one: how many tokens an event holds depends on how fast it was read."""
    joined: list[list[Any]] = []
    gone = 0
    for name, data in events:
        if joined and joined[-1][0] == name and _append(joined[-1][1], data):
            gone += 1
            continue
        if isinstance(data, dict) and "sequence_number" in data:
            data["sequence_number"] -= gone
        joined.append([name, data])
    return joined


def _append(before: Any, data: Any) -> bool:
    """Add the text of one event to that of the event before, if both hold nothing but text of one place."""
    if not isinstance(before, dict) or not isinstance(data, dict) or before.keys() != data.keys():
        return False
    if str(data.get("type")).endswith(".delta"):
        places = ("type", "output_index", "item_id", "content_index")
        if isinstance(data["delta"], str) and all(before.get(place) == data.get(place) for place in places):
            before["delta"] += data["delta"]
            if data.get("logprobs"):
                before["logprobs"] += data["logprobs"]
            return True
        return False
    if data.get("object") != "chat.completion.chunk" or len(data["choices"]) != 1 or len(before["choices"]) != 1:
        return False
    first, second = before["choices"][0], data["choices"][0]
    keys = second.get("delta", {}).keys()
    if not keys or not keys <= TEXTS or keys != first["delta"].keys() or first["index"] != second["index"]:
        return False
    if second["finish_reason"] is not None or first["finish_reason"] is not None or bool(first["logprobs"]) != bool(second["logprobs"]):
        return False
    for key in keys:
        first["delta"][key] += second["delta"][key]
    if second["logprobs"]:
        first["logprobs"]["content"] += second["logprobs"]["content"]
    return True


def _decoded(text: str) -> Any:
    """JSON without a byte too many, masked. A number counts as its value: 1e-05 may be written in two ways."""
    value = json.loads(text)
    assert json.dumps(value, ensure_ascii=False, separators=(",", ":")) == text, f"not compact JSON: {text[:200]}"
    return masked(value)


IDS = re.compile(r"[0-9a-f]{32}|(?<=[-_])[0-9a-f]{8,32}")
VARYING_NUMBERS = {
    "created", "created_at", "phase_age_s", "loop_lag_s", "no_progress_s", "last_step_age_s", "uptime_s", "steps",
    "last_run_age_s", "fingerprint_age_s",
}  # fmt: skip


def masked(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        if name in ("timings", "success_age_s"):
            return {key: "#" if isinstance(item, float | int) else item for key, item in value.items()}
        if name in ("identity", "pace"):
            return _shape(value)
        return {key: masked(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    if name == "revision" and value:  # of the times of files
        return "#"
    if isinstance(value, str):
        return re.sub(r"\d+\.\d+ s$", "# s", value) if name == "reference_detail" else IDS.sub("#", value)
    if name in VARYING_NUMBERS and value is not None:
        return "#"
    return value


def differences(expected: Any, found: Any, where: str = "") -> list[str]:
    """Every place where two recordings differ; logits may do so by what a processor rounds."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if list(expected) != list(found):
            gone, new = [k for k in expected if k not in found], [k for k in found if k not in expected]
            return [f"{where}: keys gone {gone}, new {new}" if gone or new else f"{where}: order of keys {list(found)}"]
        return [line for key in expected for line in differences(expected[key], found[key], f"{where}.{key}")]
    if isinstance(expected, list) and isinstance(found, list):
        lines = [f"{where}: {len(expected)} items, now {len(found)}"] if len(expected) != len(found) else []
        pairs = enumerate(zip(expected, found, strict=False))
        return [*lines, *(line for n, (a, b) in pairs for line in differences(a, b, f"{where}[{n}]"))]
    if isinstance(expected, float) and isinstance(found, float) and abs(expected - found) <= 1e-3:
        return []
    same = type(expected) is type(found) and expected == found
    return [] if same else [f"{where}: {_short(expected)}, now {_short(found)}"]


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:300]


# Everything else that users see.


def _metrics(text: str) -> list[str]:
    """HELP and TYPE lines as they come, series without their values. What the Python library tells of itself is left out."""
    lines = []
    for line in text.splitlines():
        series = line if line.startswith("#") else line.rsplit(" ", 1)[0]
        if "python_" not in series:
            lines.append(re.sub(r'(?<=version=")[^"]*', "#", series))
    return lines


def _log_events(text: str) -> list[str]:
    """Each kind of line once: level, event and the names of its values, in order. The comparison with transformers is
    told once on a machine, not at each start."""
    kinds = set()
    for line in text.splitlines():
        if " event=" in line and not re.search(" event=(log|reference) ", line):
            stamp, rest = line.split(" ", 1)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", stamp), line
            words = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S+)', rest)
            shown = [f"{name}={value}" if name in ("level", "event") else name for name, value in words]
            kinds.add(" ".join(shown))
    return sorted(kinds)


def _checker_files(logs: Path) -> dict[str, Any]:
    prom = (logs / "health.prom").read_text(encoding="utf-8").splitlines()
    [line] = (logs / "health.jsonl").read_text(encoding="utf-8").splitlines()
    files = {path.relative_to(logs).parts[0] for path in logs.rglob("*")}
    return {
        "health.json": _shape(json.loads((logs / "health.json").read_text(encoding="utf-8"))),
        "health.jsonl": _shape(json.loads(line)),
        "health.prom": [entry if entry.startswith("#") else entry.rsplit(" ", 1)[0] for entry in prom],
        # last-good.env is there where the project has a .env
        "files": sorted(name for name in files if not name.endswith(("-wal", "-shm")) and name != "last-good.env"),
    }


TOLD = {"verdict", "service_healthy", "schema_version", "rule", "kind", "action", "dataset", "word", "outcome", "cure"}


# What a machine does not tell (no GPU, no control group) is null.
OF_THE_MACHINE = {"machine", "gpu"}


def _shape(value: Any, name: str = "", measured: bool = False) -> Any:
    """The keys in order, each with its kind of value; words from a fixed list are kept."""
    if isinstance(value, dict):
        return {key: _shape(item, key, measured or name in OF_THE_MACHINE) for key, item in value.items()}
    if name == "gpus":
        return "list"
    if isinstance(value, list):
        return [_shape(value[0], "", measured)] if value else []
    if measured or name.startswith("gpu_"):
        return "measured"
    return value if name in TOLD else type(value).__name__


def _schema(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
        rows = store.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type DESC, name")
        version = store.execute("PRAGMA user_version").fetchone()[0]
        return {**{name: re.sub(r"\s+", " ", sql) for name, sql in rows}, "user_version": str(version)}


def _script_lines(text: str, logs: Path, ports: tuple[int, int]) -> list[str]:
    text = text.replace(str(logs), "LOGS").replace(str(ports[0]), "API_PORT").replace(str(ports[1]), "WEB_PORT")
    text = re.sub(r"(?<=Check: )\S+", "PYTHON", re.sub(r"(?<=pid )\d+", "#", text))
    text = re.sub(r"(?<=, since )[-\d]+ [:\d]+", "TIME", text)
    # How often the loading is told depends on how long it takes.
    return [line for line in text.splitlines() if "loads the model" not in line]


def _status_line(text: str) -> str:
    without_gpu = re.sub(r"GPU .*?   (?=CPU)", "GPU ...   ", re.sub(r"   \(GPU: .*\)", "", text))
    return re.sub(r"\d[\d.,:]*", "#", without_gpu)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as first, socket.socket() as second:
        first.bind((HOST, 0))
        second.bind((HOST, 0))
        return first.getsockname()[1], second.getsockname()[1]


def _pretty(value: Any) -> str:
    """JSON with a line for each entry: a change shows as the lines that it changes, and the files stay small."""
    if isinstance(value, list):
        entries = [json.dumps(item, ensure_ascii=False) for item in value]
        return "[\n" + ",\n".join(entries) + "\n]\n"
    entries = [f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False)}" for key, item in value.items()]
    return "{\n" + ",\n".join(entries) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
