"""The order in which files are handed to the parallel workers, and the coverage that a whole run must reach."""

from __future__ import annotations

import io

import pytest

# In percent of the lines, by the code that runs in the tests' own processes: servers of their own are not counted.
COVERAGE = {"api": 91.0, "web": 90.0, "monitor": 84.0}
MEASURED = pytest.StashKey[dict[str, float]]()

# The longest first, so that no worker is left alone with one of them at the end. Whole files go to a worker: their tests
# share servers, browsers and models.
LONGEST = (
    "tests/e2e/test_clone_and_start.py",
    "tests/e2e/test_several_replicas.py",
    "tests/e2e/test_container_image.py",
    "tests/deploy/test_ray_serve.py",
    "tests/web/chat/test_page_in_browser.py",
    "tests/monitor/test_schedule.py",
    "tests/scripts/test_start.py",
    "tests/deploy/test_monitoring.py",
    "tests/e2e/test_restore.py",
    "tests/clients/test_clients.py",
    "tests/models/test_shapes_answers.py",
    "tests/web/test_screenshots.py",
    "tests/models/test_shapes_trainer.py",
    "tests/api/server/test_first_start.py",
    "tests/monitor/test_slow_start.py",
    "tests/scripts/test_environment.py",
    "tests/scripts/test_units.py",
    "tests/api/server/test_watchdog.py",
    "tests/api/engine/loading/test_download.py",
    "tests/api/server/test_real_server.py",
    "tests/scripts/test_stop.py",
    "tests/web/chat/test_chats_in_browser.py",
    "tests/monitor/drill/test_drill.py",
    "tests/scripts/test_test_script.py",
    "tests/api/server/test_hostile.py",
    "tests/monitor/act/test_restart.py",
    "tests/api/server/test_hostile_demo.py",
    "tests/api/engine/kernels/test_build.py",
    "tests/api/server/test_compiled_server.py",
    "tests/e2e/test_commands_of_the_docs.py",
    "tests/e2e/test_recorded_answers.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that measured coverage and reached less than COVERAGE."""
    measured = session.config.stash[MEASURED] = _measured(session.config)
    if any(measured[package] < COVERAGE[package] for package in measured) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for package, percent in config.stash.get(MEASURED, {}).items():
        terminalreporter.write_line(f"coverage of {package}: {percent:.1f} % (at least {COVERAGE[package]} %)")


def _measured(config: pytest.Config) -> dict[str, float]:
    """Percent by package; empty without --cov, and in workers, whose data the main process collects."""
    plugin = config.pluginmanager.getplugin("_cov")
    if plugin is None or hasattr(config, "workerinput"):
        return {}
    return {package: plugin.cov_controller.cov.report(include=[f"{package}/*"], file=io.StringIO()) for package in COVERAGE}
