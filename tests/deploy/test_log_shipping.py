"""Every kind of line that the bundle writes becomes a document in ECS fields, by what is shipped for Vector and for Filebeat.

Vector's transforms are compiled and run by its own language (VRL); Filebeat's script runs in Node. Neither program itself is
in a registry of packages: how they follow files is their own affair, and not tried here.
"""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from nginx_process import Nginx
from ports import free_port
from started_api import KEY, PROBE_TOKEN, ROOT, WAIT_S, StartedApi, headers, long_question, picture_question
from vrl_python import VRLRuntime

from deploy.proxy import Proxy
from settings import Settings

VECTOR = tomllib.loads((ROOT / "deploy" / "vector" / "vector.toml").read_text(encoding="utf-8"))
FILEBEAT = yaml.safe_load((ROOT / "deploy" / "filebeat" / "filebeat.yml").read_text(encoding="utf-8"))
RAW, DOCUMENTS = ("api.log", "web.log", "health_check.log"), ("health.jsonl", "access.log")

# Field: type, as ECS 8.17 has them. Below `labels` all is a keyword, below `glm` a name has one type.
ECS = {
    "@timestamp": "date", "ecs.version": "keyword", "message": "text", "log.level": "keyword", "log.logger": "keyword",
    "log.file.path": "keyword", "service.name": "keyword", "service.type": "keyword", "service.state": "keyword",
    "host.name": "keyword", "event.kind": "keyword", "event.category": "keyword", "event.type": "keyword", "event.action": "keyword",
    "event.dataset": "keyword", "event.outcome": "keyword", "event.duration": "long", "error.code": "keyword",
    "error.stack_trace": "text", "http.request.id": "keyword", "http.request.method": "keyword", "http.request.bytes": "long",
    "http.response.status_code": "long", "http.response.bytes": "long", "url.path": "keyword", "user.name": "keyword",
    "user_agent.original": "keyword", "source.ip": "keyword",
}  # fmt: skip
ALLOWED = {
    "event.kind": {"event", "metric"}, "event.category": {"web", "process"}, "event.type": {"access", "info"},
    "event.outcome": {"success", "failure", "unknown"},
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """Real lines by file: of the API, the page, the checker and nginx, with refusals, a failure and a traceback."""
    folder = tmp_path_factory.mktemp("bundle") / "logs"
    folder.mkdir()
    with StartedApi(folder, GLM_KEY_REQUESTS_PER_MINUTE="3") as api:
        page_port = free_port()
        settings = {
            "GLM_LOG_DIR": str(folder), "GLM_API_KEY": KEY, "GLM_PROBE_TOKEN": PROBE_TOKEN, "GLM_API_URL": api.url,
            "GLM_WEB_PORT": str(page_port), "GLM_WEB_HOST": "127.0.0.1", "GLM_CURE": "off", "GLM_ELASTICSEARCH_URL": "http://127.0.0.1:1",
        }  # fmt: skip
        env = {**{k: v for k, v in os.environ.items() if not k.startswith("GLM_")}, **settings}
        with (folder / "web.log").open("ab") as log:
            page = subprocess.Popen([sys.executable, "-m", "web.server"], cwd=ROOT, env=env, stdout=log, stderr=log)
        nginx_folder = folder.parent / "nginx"
        nginx_folder.mkdir()
        with Nginx(nginx_folder, Proxy(api=f"127.0.0.1:{api.port}", page=f"127.0.0.1:{page_port}"), Settings()) as nginx:
            use(nginx.url)
        with (folder / "health_check.log").open("ab") as log:
            subprocess.run([sys.executable, "health_check.py", "run", "--quiet"], cwd=ROOT, env=env, stderr=log, timeout=WAIT_S, check=False)
        deadline = time.monotonic() + WAIT_S
        while "page address" not in (folder / "web.log").read_text():
            assert page.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        page.kill()
        page.wait(WAIT_S)
    (folder / "access.log").write_bytes((nginx_folder / "access.log").read_bytes())
    yield {name: (folder / name).read_text(encoding="utf-8").splitlines() for name in (*RAW, *DOCUMENTS)}


def use(url: str) -> None:
    with httpx.Client(base_url=url, headers=headers(), timeout=WAIT_S) as client:
        path = "/v1/chat/completions"
        statuses = [
            client.post(path, json=picture_question()).status_code, client.post(path, json={"messages": 5}).status_code,
            client.post(path, json=long_question(5, no_such_field=1)).status_code, client.post(path, json={}).status_code,
            client.get("/v1/models", headers=headers("wrong")).status_code, client.get('/v1/"quoted" = path').status_code,
            client.get("/").status_code,
        ]  # fmt: skip
    assert {200, 400, 401, 404, 429} <= set(statuses), statuses


def events_of(lines: list[str], pattern: str) -> list[str]:
    """Lines joined as both programs do it: one that does not begin a record belongs to the one before."""
    groups: list[list[str]] = []
    for line in lines:
        if re.search(pattern, line) or not groups:
            groups.append([])
        groups[-1].append(line)
    return ["\n".join(group) for group in groups]


def by_vector(transform: str, name: str, messages: list[str]) -> list[dict[str, Any]]:
    runtime, program = VRLRuntime(), VECTOR["transforms"][transform]["source"]
    path = f"/opt/glm/logs/{name}"
    documents = [runtime.execute(program, {"message": text, "file": path, "host": "box"}).processed_event for text in messages]
    ids = {document.pop(VECTOR["sinks"]["elasticsearch"]["id_key"]) for document in documents}
    assert len(ids) == len(messages), "each has an id of its own, so that it is not there twice when it is sent again"
    return documents


def by_filebeat(name: str, messages: list[str]) -> list[dict[str, Any]]:
    script = ROOT / "deploy" / "filebeat" / "lines.js"
    sent = "\n".join(json.dumps({"path": f"/opt/glm/logs/{name}", "message": text}) for text in messages)
    command = ["node", str(Path(__file__).with_name("run_lines.js")), str(script)]
    done = subprocess.run(command, input=sent, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def flat(document: dict[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from flat(value, f"{start}{name}.")
        else:
            yield f"{start}{name}", value


class Fields:
    """What is wrong with the fields of many documents."""

    def __init__(self) -> None:
        self._types: dict[str, set[str]] = {}

    def check(self, document: dict[str, Any]) -> None:
        for name, value in flat(document):
            values = value if isinstance(value, list) else [value]
            if name.startswith("glm."):
                kinds = {"number" if type(v) in (int, float) else type(v).__name__ for v in values if v is not None}
                self._types.setdefault(name, set()).update(kinds)
                assert len(self._types[name]) <= 1, f"{name} would be of two types: {self._types[name]}"
                continue
            kind = "keyword" if name.startswith("labels.") and name.count(".") == 1 else ECS.get(name)
            assert kind, f"{name} is no field of ECS"
            for each in values:
                if kind == "long":
                    assert type(each) is int, (name, each)
                else:
                    assert isinstance(each, str), (name, each)
                if kind == "date":
                    assert datetime.fromisoformat(each).tzinfo is not None
                assert each in ALLOWED.get(name, (each,)), (name, each)
        assert document["ecs"]["version"].startswith("8.") and document["message"] and document["event"]["dataset"].startswith("glm.")


def comparable(document: dict[str, Any]) -> dict[str, Any]:
    """Without what only one of the two programs adds."""
    return {name: value for name, value in flat(document) if name not in ("@timestamp", "host.name", "log.file.path", "glm.at")}


def test_every_line_becomes_a_document_in_ecs_fields_by_both_programs(written: dict[str, list[str]]) -> None:
    fields = Fields()
    pattern = VECTOR["sources"]["servers"]["multiline"]["start_pattern"]
    documents: dict[str, list[dict[str, Any]]] = {}
    for name in RAW:
        messages = events_of(written[name], pattern)
        documents[name] = by_vector("lines", name, messages)
        for ours, theirs in zip(documents[name], by_filebeat(name, messages), strict=True):
            assert comparable(ours) == comparable(theirs)
    for name in DOCUMENTS:
        documents[name] = by_vector("documents_parsed", name, written[name])
        assert documents[name] == [{**json.loads(line), "host": {"name": "box"}} if name == "access.log" else json.loads(line) for line in written[name]]
    for document in itertools.chain.from_iterable(documents.values()):
        fields.check(document)

    requests = [document for document in documents["api.log"] if document["event"].get("action") == "request"]
    answered = next(request for request in requests if request.get("glm", {}).get("request", {}).get("images") == 1)
    assert answered["user"]["name"] == "default" and answered["event"]["duration"] > 1_000_000
    assert answered["glm"]["request"]["prompt_tokens"] > 0 and answered["labels"]["finish"] == "stop"
    assert {r["http"]["response"]["status_code"] for r in requests} >= {200, 400, 401, 404, 429}
    assert {r["event"]["outcome"] for r in requests} == {"success", "failure"}
    assert any(r["url"]["path"] == '/v1/"quoted" = path' for r in requests), "a path cannot make fields of its own"
    assert {d["event"].get("action") for d in documents["api.log"]} >= {"start", "choice", "engine_ready", "request"}
    assert any(d["message"].startswith("page address=") and d["log"]["logger"] == "web" for d in documents["web.log"])
    assert any("Elasticsearch did not accept" in d["message"] and d["log"]["level"] == "warn" for d in documents["health_check.log"])
    assert len(documents["health.jsonl"]) == 1 and len(documents["access.log"]) == 7


def test_a_request_is_found_in_the_proxys_log_and_in_the_apis_by_its_id(written: dict[str, list[str]]) -> None:
    at_nginx = [json.loads(line)["http"]["request"]["id"] for line in written["access.log"]]
    at_api = [d["http"]["request"]["id"] for d in by_vector("lines", "api.log", written["api.log"]) if d["event"].get("action") == "request"]

    assert set(filter(None, at_nginx)) <= set(at_api) and len(set(at_nginx)) >= 6


FORMATTED = re.compile(r"%(?:\.\d+)?[sdfr]")
AWKWARD = ('"quoted \\" text"', "3", "a b=c", "", "4.5", "None")


def formats() -> list[str]:
    """Each text of the source that begins with `event=`, and each `line("...", a=..., b=...)`."""
    found = set()
    for path in [p for folder in ("api", "web", "monitor") for p in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.match(r"event=\w+", node.value):
                found.add(node.value)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "line" and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str):
                    found.add(" ".join([f"event={first.value}", *(f"{k.arg}=%s" for k in node.keywords if k.arg)]))
    return sorted(found)


def test_every_event_that_the_source_can_log_has_fields_of_one_type() -> None:
    stamp = "2026-11-27T21:58:56.724+00:00 level=warning"
    messages = []
    for text in formats():
        for value in AWKWARD:
            messages.append(f"{stamp} " + FORMATTED.sub(lambda _, value=value: value, text))
    assert len(messages) > 40 * len(AWKWARD)
    messages.append(f'{stamp} event=log logger=py.warnings message="a \\"b\\" c"')
    messages.append(f"{stamp} event=step_failed work=1\nTraceback (most recent call last):\n  x = 1\nValueError: no")
    messages += ["Loading weights:   0%|          | 0/123", "level=info event=x", "\x1b[31m", "{}"]

    fields = Fields()
    documents = by_vector("lines", "api.log", messages)
    for document in documents:
        fields.check(document)
    for document in by_filebeat("api.log", messages):
        document["glm"] = {name: value for name, value in document.get("glm", {}).items() if name != "at"}
        fields.check(document)
    failed = next(document for document in documents if document["event"].get("action") == "step_failed" and "error" in document)
    assert failed["error"]["stack_trace"].endswith("ValueError: no") and "\n" not in failed["message"]


def test_a_broken_line_of_a_document_stops_nothing() -> None:
    """Vector drops it into an output of its own, by the options that are set; Filebeat marks it."""
    with pytest.raises(Exception, match="parse"):
        by_vector("documents_parsed", "health.jsonl", ['{"@timestamp": "2026-'])
    options = VECTOR["transforms"]["documents_parsed"]
    assert options["drop_on_error"] and options["reroute_dropped"]
    assert FILEBEAT["filebeat.inputs"][1]["parsers"][0]["ndjson"]["add_error_key"] is True


def test_the_files_are_whole_and_name_the_same_logs(written: dict[str, list[str]]) -> None:
    sources, transforms, sinks = (VECTOR[part] for part in ("sources", "transforms", "sinks"))
    assert {name for part in (transforms, sinks) for each in part.values() for name in each["inputs"]} == {*sources, *transforms}
    assert {each["type"] for each in sources.values()} == {"file"} and {each["type"] for each in transforms.values()} == {"remap"}
    of_vector = [sources["servers"]["include"], sources["documents"]["include"]]
    assert of_vector == [each["paths"] for each in FILEBEAT["filebeat.inputs"]]
    assert [Path(path).name for path in of_vector[0]] == list(RAW)

    multiline = FILEBEAT["filebeat.inputs"][0]["parsers"][0]["multiline"]
    rule = VECTOR["sources"]["servers"]["multiline"]
    assert multiline["pattern"] == rule["start_pattern"] == rule["condition_pattern"] and rule["mode"] == "halt_before"
    assert (multiline["negate"], multiline["match"]) == (True, "after")
    layouts = FILEBEAT["filebeat.inputs"][0]["processors"][1]["timestamp"]
    assert set(layouts["test"]) == {"2026-11-27T21:58:56.724+00:00", "2026-11-27T21:58:56+08:00"}
    stamps = [d["glm"]["at"] for name in RAW for d in by_filebeat(name, written[name]) if "at" in d.get("glm", {})]
    assert stamps and all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3})?[+-]\d\d:\d\d", at) for at in stamps)
