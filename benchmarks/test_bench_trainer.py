"""The benchmarks of the continual trainer: what they count, what they compare, and a whole small run of each."""

import gzip
import json
from itertools import count
from pathlib import Path
from typing import Any

import bench_planning
import bench_stream
import bench_trainer
import common
import pytest
from bench_planning import PREPASS, STEP, Planning, named
from bench_trainer import COMPUTING, OUTSIDE, OVERHEAD, REST, StepClock
from transformers import Trainer

from kpig_fast.evaluation.runs import step_folder
from kpig_fast.method.replay import ReplayPlan

SMALL = ["--quick", "--layers", "1", "--hidden", "32", "--threads", "1"]
TRAINED = [*SMALL, "--tasks", "2", "--instances", "6", "--micro-batch", "2", "--accumulation", "2"]
PLANNED = [*SMALL, "--tasks", "8", "--instances", "2", "--rows", "3"]
NOTHING = dict.fromkeys((*COMPUTING, *OVERHEAD), 0.0)

needs_data = pytest.mark.skipif(not common.SHARED.is_dir(), reason="the real tasks do not lie beside this checkout")


@pytest.fixture(scope="module")
def planned() -> Planning:
    """Eight earlier tasks, of which 2 instances are drawn each, and a new one of 3 rows."""
    return bench_planning.planning(bench_planning.options().parse_args(PLANNED))


def plan(**mean_gains: float) -> ReplayPlan:
    """A plan of which only the mean gains matter."""
    numbers: Any = dict.fromkeys(("step", "seed", "alpha", "n_replay_tasks", "n_per_task"), 1)
    return ReplayPlan(**numbers, model_hash="", drawn=(), gains=(), mean_gains=mean_gains, chosen=())


def test_parts_of_a_step_add_up_and_inner_ones_count_for_themselves() -> None:
    now = 0.0
    clock = StepClock(lambda: now)

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    def collate() -> str:
        wait(2)
        pack()
        wait(4)
        return "a batch"

    pack = clock.timed("tree building", lambda: wait(8))
    wait(100)
    clock.next_step()
    wait(1)
    assert clock.timed("collator", collate)() == "a batch"
    wait(16)
    clock.next_step()
    wait(32)
    clock.timed("backward", wait)(64)
    assert clock.steps == [
        NOTHING | {REST: 17, "collator": 6, "tree building": 8},
        # What follows the last part is seen when the next one begins.
        NOTHING | {REST: 32, "backward": 64},
    ]


def test_a_part_ends_with_an_error_too() -> None:
    clock = StepClock(count(0.0).__next__)
    clock.next_step()
    with pytest.raises(ZeroDivisionError):
        clock.timed("backward", lambda: 1 / 0)()
    clock.next_step()
    assert clock.steps[0] == NOTHING | {REST: 2, "backward": 1}


def test_step_may_begin_inside_of_a_part() -> None:
    clock = StepClock(count(0.0).__next__)
    clock.next_step()
    clock.timed("collator", clock.next_step)()
    assert clock.steps == [NOTHING | {REST: 1, "collator": 1}, NOTHING | {"collator": 1}]


def test_shares_are_of_the_whole_step_and_without_what_computes() -> None:
    computing = {"forward and loss": 30.0, "backward": 50.0, "gradient clipping": 2.0, "optimizer": 6.0}
    first = NOTHING | computing | {"zeroing gradients": 2.0, "sampler": 1.0, "collator": 4.0, REST: 5.0}
    second = NOTHING | computing | {"zeroing gradients": 12.0, "collator": 25.0, "tree building": 75.0}
    seconds, shares = bench_trainer.by_part([first, second], "here")
    assert seconds["step, here"] == [100.0, 200.0]
    assert seconds[f"{OUTSIDE}, here"] == [10.0, 100.0]
    assert seconds["collator, here"] == [4.0, 25.0]
    assert shares.pop(f"% of a step, here: {OUTSIDE}") == [10.0, 50.0]
    assert shares == {f"% of a step, here: {part}": [first[part], second[part] / 2] for part in OVERHEAD}


def test_every_part_but_the_rest_is_timed_somewhere() -> None:
    assert {part for part, _, _ in bench_trainer.CALLS} | {REST} == {*COMPUTING, *OVERHEAD}
    before = [getattr(owner, name) for _, owner, name in bench_trainer.CALLS]
    asked = Trainer.get_batch_samples
    with bench_trainer.timing(StepClock(lambda: 0.0)):
        assert all(getattr(owner, name) is not own for (_, owner, name), own in zip(bench_trainer.CALLS, before))
        assert Trainer.get_batch_samples is not asked
    assert [getattr(owner, name) for _, owner, name in bench_trainer.CALLS] == before
    assert Trainer.get_batch_samples is asked


