"""A dry run against hand-counted tokens, an independent count of distinct prefixes, and the trainer itself."""

import shutil
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
import yaml
from small_run import TASKS, collection, config_values
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast.cli import main
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import make_instance
from kpig_fast.training import dry_run as module
from kpig_fast.training.dry_run import dry_run
from kpig_fast.training.planning import training_arguments
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.sizing import ModelShape
from kpig_fast.training.trainer import KPIGTrainer

RATE = 1e9
ONE_BATCH = {"per_device_train_batch_size": 100, "use_cpu": True}


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    monkeypatch.setattr(module, "_product_rate", lambda *_: RATE)


@pytest.fixture
def config(small_folder, tmp_path):
    """Makes the config of a run that asks every instance in its task's first wording."""

    def make(**changes) -> RunConfig:
        values = config_values(small_folder, tmp_path / "run", **{"ablate": ["diversity"], **changes})
        return RunConfig.model_validate(values)

    return make


def instances(task: str) -> list:
    """The training instances of a task in its first wording."""
    tasks = collection()
    return [make_instance(tasks.tasks[task], row) for row in tasks.of_task(task, "train")]


def sequences(task: str, small_folder: Path) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Token ids of prompt and response of a task's instances, complete and masked."""
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(small_folder / "model"))
    pairs = encoder.encode_all(instances(task))
    return (
        [(*pair.complete_ids, *pair.response_ids) for pair in pairs],
        [(*pair.masked_ids, *pair.response_ids) for pair in pairs],
    )


def distinct_prefixes(sequences: list[tuple[int, ...]]) -> int:
    """Rows of a trie without the last token of each sequence, which predicts nothing."""
    return len({sequence[:end] for sequence in sequences for end in range(1, len(sequence))})


def test_lengths_are_those_of_the_text(config):
    # One token a byte: "Please copy the text.\n\nInput: ab gh\n\nOutput:", then " ab gh" and the end of the sequence.
    (step,) = dry_run(config(stream={"order": ["copy"]}), progress=False).steps
    assert step.tasks == ("copy",)
    assert step.lengths == (len("Please copy the text.\n\nInput: ab gh\n\nOutput:") + len(" ab gh") + 1,) * 6
    assert step.plain == 6 * step.lengths[0]


def test_both_branches_share_what_a_trie_shares(config, small_folder):
    (step,) = dry_run(config(stream={"order": ["shout"]}, training=ONE_BATCH), progress=False).steps
    complete, masked = sequences("shout", small_folder)
    assert step.apart == sum(map(len, [*complete, *masked]))
    (tree,) = step.trees
    assert tree.tokens == step.tokens == distinct_prefixes([*complete, *masked])
    assert tree.complete_rows == tree.masked_rows == 6 * len(" AB GH") + 6
    depths = [len(prefix) for prefix in {s[:end] for s in [*complete, *masked] for end in range(1, len(s))}]
    assert tree.depth == pytest.approx(sum(depths) / len(depths))


def test_plain_fine_tuning_has_no_masked_branch(config, small_folder):
    plain = dry_run(config(strategy="sft", ablate=[], stream={"order": ["first"]}, training=ONE_BATCH), progress=False)
    (step,) = plain.steps
    assert not plain.distils
    assert step.apart == step.plain
    assert [tree.masked_rows for tree in step.trees] == [0]


