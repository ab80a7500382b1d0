"""The continual run: folders, order, plans, resuming, and errors before anything is trained."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_run import TASKS, collection, config_values
from transformers import AutoModelForCausalLM

from kpig_fast import KeyPartScorer
from kpig_fast.evaluation.evaluate import read_predictions
from kpig_fast.evaluation.half_listening import score_obedience
from kpig_fast.evaluation.runs import UNTRAINED, is_complete, mark_complete, read_run, step_folder
from kpig_fast.method.replay import ReplayPlan
from kpig_fast.training.checkpoints import mean_loss, newest_checkpoint
from kpig_fast.training.data import load_data
from kpig_fast.training.run_config import DataConfig, RunConfig
from kpig_fast.training.stream import Stream


def open_stream(folder, run, **changes) -> Stream:
    return Stream.open(RunConfig.model_validate(config_values(folder, run, **changes)), progress=False)


def weights(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(step_folder(run, step) / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(small_folder, tmp_path_factory):
    """A whole kpig run of three steps."""
    run = tmp_path_factory.mktemp("finished") / "run"
    open_stream(small_folder, run).run()
    return run


def test_every_step_is_kept_whole(finished):
    for step in (UNTRAINED, 0, 1, 2):
        assert is_complete(step_folder(finished, step))
    files = {path.name for path in step_folder(finished, 2).iterdir()}
    assert {"plan.json", "model", "metrics.json", "predictions.jsonl", "COMPLETE"} <= files
    assert not list(finished.rglob("*.partial"))
    assert not list(finished.rglob("teacher"))
    assert json.loads((finished / "environment.json").read_text())["packages"]["torch"]


def test_metrics_cover_the_learnt_and_the_held_out_tasks(finished):
    history = read_run(finished)
    assert [step.step for step in history] == [UNTRAINED, 0, 1, 2]
    assert [task.task for task in history[2].evaluation.tasks] == ["copy", "shout", "last"]
    assert set(history[3].gains) == {*TASKS, "last"}
    assert [step.tasks for step in history[1:]] == [("copy",), ("shout",), ("first",)]
    assert history[3].training["instances"] == 6 + 2


def test_learnt_tasks_are_asked_under_their_changed_wording(finished):
    asked = [[one.task for one in metrics.obedience] for metrics in read_run(finished)]
    assert asked == [["shout"], [], ["shout"], ["shout"]]
    answers = read_predictions(step_folder(finished, 2) / "half_listening.jsonl")
    assert {one.task for one in answers} == {"shout"}
    assert all("whisper" in one.prompt for one in answers)
    assert list(read_run(finished)[-1].obedience) == score_obedience(answers, collection())


def test_plans_replay_the_least_gain_with_the_model_of_the_step_before(finished, small_folder, tmp_path):
    plan = ReplayPlan.from_json((step_folder(finished, 2) / "plan.json").read_text())
    assert set(plan.mean_gains) == {"copy", "shout"}
    assert plan.chosen == (min(plan.mean_gains, key=lambda task: plan.mean_gains[task]),)
    copied = tmp_path / "run"
    config = config_values(small_folder, copied)
    stream = Stream.open(RunConfig.model_validate(config), progress=False)
    before = AutoModelForCausalLM.from_pretrained(step_folder(finished, 1) / "model")
    stream.model.load_state_dict(before.state_dict())
    assert stream.planner.plan(2).to_json() == plan.to_json()


def test_the_prepass_reads_what_the_plan_has_scored(small_folder, tmp_path, monkeypatch):
    scored = []
    score_pairs = KeyPartScorer.score_pairs
    monkeypatch.setattr(
        KeyPartScorer,
        "score_pairs",
        lambda self, x, **options: (scored.append(len(x)), score_pairs(self, x, **options))[1],
    )
    stream = open_stream(small_folder, tmp_path / "run")
    stream.run()
    # Two drawn instances of each earlier task for the plan, and then six new ones.
    assert [n for n in scored if n] == [6, 2, 6, 4, 6]
    assert read_run(tmp_path / "run")[-1].training["replayed_instances"] == 2


def test_the_config_says_what_is_seen_and_held_out(small_folder, tmp_path):
    values = config_values(small_folder, tmp_path)["data"]
    roles = {"seen": ["shout", "copy"], "held_out": ["first"]}
    chosen, _ = load_data(DataConfig(**{**values, **roles}))
    assert {role: chosen.names(role) for role in roles} == roles
    assert {row.task for row in chosen.rows} == {"shout", "copy", "first"}
    only, _ = load_data(DataConfig(**{**values, "seen": ["shout"]}))
    assert (only.names("seen"), only.names("held_out")) == (["shout"], [])
    moved, _ = load_data(DataConfig(**{**values, "held_out": ["copy"]}))
    assert (moved.names("seen"), moved.names("held_out")) == (["shout", "first"], ["copy", "last"])
    with pytest.raises(ValueError, match="unknown task 'shuot'; known tasks: copy, shout"):
        load_data(DataConfig(**{**values, "seen": ["shuot"]}))


def test_the_final_model_loads_plainly(finished):
    model = AutoModelForCausalLM.from_pretrained(step_folder(finished, 2) / "model")
    assert model.config._attn_implementation == "sdpa"
    assert "kpig" not in (step_folder(finished, 2) / "model" / "config.json").read_text()


@pytest.mark.parametrize("lost", ["COMPLETE", "everything but the plan"])
def test_a_stopped_run_goes_on_and_ends_bitwise_the_same(finished, small_folder, tmp_path, lost):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    text = (run / "config.yaml").read_text().replace(str(finished), str(run))
    (run / "config.yaml").write_text(text)
    folder = step_folder(run, 2)
    for path in folder.iterdir():
        if path.name == lost or (lost != "COMPLETE" and path.name != "plan.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    open_stream(small_folder, run).run()
    again, before = weights(run, 2), weights(finished, 2)
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert not torch.equal(weights(run, 1)["lm_head.weight"], before["lm_head.weight"])
    assert read_run(run)[-1].evaluation == read_run(finished)[-1].evaluation


def test_a_whole_run_does_nothing_more(finished, small_folder):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")}
    open_stream(small_folder, finished).run()
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("model.safetensors")} == before


@pytest.mark.parametrize(
    ("strategy", "n_steps", "instances"),
    [
        ("sft", 3, [6, 6, 6]),
        ("replay", 3, [6, 8, 8]),
        ("entropy", 3, [6, 8, 8]),
        ("inscl", 3, [6, 8, 8]),
        ("ewc", 3, [6, 6, 6]),
        ("l2", 3, [6, 6, 6]),
        ("joint", 1, [18]),
    ],
)
def test_other_strategies_train_without_a_teacher(small_folder, tmp_path, strategy, n_steps, instances):
    run = tmp_path / "run"
    open_stream(small_folder, run, strategy=strategy).run()
    steps = [step for step in read_run(run) if step.step != UNTRAINED]
    assert len(steps) == n_steps
    assert [step.training["instances"] for step in steps] == instances
    assert all("mean_gain" not in step.training for step in steps)


def test_steps_by_category_and_seeded_order(small_folder, tmp_path):
    by_category = open_stream(small_folder, tmp_path / "a", stream={"by": "category", "order": ["words", "letters"]})
    assert by_category.steps == [["first"], ["copy", "shout"]]
    orders = {
        tuple(map(tuple, open_stream(small_folder, tmp_path / f"s{seed}", stream={}, seed=seed).steps))
        for seed in range(8)
    }
    assert len(orders) > 2
    assert all(sorted(order) == sorted((name,) for name in TASKS) for order in orders)
    again = open_stream(small_folder, tmp_path / "s3", stream={}, seed=3).steps
    assert open_stream(small_folder, tmp_path / "other", stream={}, seed=3).steps == again
    assert len(open_stream(small_folder, tmp_path / "two", stream={"steps": 2}).steps) == 2


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"order": ["copy", "nothing"]}, "names 'nothing', which is no task to train; known: copy, shout, first"),
        ({"order": ["last"]}, "names 'last'"),
        ({"order": ["copy", "copy"]}, "names a step twice"),
    ],
)
def test_a_wrong_order_is_named_before_training(small_folder, tmp_path, stream, message):
    with pytest.raises(ValueError, match=message):
        open_stream(small_folder, tmp_path / "run", stream=stream)


def test_a_folder_of_another_run_is_not_touched(finished, small_folder):
    with pytest.raises(ValueError, match="holds a run with other config"):
        open_stream(small_folder, finished, seed=1)


def test_instances_take_a_seeded_wording_of_the_pool(small_folder, tmp_path):
    stream = open_stream(small_folder, tmp_path / "run")
    plan = ReplayPlan(0, 0, 0.3, 1, 2, "", (), (), {}, ())
    first = [stream.planner.instances(step, plan) for step in range(3)]
    assert [[i.instruction for i in step] for step in first] == [
        [i.instruction for i in stream.planner.instances(step, plan)] for step in range(3)
    ]
    assert len({i.instruction for step in first for i in step}) > len(TASKS)


def test_changed_data_under_a_run_is_named(small_folder, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_folder / "data", data)
    section = {"source": "folder", "path": str(data)}
    open_stream(small_folder, run, data=section)
    open_stream(small_folder, run, data=section)
    rows = data / "instances.jsonl"
    rows.write_text(rows.read_text().replace("ab gh", "ab gg"))
    with pytest.raises(ValueError, match="holds a run with other data"):
        open_stream(small_folder, run, data=section)


def test_a_kept_model_is_not_trained_again(finished, small_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(finished), str(run)))
    (step_folder(run, 2) / "COMPLETE").unlink()
    left = step_folder(run, 2) / "trainer" / "checkpoint-1"
    left.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(Stream, "_train", lambda *_: pytest.fail("trained again"))
    open_stream(small_folder, run).run()
    assert read_run(run)[-1] == read_run(finished)[-1]
    assert not left.exists()


def test_one_checkpoint_alone_is_refused(small_folder, tmp_path):
    with pytest.raises(ValueError, match="save_total_limit is 1"):
        open_stream(small_folder, tmp_path / "run", training={"save_total_limit": 1, "use_cpu": True})


def test_a_half_written_checkpoint_is_named_and_passed_over(tmp_path):
    for step, whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        if whole:
            mark_complete(folder)
    with pytest.warns(UserWarning, match=r"checkpoint-11 was not written to its end"):
        assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_mean_loss_weighs_every_optimizer_step():
    assert mean_loss([{"loss": 4.0, "step": 1}, {"loss": 1.0, "step": 4}, {"train_loss": 9.0, "step": 4}]) == 7 / 4
    assert math.isnan(mean_loss([]))


def final(run):
    return weights(run, 2)["lm_head.weight"]


def test_penalties_hold_the_weights_and_grow_over_the_steps(small_folder, tmp_path):
    drift = {}
    for strategy, strength in (("sft", 1.0), ("l2", 0.0), ("l2", 1e3), ("ewc", 1e6)):
        run = tmp_path / f"{strategy}-{strength}"
        training = {"per_device_train_batch_size": 4, "use_cpu": True, "optim": "sgd", "learning_rate": 1e-4}
        settings = {"penalty": {"strength": strength, "instances": 4}, "training": training}
        open_stream(small_folder, run, strategy=strategy, **settings).run()
        drift[strategy, strength] = float((final(run) - weights(run, 0)["lm_head.weight"]).norm())
    assert drift["l2", 0.0] == drift["sft", 1.0]
    assert drift["l2", 1e3] < drift["sft", 1.0]
    assert drift["ewc", 1e6] < drift["sft", 1.0]
    one, two = (load_file(step_folder(run, step) / "fisher.safetensors")["lm_head.weight"] for step in (1, 2))
    assert (two >= one).all()
    assert (two > one).any()


@pytest.mark.parametrize("part", ["divergence", "temperature", "masks", "diversity"])
def test_kpig_without_a_part(finished, small_folder, tmp_path, part):
    run = tmp_path / "run"
    stream = open_stream(small_folder, run, ablate=[part])
    stream.run()
    assert not torch.equal(final(run), final(finished))
    plan = ReplayPlan.from_json((step_folder(run, 2) / "plan.json").read_text())
    assert bool(plan.measured) == (part == "masks")
    assert bool(plan.mean_gains) == (part != "masks")
    training = read_run(run)[-1].training
    assert ("mean_gain" in training) == (part != "divergence")
    instances = stream.planner.instances(2, plan)
    assert all(not i.key_parts for i in instances) == (part == "masks")
    assert (len({i.instruction for i in instances}) == 2) == (part == "diversity")
    if part == "masks":
        assert training["mean_gain"] == 0.0


def test_only_kpig_has_parts_to_take_away(small_folder, tmp_path):
    with pytest.raises(ValueError, match=r"ablate takes parts away from kpig.*'sft'"):
        open_stream(small_folder, tmp_path / "run", strategy="sft", ablate=["masks"])