@needs_data
def test_steps_of_a_training_hold_every_part_and_workers_collate_elsewhere(tmp_path: Path) -> None:
    s = common.setting(common.parser("", tasks=2, instances=6).parse_args(SMALL))
    losses = {}
    for workers in (0, 1):
        clock = StepClock(count(0.0).__next__)
        losses[workers] = bench_trainer.train(
            s,
            tmp_path,
            clock,
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=workers,
        )
        assert len(clock.steps) == len(losses[workers]) == 3
        elsewhere = {"collator", "tree building"} if workers else set()
        for step in clock.steps:
            assert {part for part, ticks in step.items() if not ticks} == elsewhere
    assert losses[0] == losses[1]
    assert len(list(tmp_path.glob("teacher/part-*"))) == 1


@needs_data
def test_whole_run_of_the_trainer(tmp_path: Path, capsys) -> None:
    bench_trainer.main([*TRAINED, "--out", str(tmp_path / "run.json")])
    run = json.loads((tmp_path / "run.json").read_text())
    assert len(run["median_ratios"]) == 2 * (len(OVERHEAD) + 1)
    assert (run["options"]["micro_batch"], run["options"]["accumulation"]) == (2, 2)
    for where in bench_trainer.WORKERS:
        parts = [run["seconds"][f"{part}, {where}"][0] for part in (*COMPUTING, *OVERHEAD)]
        assert run["seconds"][f"step, {where}"] == [pytest.approx(sum(parts))]
        (outside,), *others = (run["ratios"][f"% of a step, {where}: {part}"] for part in (OUTSIDE, *OVERHEAD))
        assert 0 < outside < 100
        assert outside == pytest.approx(sum(value for (value,) in others))
    printed = capsys.readouterr().out
    assert all(f"| {name} | {value:.2f} |" in printed for name, value in run["median_ratios"].items())


@needs_data
def test_other_losses_are_not_reported(monkeypatch) -> None:
    losses = iter([[1.0, 2.0, 3.0], [1.0, 2.1, 3.0]])
    monkeypatch.setattr(bench_trainer, "train", lambda *_, **__: next(losses))
    monkeypatch.setattr(bench_trainer, "by_part", lambda *_: ({}, {}))
    with pytest.raises(ValueError, match="losses differ"):
        bench_trainer.main(TRAINED)


