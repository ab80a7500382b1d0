"""The GPU benchmark on the CPU, as far as it goes there: what it runs, refuses and records; and its shell script."""

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import baseline_heads_gpu  # noqa: E402
import bench_gpu  # noqa: E402
import bench_gpu_common  # noqa: E402
from bench_gpu_attention import Case  # noqa: E402
from bench_gpu_common import Bench, difference  # noqa: E402
from bench_gpu_head import Inputs  # noqa: E402
from bench_kernels import instance_tree  # noqa: E402

RUN = BENCHMARKS / "run_gpu.sh"


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled, which takes most of the time on a CPU."""
    for name in ("_cross_entropy_chunk", "_divergence_chunk"):
        compiled = getattr(baseline_heads_gpu, name)
        monkeypatch.setattr(baseline_heads_gpu, name, compiled._torchdynamo_orig_callable)


@pytest.fixture
def bench() -> Bench:
    return Bench("cpu", quick=True, seconds=60)


def record(folder: Path, section: str) -> dict[str, Any]:
    return json.loads((folder / f"{section}.json").read_text())


def test_whole_run(tmp_path: Path) -> None:
    # Without the data: the bundled suite and its tokenizer.
    missing = str(tmp_path / "nowhere")
    bench_gpu.main([str(tmp_path), "--device", "cpu", "--quick", "--data", missing, "--tokenizer", missing])
    for section in bench_gpu.SECTIONS:
        found = record(tmp_path, section)
        assert found["options"]["quick"]
        assert found["environment"]["packages"]["torch"] == torch.__version__
        assert len(found["commit"]) >= 7
        names = {row["name"] for row in found["rows"]}
        assert not any("skipped" in row for row in found["rows"]), found["rows"]
        assert not any("target" in row for row in found["rows"])
        rows = list(csv.DictReader((tmp_path / f"{section}.csv").open()))
        assert [row["name"] for row in rows] == [row["name"] for row in found["rows"]]
        assert len(names) >= (1 if section == "memory" else 2)
    ours = {row["name"]: row for row in record(tmp_path, "training_head")["rows"]}
    assert ours["best composition of public parts"]["ms"] > 0
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("frozen", [False, True])
def test_peers_compute_what_ours_does(bench: Bench, frozen: bool) -> None:
    x = Inputs(bench, 24, 16, 101, frozen=frozen)
    sides = x.masked, x.weight, x.ref_hidden, x.ref_weight
    for loss in baseline_heads_gpu.cross_entropies().values():
        out = x.gradients(loss(x.hidden, x.weight, x.target), x.hidden)
        assert difference(out, x.our_cross_entropy()) < 1e-5
    for loss in baseline_heads_gpu.divergences().values():
        assert difference(x.gradients(loss(*sides), x.masked), x.our_divergence()) < 1e-5
    assert len(x.ours()) == 3 if frozen else 4
    with torch.no_grad():
        log_probs = [score(x.hidden, x.weight, x.target) for score in baseline_heads_gpu.scorers().values()]
    for found in log_probs:
        assert difference((found,), (log_probs[0],)) < 1e-5


def test_attention_contestants_compute_the_same(bench: Bench) -> None:
    x = Case(bench, instance_tree(16, 8, 3, 4), 4, 2, 16)
    exact = x.run(x.exact, train=True)()
    for attend in (x.ours, x.dense()):
        assert difference(x.run(attend, train=True)(), exact) < 1e-5


def test_a_peer_that_is_not_installed_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Any:
        import a_package_that_does_not_exist  # type: ignore[import-not-found]  # noqa: F401

    assert baseline_heads_gpu.found({"one": missing, "two": lambda: 2}) == {"two": 2}
    assert "without one: No module named" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda: (torch.tensor([1.0, 2.2]),), "differ from ours by 8"),
        (lambda: (torch.tensor([1.0, math.nan]),), "differ from ours by nan"),
        (lambda: (_ for _ in ()).throw(RuntimeError("no such kernel\nmore")), "RuntimeError: ['no such kernel']"),
    ],
)
def test_a_wrong_result_is_not_timed(bench: Bench, run: Callable[[], tuple[Tensor, ...]], said: str) -> None:
    right = torch.tensor([1.0, 2.0])
    runs = {"wrong": run, "right": lambda: (right.clone(),)}
    times = bench.compare("case", runs, lambda: (right,), 1e-2)
    assert list(times) == ["right"]
    assert said in bench.rows[0]["skipped"]
    assert bench.rows[1]["ms"] == times["right"] > 0


def test_nothing_new_begins_when_time_is_up() -> None:
    bench = Bench("cpu", quick=True, seconds=-1)
    assert bench.compare("case", {"other": lambda: ()}, lambda: (), 1.0) == {}
    assert bench.rows[0]["skipped"] == "the section's time is used up"


def test_targets() -> None:
    bench = Bench("cpu", quick=False, seconds=60)
    bench.target("case", "a", 3.0, at_most=2)
    bench.target("case", "b", 3.0, at_least=2)
    bench.target("case", "c", None, at_least=2)
    assert [(row["name"], row["target"], row["met"]) for row in bench.rows] == [
        ("a", "at most 2", False),
        ("b", "at least 2", True),
    ]


def test_a_section_that_breaks_off_is_recorded_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: Bench, _: Any) -> None:
        bench.add("case", "first", ms=1.0)
        raise ValueError("our loss is off")

    monkeypatch.setitem(bench_gpu.SECTIONS, "attention", (broken, 1))
    monkeypatch.setitem(bench_gpu.SECTIONS, "step", (lambda bench, _: bench.add("case", "second"), 1))
    with pytest.raises(SystemExit, match="failed: attention"):
        bench_gpu.main([str(tmp_path), "--device", "cpu", "--sections", "attention", "step"])
    assert [row.get("error") for row in record(tmp_path, "attention")["rows"]] == [None, "ValueError: our loss is off"]
    assert record(tmp_path, "step")["rows"] == [{"case": "case", "name": "second"}]


def test_clocks_and_driver_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "NVIDIA H200, 570.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W, 40\n"
    monkeypatch.setattr(bench_gpu_common.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    (gpu,) = bench_gpu_common.gpus()
    assert (gpu["name"], gpu["driver_version"], gpu["clocks.max.sm"]) == ("NVIDIA H200", "570.1", "1980 MHz")


def test_without_a_gpu_the_benchmark_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cpu --quick"):
        bench_gpu.main([str(tmp_path)])


def script(folder: Path, name: str, body: str) -> None:
    """A program ``name`` in ``folder`` that the shell script finds first."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def run_script(folder: Path, python: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": str(folder / python)}
    return subprocess.run([RUN, *arguments], env=environment, capture_output=True, text=True)


