"""The variable that chooses the instruction set of the CPU kernels."""

import os
import subprocess
import sys

import pytest

from kpig_fast import _native

PROGRAM = "import torch; from kpig_fast import _native; print(_native.isa_name())"


def run_with(isa: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"KPIG_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_variable_chooses(isa: str) -> None:
    assert run_with(isa).stdout.strip() == isa


def test_an_unknown_name_is_an_error_with_the_choice() -> None:
    done = run_with("mmx")
    assert done.returncode == 1
    choice = ", ".join(_native.supported_isas())
    assert f"ValueError: this machine has no instruction set 'mmx'; give one of {choice}" in done.stderr
