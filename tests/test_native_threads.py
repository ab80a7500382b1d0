"""Kernels run on the threads of the OpenMP runtime that torch has loaded, not on a second set."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="lists loaded libraries through /proc")

WITH_TORCH = """
import torch
from kpig_fast import _native
from kpig_fast.ops import tree_attention

torch.set_num_threads(2)
q, ends = torch.ones(2, 300, 16), torch.arange(1, 301)
out = tree_attention(q, q, q, ends, ends - 1)
assert torch.equal(out, q), out
print(_native.thread_source())
print(torch.__path__[0])
print(open("/proc/self/maps").read())
"""
WITHOUT_TORCH = """
import sys
from kpig_fast import _native
assert "torch" not in sys.modules
print(_native.thread_source())
"""


def output_of(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_one_runtime_and_it_is_that_of_torch() -> None:
    source, torch_folder, maps = output_of(WITH_TORCH).split("\n", 2)
    paths = {Path(line.split()[-1]) for line in maps.splitlines() if "/" in line}
    runtimes = [path for path in paths if re.match(r"lib(gomp|omp|iomp5)\b", path.name)]
    assert [path.name for path in runtimes] == [source]
    # Wheels of torch carry a runtime; others link that of the system.
    carried = [*Path(torch_folder).rglob(source), *Path(f"{torch_folder}.libs").glob(source)]
    assert not carried or carried[0].resolve() == runtimes[0].resolve()


def test_without_torch_the_threads_are_those_of_the_standard_library() -> None:
    assert output_of(WITHOUT_TORCH).strip() == "std::thread"
