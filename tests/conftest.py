"""Fixtures that every test may use."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real tasks and small real models beside the checkout; tests that need it skip without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared folder with real data and models does not lie beside this checkout")
    return SHARED.resolve()


pytest_plugins = ["ops_paths", "small_run"]
