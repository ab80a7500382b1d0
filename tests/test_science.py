"""The evidence in short: one seed of the suite's stream, kpig against plain tuning, from the runs to the tables."""

import csv
import shutil
import sys
from pathlib import Path

import pytest

SCIENCE = Path(__file__).resolve().parents[1] / "benchmarks" / "science"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(SCIENCE))
    import science

    folder = tmp_path_factory.mktemp("science")
    (folder / "results" / "suite").mkdir(parents=True)
    shutil.copy(SCIENCE.parent / "results/science/suite/chosen.yaml", folder / "results" / "suite")
    arms = ["--arms", "sft", "kpig", "--seeds", "0", "--processes", "2"]
    science.main(["compare", "suite", "--runs", str(folder / "runs"), "--results", str(folder / "results"), *arms])
    return folder / "results" / "suite"


def final(results: Path, arm: str, role: str, figure: str) -> float:
    with (results / "scores.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["level"] == "role" and row["arm"] == arm]
    last = max(int(row["step"]) for row in rows)
    (found,) = [r for r in rows if int(r["step"]) == last and (r["role"], r["figure"]) == (role, figure)]
    return float(found["value"])


def test_kpig_keeps_more_of_what_was_learnt(results: Path) -> None:
    assert final(results, "kpig", "seen", "P") > final(results, "sft", "seen", "P")
    assert final(results, "kpig", "seen", "forgetting") < final(results, "sft", "seen", "forgetting")


def test_the_tables_have_every_arm(results: Path) -> None:
    table = (results / "paper.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["untrained", "sft", "kpig"]
    assert {"gain.png", "comparison.md"} <= {path.name for path in results.iterdir()}
