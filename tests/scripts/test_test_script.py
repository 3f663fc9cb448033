"""test.sh itself: what it counts as a failure."""

from __future__ import annotations

import pytest


@pytest.fixture
def checked(project):
    """A project with one test file."""
    (project.root / ".ci").mkdir()
    (project.root / ".ci" / "run").write_text("#!/bin/bash\n./test.sh\n")
    # Style and types are checked elsewhere; here the copy holds only part of the tree.
    (project.root / "ruff.toml").write_text('exclude = ["*"]\n')
    (project.root / "mypy.ini").write_text("[mypy]\nfiles = settings.py\nfollow_imports = skip\n")

    def check(test: str, **extra: str):
        (project.root / "test_it.py").write_text(test)
        return project.run("./test.sh test_it.py", **extra)

    return check


SKIPPED = "import pytest\n\n\ndef test_one():\n    pass\n\n\ndef test_two():\n    pytest.skip('no reason')\n"


def test_a_skipped_test_fails_the_run_in_ci_only(checked):
    by_hand = checked(SKIPPED, CI="")
    in_ci = checked(SKIPPED, CI="true")

    assert by_hand.returncode == 0, by_hand.stderr
    assert "1 passed, 1 skipped" in by_hand.stdout.splitlines()[-1]
    assert in_ci.returncode == 1
    assert "Skipped tests count as failures" in in_ci.stderr


def test_a_failing_test_fails_the_run(checked):
    assert checked("def test_it():\n    assert False\n", CI="true").returncode == 1


def test_passing_tests_end_with_the_count_and_see_no_settings_of_the_environment(checked):
    test = "import os\n\n\ndef test_it():\n    assert not [name for name in os.environ if name.startswith('GLM_')]\n"

    done = checked(test, CI="true")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout.splitlines()[-1]
