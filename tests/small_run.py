"""A continual run small enough for a test: three tasks, a byte tokenizer, a random model."""

from pathlib import Path

import pytest
import yaml
from evaluation_models import byte_tokenizer, small_model

from kpig_fast.data.collection import save_collection
from kpig_fast.data.schema import Change, Constraints, FormatRule, PoolInstruction, Row, Task, TaskCollection

TASKS = ("copy", "shout", "first")
WHISPER = Change(
    instruction=PoolInstruction(text="Please whisper the text.", key_parts=("whisper",)),
    constraints=Constraints(format=(FormatRule(kind="lower"),)),
)


def collection() -> TaskCollection:
    """Three seen tasks and one held-out one; 6 training and 3 test rows each."""
    answers = {"copy": lambda c: c, "shout": str.upper, "first": lambda c: c.split()[0], "last": lambda c: c.split()[1]}
    tasks, rows = [], []
    for name, answer in answers.items():
        wordings = [f"Please {name} the text.", f"Do this: {name} it."]
        tasks.append(
            Task(
                task=name,
                category="letters" if name in ("copy", "shout") else "words",
                role="held_out" if name == "last" else "seen",
                instructions=tuple(PoolInstruction(text=text, key_parts=(name,)) for text in wordings),
                metric="acc",
                constraints=Constraints(max_words=3),
                changed=WHISPER if name == "shout" else None,
            )
        )
        contexts = [f"{a} {b}" for a in ("ab", "cd", "ef") for b in ("gh", "ij", "kl")]
        rows += [
            Row(task=name, id=f"{name}-{n}", context=c, outputs=(answer(c),), split="train" if n < 6 else "test")
            for n, c in enumerate(contexts)
        ]
    return TaskCollection.of(tasks, rows)


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory) -> Path:
    """A folder with ``model/``, ``data/`` and ``config.yaml``; the run writes to ``run/``."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = byte_tokenizer(pad_token="</s>")
    small_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    save_collection(collection(), folder / "data")
    return folder


def config_values(folder: Path, run: Path, **changes) -> dict:
    """The values of a config file for a run in ``run``; ``changes`` replace sections."""
    return {
        "model": str(folder / "model"),
        "output_dir": str(run),
        "data": {"source": "folder", "path": str(folder / "data")},
        "stream": {"order": list(TASKS)},
        "replay": {"tasks": 1, "instances": 2},
        "training": {"per_device_train_batch_size": 4, "use_cpu": True, "learning_rate": 1e-3},
        "evaluation": {"limit": 2, "gain_rows": 1, "max_new_tokens": 2},
    } | changes


def write_config(folder: Path, run: Path, **changes) -> Path:
    """The config file of a run in ``run``, beside it."""
    path = run.parent / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(config_values(folder, run, **changes)))
    return path
