"""What the evidence is made of: the arms that go through a stream of tasks, and the values that are tried.

Every setting is a dotted name of ``RunConfig`` with its value. Arms differ by what they name here and by nothing else:
model, data, task orders, optimizer and budget of replayed instances are those of the stream (``suite.yaml``,
``real.yaml``).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from kpig_fast.training.run_config import Part

Settings = Mapping[str, Any]

HERE = Path(__file__).resolve().parent
SHARED = HERE.parents[1] / ".." / "shared"
CORE = SHARED / "data" / "sni_core"
STREAMS: Mapping[str, Settings] = {
    "suite": {},
    "real": {
        "model": str(SHARED / "models" / "stories260K-sni"),
        "data.path": str(CORE / "tasks"),
        "data.side_files": [str(CORE / "manifest.json"), str(CORE / "pools.jsonl")],
    },
}

# By the names that ``kpig eval`` gives them.
OURS = "kpig"
ARMS: Mapping[str, Settings] = {
    "sft": {"strategy": "sft"},
    "l2": {"strategy": "l2"},
    "ewc": {"strategy": "ewc"},
    "replay": {"strategy": "replay"},
    "entropy": {"strategy": "entropy"},
    "inscl": {"strategy": "inscl"},
    OURS: {"strategy": "kpig"},
    **{f"kpig -{part}": {"strategy": "kpig", "ablate": [part]} for part in get_args(Part)},
    "joint": {"strategy": "joint"},
}
# A seed decides the order of the tasks, the wordings and instances drawn, and the batches.
SEEDS = (0, 1, 2, 3, 4)

# Values are chosen by validation rows, in streams of other seeds that train two thirds of the seen tasks and withhold
# the rest; no held-out task is asked. First the learning rate, by sft and for all arms, then what single arms have.
SELECTION_SEEDS = (100, 101, 102)
FOLDS = 3
CHOICES: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "sft": ("training.learning_rate", (2e-4, 5e-4, 1e-3, 2e-3)),
    "kpig": ("training.lam", (0.02, 0.1, 0.5, 2.0, 8.0, 32.0)),
    "ewc": ("penalty.strength", (1.0, 10.0, 100.0)),
    "l2": ("penalty.strength", (0.01, 0.1, 1.0)),
}

# One setting of kpig at a time, the others as they are.
SENSITIVITY: Mapping[str, tuple[Any, ...]] = {
    "training.lam": (0.0, 0.02, 0.1, 0.5, 2.0, 8.0, 32.0),
    "training.alpha": (0.1, 0.3, 0.6, 1.0),
    "replay.tasks": (0, 1, 2, 4, 8),
    "replay.instances": (2, 5, 10, 20),
}
SENSITIVITY_SEEDS = (0, 1)