def write_tasks(folder: Path) -> None:
    """Three tasks without key parts; the rows of the first two are mixed."""
    definitions = {"a": "Say yes, or no.", "b": "Count", "c": "Never read."}
    rows = [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 2)]
    tasks = [{"task": name, "definition": text, "licence": "free"} for name, text in definitions.items()]
    lines = [json.dumps({"task": t, "id": f"{t}{n}", "input": f"x{n}", "output": ["y", "z"]}) for t, n in rows]
    (folder / "tasks.json.gz").write_bytes(gzip.compress(json.dumps(tasks).encode()))
    (folder / "train.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def test_first_clause_stands_in_for_the_key_parts(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    found = bench_planning.unmarked_tasks(tmp_path, 2, 2)
    assert {name: task.instructions[0].key_parts for name, task in found.tasks.items()} == {
        "a": ("Say yes",),
        "b": ("Count",),
    }
    assert [row.id for row in found.rows] == ["a0", "a1", "b0", "b1"]
    assert found.rows[1].context == "x1"
    assert found.rows[1].outputs == ("y", "z")


def test_planning_is_compared_for_each_earlier_task_and_with_the_training() -> None:
    # Eight tasks: one plan took 8 s, two plans for four each 10 s together.
    seconds = {named(8): [8.0, 16.0], named(4): [10.0, 12.0], PREPASS: [3.0, 4.0], STEP: [23.0, 24.0]}
    assert bench_planning.shares(seconds, [8, 4]) == {
        "an earlier task among 4: the time of one among 8": [1.25, 0.75],
        "% of the training alone: pre-pass and plan for 8 earlier tasks": [55.0, 100.0],
        "% of the whole step: pre-pass and plan for 8 earlier tasks": [pytest.approx(1100 / 31), 50.0],
        "% of the training alone: pre-pass and plan for 4 earlier tasks": [40.0, 50.0],
        "% of the whole step: pre-pass and plan for 4 earlier tasks": [
            pytest.approx(800 / 28),
            pytest.approx(1000 / 30),
        ],
    }


def test_plans_with_other_gains_are_not_timed() -> None:
    one = plan(a=0.1, b=0.2)
    bench_planning.check(one, [plan(a=0.1), plan(b=0.2)])
    with pytest.raises(ValueError, match="mean gains differ"):
        bench_planning.check(one, [plan(a=0.1), plan(b=0.20002)])


@needs_data
def test_plans_are_made_anew_for_all_earlier_tasks(planned: Planning, monkeypatch, tmp_path: Path) -> None:
    p = planned
    assert p.sizes == [8, 4, 2, 1]
    assert len({*p.earlier, p.new}) == 9
    for size in p.sizes:
        made = p.plans(tmp_path / "run", size)()
        assert [len(one.mean_gains) for one in made] == [size] * (8 // size)
        assert [task for one in made for task in dict.fromkeys(drawn.task for drawn in one.drawn)] == p.earlier
        assert all(len(one.drawn) == 2 * size and set(one.gains) != {0.0} for one in made)
    run = p.plans(tmp_path / "run", 8)
    monkeypatch.setattr(p.scorer, "alpha", 0.5)
    assert run()[0].alpha == 0.5


@needs_data
def test_step_trains_the_new_task_and_what_is_replayed(planned: Planning, tmp_path: Path) -> None:
    p = planned
    made = p.trainer(tmp_path / "run")
    assert made.args.train_batch_size == 48
    assert len(made.pairs) == 3 + 8 * 2
    assert all(pair in made.planned for pair in made.pairs[3:])
    teacher = step_folder(tmp_path / "run", 1) / "trainer" / "teacher"
    (of_the_plan,) = teacher.glob("part-*")
    before = {name: x.clone() for name, x in p.model.state_dict().items()}
    made.train()
    assert {of_the_plan} < {*teacher.glob("part-*")}
    assert all((x == before[name]).all() for name, x in p.model.state_dict().items())
    p.trainer(tmp_path / "run")
    assert [*teacher.glob("part-*")] == [of_the_plan]


@needs_data
@pytest.mark.parametrize("tasks", ["12", "1000000"])
def test_tasks_that_cannot_be_cut_or_are_not_there_are_refused(tasks: str) -> None:
    with pytest.raises(ValueError, match=f"--tasks is {tasks}; give a multiple of 8 that is at most"):
        bench_planning.main([*SMALL, "--tasks", tasks, "--instances", "1"])


@needs_data
def test_whole_run_of_planning_with_a_pretrained_model_and_unmarked_tasks(tmp_path: Path, capsys) -> None:
    out, model = tmp_path / "run.json", common.SHARED / "models/stories260K-sni"
    command = [*SMALL, "--model", str(model), "--tasks", "24", "--instances", "1", "--rows", "2", "--out", str(out)]
    bench_planning.main(command)
    run = json.loads(out.read_text())
    assert (run["model"], run["parameters"]) == ("stories260K-sni", 260_032)
    assert run["instances"] == {"new": 2, "replayed": 10}
    assert run["largest_gain"] > 0.01
    assert set(run["seconds"]) == {*map(named, (24, 12, 6, 3)), PREPASS, STEP}
    assert len(run["median_ratios"]) == 3 + 2 * 4
    each = run["seconds_per_earlier_task"]
    assert each["6"] == pytest.approx(run["seconds"][named(6)][0] / 24)
    printed = capsys.readouterr().out
    assert all(f"| {name} | {value:.2f} |" in printed for name, value in run["median_ratios"].items())


@pytest.mark.slow
@needs_data
def test_a_killed_stream_ends_and_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    sizes = ["--steps", "3", "--rows", "16", "--limit", "1", "--kills", "1"]
    bench_stream.main([*sizes, "--out", str(out)])
    run = json.loads(out.read_text())
    assert run["steps"] == [0, 2]
    assert all(len(values) == 2 and min(values) > 0 for values in run["seconds"].values())
    (minutes,) = run["ratios"]["minutes from start to report: 3 steps, 1 of them killed"]
    assert 60 * minutes > sum(map(sum, run["seconds"].values()))
    printed = capsys.readouterr().out
    assert all(f"| {name} | {value:.2f} |" in printed for name, value in run["median_ratios"].items())
