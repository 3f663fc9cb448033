"""The package for 4-bit weights is installed where they are used, and nowhere else."""

from __future__ import annotations

import pytest

from deploy.quantization import wanted


@pytest.mark.parametrize(
    ("weights", "device", "free_mib", "expected"),
    [
        ("auto", "auto", [], False),
        ("auto", "auto", [7900.0], True),
        ("auto", "auto", [15800.0], True),
        ("auto", "auto", [80000.0], False),
        ("auto", "auto", [80000.0, 11000.0], True),
        ("auto", "cpu", [7900.0], False),
        ("nf4", "cpu", [], True),
        ("bf16", "auto", [7900.0], False),
        ("fp8", "auto", [15800.0], False),
    ],
)
def test_wanted_by_setting_and_card(weights: str, device: str, free_mib: list[float], expected: bool) -> None:
    assert wanted(weights, device, free_mib) is expected


def test_start_installs_it_where_it_is_wanted_and_goes_on_without_it(project) -> None:
    (project.root / "requirements-quantized.txt").write_text("no-such-package-as-this==1.0\n")

    started = project.run("./start.sh", GLM_WEIGHTS="nf4", PIP_NO_INDEX="1")

    assert "Installing 1 packages of requirements-quantized.txt" in started.stdout
    assert "4-bit weights cannot be used" in started.stderr
    assert started.returncode == 0


def test_start_installs_nothing_where_it_is_not_wanted(project) -> None:
    (project.root / "requirements-quantized.txt").write_text("no-such-package-as-this==1.0\n")

    started = project.run("./start.sh", GLM_WEIGHTS="bf16", PIP_NO_INDEX="1")

    assert "requirements-quantized" not in started.stdout and started.returncode == 0
