"""What the sections of the GPU benchmark share: times on the device, memory, rows of the record, the targets."""

import csv
import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from torch import Tensor
from triton.testing import do_bench

from kpig_fast.data.files import write_lines
from kpig_fast.environment import environment

GPU_FACTS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "temperature.gpu",
)  # fmt: skip
MB = 2**20

# Returns what it computed.
Run = Callable[[], tuple[Tensor, ...]]


@dataclass
class Bench:
    """One section's run: where, how large, until when; and its rows so far."""

    device: str
    quick: bool
    seconds: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def dtype(self) -> torch.dtype:
        """Of models and hidden states: bf16 on a GPU."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def over(self) -> bool:
        """Whether the section has used up its time."""
        return time.monotonic() - self.started > self.seconds

    def pick(self, whole: Any, small: Any) -> Any:
        """A size: of the target, or a small one with ``--quick``."""
        return small if self.quick else whole

    def sync(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """Median time of ``run``: of the device where there is one, with its caches emptied before."""
        if self.device == "cuda":
            return float(do_bench(run, warmup=20, rep=100 if self.quick else 400, return_mode="median"))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - started))
        return median(times)

    def megabytes(self, run: Callable[[], Any]) -> float | None:
        """By how much allocated memory grows at most during a warm ``run``, results included; None without a GPU."""
        if self.device != "cuda":
            return None
        run()
        self.sync()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.sync()
        return (torch.cuda.max_memory_allocated() - before) / MB

    def add(self, case: str, name: str, **facts: Any) -> None:
        """A row of the record, printed at once."""
        self.rows.append({"case": case, "name": name, **facts})
        numbers = [(key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in facts.items()]
        print(f"{case} | {name} | {', '.join(f'{key} {value}' for key, value in numbers)}", flush=True)

    def target(self, case: str, name: str, value: float | None, *, at_most: float = 0, at_least: float = 0) -> None:
        """How a figure compares with its target. Small sizes are compared with none."""
        if value is None or self.quick:
            return
        met = value <= at_most if at_most else value >= at_least
        wanted = f"at most {at_most}" if at_most else f"at least {at_least}"
        self.add(case, name, value=value, target=wanted, met=met)

    def compare(self, case: str, runs: Mapping[str, Run], expected: Run, tolerance: float) -> dict[str, float]:
        """Milliseconds of every contestant whose results are ours; the others get a row that says how far off they are.

        ``expected`` gives ours; the sizes of results differ by at most ``tolerance``, relative to theirs.
        """
        times: dict[str, float] = {}
        truth = expected()
        for name, run in runs.items():
            if self.over:
                self.add(case, name, skipped="the section's time is used up")
                continue
            try:
                error = difference(run(), truth)
                if error <= tolerance:
                    times[name] = self.milliseconds(run)
                    self.add(case, name, ms=times[name], mb=self.megabytes(run), error=error)
                else:
                    self.add(case, name, skipped=f"its results differ from ours by {error:.2e}, relative", error=error)
            except Exception as failure:
                # A peer that does not run here says nothing about ours.
                self.add(case, name, skipped=f"{type(failure).__name__}: {str(failure).splitlines()[:1]}")
            if self.device == "cuda":
                torch.cuda.empty_cache()
        return times


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest of the results' relative errors, each the norm of the error over the norm; NaN stays NaN."""
    pairs = zip(found, expected, strict=True)
    errors = [(a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30) for a, b in pairs]
    return float(torch.stack(errors).max()) if errors else 0.0


def facts(device: str) -> dict[str, Any]:
    """What a record was measured on."""
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": common._commit()}
    return {**found, "environment": environment(), "gpus": gpus() if device == "cuda" else []}


def gpus() -> list[dict[str, str]]:
    """Name, driver and clocks of every GPU, from nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [dict(zip(GPU_FACTS, map(str.strip, line.split(",")))) for line in said.splitlines()]


def write(folder: Path, section: str, bench: Bench, before: Mapping[str, Any]) -> None:
    """The section's record as JSON and its rows as CSV, whole or not at all."""
    options = {"device": bench.device, "quick": bench.quick, "seconds": round(time.monotonic() - bench.started, 1)}
    record = {**before, "options": options, "gpus_after": facts(bench.device)["gpus"], "rows": bench.rows}
    write_lines(folder / f"{section}.json", [json.dumps(record, indent=1)])
    columns = list(dict.fromkeys(key for row in bench.rows for key in row))
    partial = folder / f"{section}.csv.partial"
    with partial.open("w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(bench.rows)
    os.replace(partial, folder / f"{section}.csv")
