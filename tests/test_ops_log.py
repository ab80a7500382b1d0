"""KPIG_LOG=1 names each path once, with the reason; without it nothing is printed."""

import subprocess
import sys

import pytest

PROGRAM = """
import torch
from kpig_fast.ops import linear_jsd, response_logprob, tree_attention
hidden, weight = torch.ones(3, 4), torch.ones(7, 4)
for _ in range(2):
    response_logprob(hidden, weight, torch.arange(3))
    linear_jsd(hidden, weight, hidden, weight, torch.ones(3))
    heads, row = torch.ones(1, 3, 4), torch.arange(3)
    tree_attention(heads, heads, heads, row + 1, row)
"""


@pytest.mark.parametrize(("value", "lines"), [("1", 3), ("0", 0), (None, 0)])
def test_each_path_is_named_once(value: str | None, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KPIG_LOG", raising=False)
    if value is not None:
        monkeypatch.setenv("KPIG_LOG", value)
    monkeypatch.setenv("KPIG_CPU_ISA", "portable")
    said = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stderr
    found = [line for line in said.splitlines() if line.startswith("kpig_fast: ")]
    assert len(found) == lines
    assert all("C++" in line and "portable" in line for line in found)