class Noting(KPIGTrainer):
    """Notes the forests that it trains."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.forests = [*getattr(self, "forests", []), inputs["forest"]]
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("training", [{}, {"max_tokens": 60}, {"gradient_accumulation_steps": 2}])
def test_trees_are_those_that_the_trainer_trains(config, small_folder, tmp_path, training):
    chosen = config(stream={"order": ["copy"]}, training={"per_device_train_batch_size": 2, "use_cpu": True} | training)
    (step,) = dry_run(chosen, progress=False).steps
    folder = small_folder / "model"
    trainer = Noting(
        AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        training_arguments(chosen, tmp_path, 0),
        instances("copy"),
        AutoTokenizer.from_pretrained(folder),
        progress=False,
    )
    trainer.train()
    assert [tree.tokens for tree in step.trees] == [len(forest.tree) for forest in trainer.forests]
    assert [tree.masked_rows for tree in step.trees] == [len(forest.masked_rows) for forest in trainer.forests]
    assert trainer.state.global_step == step.updates


@pytest.mark.parametrize(
    ("changes", "replayed"),
    [
        ({}, [0, 2, 2]),
        ({"replay": {"tasks": 5, "instances": 4}}, [0, 4, 8]),
        ({"replay": {"tasks": 1, "instances": 50}}, [0, 6, 6]),
        ({"replay": {"tasks": 0, "instances": 4}}, [0, 0, 0]),
        ({"strategy": "replay", "ablate": []}, [0, 2, 2]),
        ({"strategy": "sft", "ablate": []}, [0, 0, 0]),
        ({"strategy": "ewc", "ablate": []}, [0, 0, 0]),
    ],
)
def test_replay_is_at_most_its_budget(config, changes, replayed):
    steps = dry_run(config(**changes), progress=False).steps
    assert [step.tasks for step in steps] == [(task,) for task in TASKS]
    assert [len(step.lengths) for step in steps] == [6, 6, 6]
    assert [len(step.replayed) for step in steps] == replayed


def test_all_tasks_of_joint_are_one_step(config):
    (step,) = dry_run(config(strategy="joint", ablate=[]), progress=False).steps
    assert sorted(step.tasks) == sorted(TASKS)
    assert len(step.lengths) == 18
    assert step.updates == ceil(18 / 4)


def test_epochs_and_a_fixed_number_of_updates(config):
    def run(**training):
        (step,) = (found := dry_run(config(stream={"order": ["copy"]}, training={"use_cpu": True} | training))).steps
        return found, step

    one, step = run(per_device_train_batch_size=4)
    three, of_three = run(per_device_train_batch_size=4, num_train_epochs=3)
    five, of_five = run(per_device_train_batch_size=4, max_steps=5)
    assert (step.updates, of_three.updates, of_five.updates) == (2, 6, 5)
    assert step.tokens == of_three.tokens == of_five.tokens
    # Only the pre-pass is not repeated.
    epoch = (three.flops - one.flops) / 2
    assert 0 < one.flops - epoch < epoch / 2
    assert five.flops - one.flops == pytest.approx(1.5 * epoch)
    assert one.seconds == one.flops / RATE


def test_operations_are_at_least_those_of_the_matrix_products(config, small_folder):
    model = AutoModelForCausalLM.from_pretrained(small_folder / "model")
    matrices = sum(layer.weight.numel() for layer in model.model.layers.modules() if hasattr(layer, "in_features"))
    found = dry_run(config(stream={"order": ["copy"]}, strategy="sft", ablate=[]), progress=False)
    (step,) = found.steps
    # Two operations a weight and token, forward and twice backward; the last layer leaves some out, the head adds some.
    assert found.flops == pytest.approx(6 * matrices * step.tokens, rel=0.5)


def test_memory_counts_what_is_trained(config, small_folder):
    n = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(small_folder / "model").parameters())
    whole = dry_run(config(), progress=False).memory
    assert (whole.weights, whole.gradients, whole.optimizer) == (4 * n, 4 * n, 8 * n)
    adapter = dry_run(config(lora={"r": 2, "target_modules": ["q_proj"]}), progress=False).memory
    # Two layers, each with 32 x 2 and 2 x 32.
    assert adapter.optimizer == pytest.approx(8 * 2 * 2 * 64)
    half = dry_run(config(dtype="bfloat16"), progress=False).memory
    assert (half.weights, half.optimizer) == (2 * n, 4 * n)


def test_an_automatic_budget_gives_trees(config):
    training = {"use_cpu": True, "max_tokens": "auto", "per_device_train_batch_size": 100}
    (step,) = dry_run(config(stream={"order": ["copy"]}, training=training), progress=False).steps
    assert len(step.trees) == 1


def test_no_weights_are_read_and_nothing_is_written(config, small_folder, tmp_path):
    folder = tmp_path / "without weights"
    shutil.copytree(small_folder / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    before = sorted(tmp_path.rglob("*"))
    assert dry_run(config(model=str(folder)), progress=False).steps
    assert sorted(tmp_path.rglob("*")) == before


class HalfASecond:
    """A timer that runs its statement once and says that it took half a second."""

    def __init__(self, statement: str, globals: dict, num_threads: int) -> None:
        self.product = eval(statement, globals)
        assert num_threads == torch.get_num_threads()

    def blocked_autorange(self, *, min_run_time: float) -> SimpleNamespace:
        assert self.product.shape == (512, 5)
        assert min_run_time == 1
        return SimpleNamespace(median=0.5)


def test_the_rate_is_that_of_a_product(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(module, "Timer", HalfASecond)
    shape = cast(ModelShape, SimpleNamespace(hidden=3, intermediate=5))
    # 512 rows, a product and a sum for each of 512 * 3 * 5 pairs of factors.
    assert module._product_rate(shape, torch.device("cpu"), torch.float32) == 2 * 512 * 3 * 5 / 0.5


def write(config: RunConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def test_the_command_prints_it_and_makes_no_run(config, tmp_path, capsys):
    chosen = config()
    assert main(["train", write(chosen, tmp_path / "c.yaml"), "--dry-run", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed == dry_run(chosen, progress=False).to_text() + "\n"
    assert "36 rows kept, 0 dropped" in printed
    assert not chosen.output_dir.exists()


def test_rows_that_the_model_cannot_hold_are_dropped_with_the_reason(config, small_folder, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(small_folder / "data", data)
    rows = data / "instances.jsonl"
    rows.write_text(rows.read_text().replace('"ab gh"', f'"{"ab " * 80}gh"', 1))
    lax = config(data={"source": "folder", "path": str(data)})
    assert "35 rows kept, 1 dropped\n  too long" in dry_run(lax, progress=False).to_text()
    strict = config(data={"source": "folder", "path": str(data), "strict": True})
    assert main(["train", write(strict, tmp_path / "c.yaml"), "--dry-run"]) == 2
    assert "too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stream": {"order": ["sing"]}}, "'sing', which is no task to train"),
        ({"training": {"use_cpu": True, "save_total_limit": 1}}, "save_total_limit is 1"),
        ({"data": {"source": "folder", "path": "nowhere"}}, "nowhere"),
    ],
)
def test_what_stops_a_run_stops_a_dry_run(config, tmp_path, capsys, changes, message):
    assert main(["train", write(config(**changes), tmp_path / "c.yaml"), "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_other_processes_print_nothing(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kpig_fast.processes.rank", lambda: 1)
    assert main(["train", write(config(), tmp_path / "c.yaml"), "--dry-run", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
