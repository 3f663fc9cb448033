"""The rules of the house: who may import whom, and names that say something."""

import ast
import re
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


WITHOUT_STREAMLIT = ("web/images/", "web/api_client/", "web/access.py", "web/samples/", "web/safe_text.py", "web/i18n/")
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
# Each line of the block: a package, and its rooms from the top.
ORDERS = dict(line.split(maxsplit=1) for line in re.search(r"```rooms\n(.*?)```", PAGE, re.DOTALL)[1].splitlines())


@pytest.mark.parametrize("package", ORDERS)
def test_rooms_import_downwards(package):
    rooms = ORDERS[package].split(" > ")

    def room(module: str) -> int:
        return rooms.index(module.removeprefix(f"{package}.").split(".")[0])

    folder = Path(package.replace(".", "/"))
    upwards = [
        f"{path} imports {name}"
        for path in sources(f"{folder.as_posix()}/")
        if path != folder / "__init__.py"
        for name in sorted(imports(path))
        if name.startswith(f"{package}.") and name != "api.__version__"
        if room(name) < room(".".join(path.with_suffix("").parts))
    ]
    assert upwards == []


def _acts_or_observes(name: str) -> bool:
    return name.startswith(("monitor.act", "monitor.observe")) and not name.startswith("monitor.observe.small_file")


def test_the_store_of_the_checker_only_reads_and_writes_rows():
    assert offenders(sources("monitor/store/"), _acts_or_observes) == []


def test_parts_of_the_page_without_streamlit():
    assert offenders(sources(*WITHOUT_STREAMLIT), lambda n: n.split(".")[0] == "streamlit") == []


def test_every_file_that_the_architecture_names_exists():
    named = re.findall(r"`([a-z_/]+\.py)`", PAGE)

    assert len(named) > 30
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_names_say_something():
    vague = {"utils", "util", "helpers", "helper", "common", "manager", "misc", "base"}
    assert [p for p in tracked() if p.stem in vague or vague & set(p.parts)] == []
