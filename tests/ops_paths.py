"""The fixture that holds a test to every path of the operators: each instruction set, and plain PyTorch."""

from collections.abc import Iterator

import pytest
from ops_cases import ops_module

from kpig_fast import _native

ISAS = _native.supported_isas()
FASTEST = [ISAS[0], "torch"]


@pytest.fixture(scope="module", params=[*ISAS, "torch"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the path that the operators take: an instruction set of this machine, or ``torch``."""
    before = _native.isa_name()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            for module in ("tree_attention", "head"):
                patch.setattr(ops_module(module), "runs_native", lambda x: False)
        else:
            _native.use_isa(request.param)
        yield request.param
    _native.use_isa(before)


@pytest.fixture(scope="module", params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the instruction set whose kernels are used."""
    before = _native.isa_name()
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(before)