def test_script_runs_every_part_and_tells_of_the_one_that_failed(tmp_path: Path) -> None:
    out, calls = tmp_path / "out", tmp_path / "calls"
    script(tmp_path, "nvidia-smi", "echo a GPU")
    script(tmp_path, "fake", f'echo "$@" >> {calls}; case "$*" in *pytest*memory) exit 3;; "-") exit 1;; esac')
    done = run_script(tmp_path, "fake", str(out))
    assert done.returncode == 1
    assert done.stderr.strip() == "failed: tests"
    said = calls.read_text().splitlines()
    # The module is not built for this GPU; the second run of the tests fails; the rest goes on.
    assert said[:3] == ["-", "-m pip install --no-build-isolation --no-deps -e .", "-m pip freeze"]
    assert [line.split(" -n ")[0] for line in said[3:5]] == ["-m pytest -m gpu tests"] * 2
    assert said[5] == f"benchmarks/bench_gpu.py {out}"
    logs = {"build.log", "versions.log", "tests.log", "bench.log", "memcheck.log", "nvidia-smi.txt"}
    assert {path.name for path in out.iterdir()} == logs
    script(tmp_path, "fine", "exit 0")
    assert run_script(tmp_path, "fine", str(out)).returncode == 0


def test_script_without_a_gpu_or_a_folder(tmp_path: Path) -> None:
    script(tmp_path, "nvidia-smi", "exit 9")
    done = run_script(tmp_path, "python", str(tmp_path / "out"))
    assert (done.returncode, "no NVIDIA GPU" in done.stderr) == (2, True)
    done = run_script(tmp_path, "python")
    assert (done.returncode, "usage:" in done.stderr) == (2, True)


def test_script_takes_nine_minutes_at_most() -> None:
    parts = [line.split() for line in RUN.read_text().splitlines() if line.startswith("part ")]
    assert [part[1] for part in parts] == ["build", "versions", "tests", "bench", "memcheck"]
    assert sum(int(part[2]) for part in parts) <= 9 * 60
    assert sum(seconds for _, seconds in bench_gpu.SECTIONS.values()) <= int(parts[3][2])
