"""The text of a dry run: every figure is what was counted, and the histogram holds every instance."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kpig_fast.training.forecast import Forecast, StepSize, TreeSize
from kpig_fast.training.sizing import Memory

MIB = 2**20
STEPS = (
    StepSize(("sort",), (10, 12, 20), (), 90, (TreeSize(30, 5, 5, 9.0), TreeSize(20, 2, 3, 8.0)), 4, 2.0),
    StepSize(("a", "b", "c", "d"), (11,), (10, 12), 70, (TreeSize(40, 4, 4, 7.0),), 2, 2.0),
)
FORECAST = Forecast(
    data="4 rows kept, 1 dropped",
    strategy="kpig",
    distils=True,
    steps=STEPS,
    memory=Memory(
        weights=MIB,
        gradients=2 * MIB,
        optimizer=3 * MIB,
        activations=4 * MIB,
        teacher=0,
        head=5 * MIB,
        backward=6 * MIB,
    ),
    flops=7.2e12,
    flops_per_second=2e9,
    device="CPU, threads: 2",
)


def with_lengths(lengths: list[int]) -> Forecast:
    return replace(FORECAST, steps=(replace(STEPS[0], lengths=tuple(lengths)),))


def line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_sums_of_a_step():
    assert STEPS[1].plain == 11 + 10 + 12
    assert STEPS[0].tokens == 50


def test_the_steps_are_listed_with_their_tasks():
    text = FORECAST.to_text()
    assert text.startswith("4 rows kept, 1 dropped\n")
    assert "2 steps, strategy kpig" in text
    assert line(text, "1  ").split() == ["1", "3", "0", "4", "sort"]
    assert line(text, "2  ").split() == ["2", "1", "2", "2", "a,", "b,", "c", "and", "1", "more"]


def test_what_the_tree_saves_is_a_ratio_to_plain_fine_tuning():
    text = FORECAST.to_text()
    assert line(text, "plain fine-tuning").split()[-1] == "75"
    assert line(text, "both instructions, apart").split()[-1] == "160"
    # 90 / 75 and 90 / 160.
    assert " 90  1.20 × plain fine-tuning, 0.56 × apart" in line(text, "both instructions, token tree")


def test_without_divergence_there_is_one_instruction():
    text = replace(FORECAST, distils=False, strategy="sft").to_text()
    assert "both instructions" not in text
    assert line(text, "the same, token tree").endswith("1.20 × plain fine-tuning")


def test_memory_is_told_by_part_for_the_largest_tree():
    text = FORECAST.to_text()
    # 1 + 2 + 3 + 4 and the larger of 5 and 6.
    assert "with the largest tree (40 tokens), estimate: 16.0 MiB" in text
    assert line(text, "optimizer").split() == ["optimizer", "3.0", "MiB"]
    large = replace(FORECAST, memory=replace(FORECAST.memory, weights=3 * 2**30))
    assert line(large.to_text(), "weights").split() == ["weights", "3.0", "GiB"]


@pytest.mark.parametrize(("strategy", "told"), [("kpig", False), ("l2", True), ("ewc", True), ("sft", False)])
def test_what_a_penalty_keeps_is_not_passed_over(strategy, told):
    assert ("penalty's copies of the weights" in replace(FORECAST, strategy=strategy).to_text()) == told


def test_time_is_a_lower_bound_at_a_stated_rate():
    assert FORECAST.seconds == 3600
    text = FORECAST.to_text()
    assert "time of training, lower bound: 1:00:00" in text
    assert "2 GFLOP/s (CPU, threads: 2)" in text
    assert "evaluation come on top" in text


def test_quantiles_are_lengths_that_occur():
    lengths = [*range(1, 100), 1000]
    assert "min 1, median 50, 95 % 95, max 1000" in with_lengths(lengths).to_text()


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=300))
def test_the_histogram_holds_every_instance_once(lengths):
    rows = re.findall(r"^ +(\d+) – (\d+) +([\d,]+)  (#*)$|^ +(\d+) – (\d+) +0$", with_lengths(lengths).to_text(), re.M)
    bins = [(int(a or c), int(b or d), int((n or "0").replace(",", "")), bar) for a, b, n, bar, c, d in rows]
    assert bins[0][0] == min(lengths)
    assert bins[-1][1] == max(lengths)
    assert all(first[1] + 1 == second[0] for first, second in pairwise(bins))
    for first, last, n, bar in bins:
        assert n == sum(first <= length <= last for length in lengths)
        assert bool(bar) == (n > 0)
    assert max(len(bar) for *_, bar in bins) == 40
