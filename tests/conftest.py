"""Fixtures that every test may use."""

import os
from pathlib import Path

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
from hypothesis import HealthCheck, settings

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tasks and small real models beside the checkout; tests that need it skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared folder with real data and models does not lie beside this checkout")
    return SHARED.resolve()


pytest_plugins = ["ops_paths", "small_run"]

# How quickly a machine draws examples says nothing about what is tested.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("any machine")
