"""The rules of the house: who may import whom, and names that say something."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "streamlit"}


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [Path(line) for line in listed if (ROOT / line).is_file()]


def sources(*folders: str) -> list[Path]:
    found = [p for p in tracked() if p.suffix == ".py" and p.as_posix().startswith(folders)]
    assert found
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def offenders(paths: list[Path], forbidden) -> list[str]:
    return [f"{path} imports {name}" for path in paths for name in sorted(imports(path)) if forbidden(name)]


def test_the_engine_takes_a_configuration_and_reads_no_settings():
    assert offenders(sources("api/engine/"), lambda n: n.split(".")[0] == "settings") == []


def test_the_engine_knows_nothing_above_it():
    assert offenders(sources("api/engine/"), lambda n: n.startswith("api.") and not n.startswith("api.engine")) == []


LIGHT = [
    "encoder_cache.py", "kv_cache.py", "request.py", "scheduler.py", "sequence.py", "stats.py", "text/output.py", "token_budget.py",
]  # fmt: skip


@pytest.mark.parametrize("name", LIGHT)
def test_bookkeeping_needs_no_torch(name):
    assert offenders(sources(f"api/engine/{name}"), lambda n: n.split(".")[0] in HEAVY) == []


def test_the_page_and_the_checker_reach_the_api_over_http_only():
    assert offenders(sources("web/", "monitor/", "health_check.py"), lambda n: n.split(".")[0] == "api") == []


def test_the_checker_stays_light():
    paths = sources("monitor/", "health_check.py", "cgroup.py", "settings.py", "models/shapes/pictures.py")
    assert offenders(paths, lambda n: n.split(".")[0] in HEAVY) == []


# From the top: each room may import itself and those below it.
ROOMS_OF_THE_PAGE = (
    "server",      # the process and Streamlit's options
    "app",         # the script that Streamlit runs
    "console",     # the operator's page
    "chat",        # the page of questions and answers
    "history",     # conversations and their store
    "images",      # images of a question, boxes of an answer
    "api_client",  # HTTP to the API
    "access",      # who may see the page
    "samples",     # the images of an empty chat
    "safe_text",   # untrusted Markdown
    "i18n",        # what people read
)  # fmt: skip
WITHOUT_STREAMLIT = ("web/images/", "web/api_client/", "web/access.py", "web/samples/", "web/safe_text.py", "web/i18n/")


def test_rooms_of_the_page_import_downwards():
    def room(module: str) -> int:
        return ROOMS_OF_THE_PAGE.index(module.split(".")[1])

    files = [p for p in sources("web/") if p.as_posix() != "web/__init__.py"]
    upwards = [
        f"{path} imports {name}"
        for path in files
        for name in sorted(imports(path))
        if name.startswith("web.") and room(name) < room(".".join(path.with_suffix("").parts))
    ]
    assert upwards == []
    assert offenders(sources(*WITHOUT_STREAMLIT), lambda n: n.split(".")[0] == "streamlit") == []


# From the top: each room may import itself and those below it.
ROOMS_OF_THE_API = (
    "server",    # the process: settings, signals, uvicorn
    "app",       # the application: routes, middleware, the engine's life
    "routes",    # one file for each family of endpoints
    "state",     # what a running server consists of; known to the app and the routes only
    "requests",  # admission, the life of one request, prompts, sampling parameters
    "protocol",  # requests and answers as the wires have them
    "images",    # fetching and decoding
    "http",      # the connection, keys, the log
    "health",    # heartbeat, metrics, fault injection
    "parsing",   # what the model writes
    "errors",    # what a caller can be told
    "caller",    # who asks
    "engine",    # tokens and tensors
)  # fmt: skip


def test_rooms_of_the_api_import_downwards():
    def room(module: str) -> int:
        return ROOMS_OF_THE_API.index(module.split(".")[1])

    files = [p for p in sources("api/") if p.as_posix() != "api/__init__.py"]
    upwards = [
        f"{path} imports {name}"
        for path in files
        for name in sorted(imports(path))
        if name.startswith("api.") and name != "api.__version__"
        if room(name) < room(".".join(path.with_suffix("").parts))
    ]
    assert upwards == []


def test_names_say_something():
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "base"}
    assert [p for p in tracked() if p.stem in vague or vague & set(p.parts)] == []
