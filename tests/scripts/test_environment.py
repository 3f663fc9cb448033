"""Which Python the scripts choose, and how they install its packages."""

from __future__ import annotations

import shutil
import sys
import venv

import pytest

from deploy import packages

CHOOSE = 'source deploy/environment.sh; choose_python requirements.txt && echo "chosen $PYTHON"'


@pytest.fixture
def bare(project):
    """No active conda environment and no requirements, so .venv is complete at once."""
    del project.env["CONDA_PREFIX"], project.env["CONDA_DEFAULT_ENV"]
    (project.root / "requirements.txt").write_text("# nothing\n")
    return project


@pytest.fixture(scope="session")
def empty_venv(tmp_path_factory):
    """A finished environment, to be copied."""
    folder = tmp_path_factory.mktemp("environment") / ".venv"
    venv.create(folder, with_pip=True, symlinks=True)
    return folder


@pytest.fixture
def filled(bare, empty_venv):
    """`bare` with its .venv."""
    shutil.copytree(empty_venv, bare.root / ".venv", symlinks=True)
    return bare


def test_active_conda_environment_with_every_package_is_used(project):
    chosen = project.run(CHOOSE)

    assert f"chosen {sys.prefix}/bin/python" in chosen.stdout
    assert not (project.root / ".venv").exists()


def test_active_conda_environment_without_a_package_is_not_used(bare):
    (bare.root / "requirements.txt").write_text("no-such-package-as-this==1.0\n")

    chosen = bare.run(CHOOSE, CONDA_PREFIX=sys.prefix, CONDA_DEFAULT_ENV="other", PIP_NO_INDEX="1")

    assert (
        "The active conda environment other is not used: no-such-package-as-this 1.0 is not installed" in chosen.stdout
    )
    assert "The installation failed" in chosen.stderr
    assert "chosen" not in chosen.stdout


def test_conda_environment_of_the_projects_name_is_found(bare, stub):
    stub("conda", f'echo "base /nowhere"; echo "glm-env * {sys.prefix}"')

    chosen = bare.run(CHOOSE)

    assert f"chosen {sys.prefix}/bin/python" in chosen.stdout


def test_without_conda_a_venv_is_created_once(bare):
    first = bare.run(CHOOSE)
    made = (bare.root / ".venv" / "pyvenv.cfg").stat().st_mtime_ns
    second = bare.run(CHOOSE)

    assert "Creating .venv" in first.stdout and "chosen .venv/bin/python" in first.stdout
    assert second.stdout == "chosen .venv/bin/python\n"
    assert (bare.root / ".venv" / "pyvenv.cfg").stat().st_mtime_ns == made


def test_interrupted_installation_is_started_over(filled):
    half_written = filled.root / ".venv" / "half-written-package.py"
    half_written.touch()
    (filled.root / ".venv" / ".installing").touch()

    chosen = filled.run(CHOOSE)

    assert "interrupted" in chosen.stdout and "chosen .venv/bin/python" in chosen.stdout
    assert not half_written.exists()
    assert not (filled.root / ".venv" / ".installing").exists()


def test_venv_without_its_python_is_recreated(filled):
    for link in (filled.root / ".venv" / "bin").glob("python*"):
        link.unlink()

    chosen = filled.run(CHOOSE)

    assert "chosen .venv/bin/python" in chosen.stdout


@pytest.mark.parametrize("state", ["a package is missing", "an installation was interrupted", "there is no environment"])
def test_a_cure_installs_creates_and_removes_nothing(bare, empty_venv, state):
    (bare.root / "requirements.txt").write_text("no-such-package-as-this==1.0\n")
    if state != "there is no environment":
        shutil.copytree(empty_venv, bare.root / ".venv", symlinks=True)
    if state == "an installation was interrupted":
        (bare.root / ".venv" / ".installing").write_text("")
    before = sorted((bare.root / ".venv").rglob("*"))

    chosen = bare.run(CHOOSE, START_SH_NO_INSTALL="1", PIP_NO_INDEX="1")

    assert "Installing" not in chosen.stdout and "Creating" not in chosen.stdout
    assert sorted((bare.root / ".venv").rglob("*")) == before
    if state == "there is no environment":
        assert "a restart by the checker installs nothing. Run ./start.sh yourself" in chosen.stderr
        assert "chosen" not in chosen.stdout
    else:
        assert "chosen .venv/bin/python" in chosen.stdout


def test_old_python_is_rejected_with_its_version(bare, stub):
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        stub(name, '[[ $1 == --version ]] && { echo "Python 3.9.2"; exit 0; }; exit 1')

    started = bare.run("./start.sh")

    assert started.returncode == 2
    assert "Python 3.11 or newer is required. Found: Python 3.9.2" in started.stderr


def test_python_without_venv_names_the_package_to_install(bare, stub):
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        stub(name, "[[ $2 == *ensurepip* ]] && exit 1; exit 0")

    started = bare.run("./start.sh")

    assert started.returncode == 2
    assert "-venv" in started.stderr and "apt-get install" in started.stderr


def test_installation_requires_disk_space(filled, stub):
    (filled.root / "requirements.txt").write_text("no-such-package-as-this==1.0\n")
    stub("df", "echo head; echo /dev/x 100 100 1048576 99% /")

    started = filled.run("./start.sh")

    assert started.returncode == 2
    assert "1024 MiB free" in started.stderr


def test_missing_packages_are_listed_by_name_and_version(tmp_path):
    (tmp_path / "base.txt").write_text("pytest==0.0.1  # old\nno-such-package-as-this[extra]==1.0\n")
    (tmp_path / "all.txt").write_text(f"-r base.txt\npydantic=={packages.version('pydantic')}\n")

    lines = packages.missing(tmp_path / "all.txt")

    assert lines == [
        f"pytest {packages.version('pytest')} instead of 0.0.1",
        "no-such-package-as-this 1.0 is not installed",
    ]


def test_stop_needs_no_environment(project, machine):
    project.run("./start.sh")
    pids = [project.pid("api"), project.pid("web")]
    # Any Python without the packages: the system's, or a fresh one.
    bare_python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable

    stopped = project.run(
        f"{bare_python} -m deploy.service stop logs 5 web={project.ports['web']} api={project.ports['api']}"
    )

    assert stopped.returncode == 0, stopped.stderr
    assert not any(machine.runs(pid) for pid in pids)
