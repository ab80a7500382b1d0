"""Three instances and a scorer whose model is tiny, for the tests of the teacher."""

from pathlib import Path

import torch
from evaluation_models import byte_tokenizer
from families import make_model
from torch import Tensor

from kpig_fast import Instance, KeyPartScorer
from kpig_fast.teacher import Teacher

TOKENIZER = byte_tokenizer()
INSTANCES = [
    Instance("Answer yes or no.", "yes", "Is 4 even?", ("yes or no",)),
    Instance("Answer yes or no.", "no, never", "Is 7 even?", ("yes or no",)),
    Instance("Say hello.", "hello"),
]
OFFSETS = [0, 5, 16, 23]
# Cuts them into five parts of about five rows: each instance is one of its own, and two are empty.
FIVE_PARTS = 5


def make_scorer(family: str = "llama", **options: float) -> KeyPartScorer:
    return KeyPartScorer(make_model(family, vocab_size=len(TOKENIZER)), TOKENIZER, **options)  # type: ignore[arg-type]


def every_row(teacher: Teacher) -> Tensor:
    return teacher.hidden(torch.arange(sum(map(len, teacher.parts))))


def names(folder: Path) -> list[str]:
    """Kinds and numbers of the files in a folder: ``head``, ``part-0``, …"""
    return sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())
