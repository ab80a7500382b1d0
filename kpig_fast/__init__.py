"""Continual instruction tuning with Key-Part Information Gain (KPIG) on a token tree.

The public names below load on first use, so that importing the package costs no torch import.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpig_fast.data.encoding import EncodedPair
    from kpig_fast.data.schema import Instance
    from kpig_fast.scorer import GainScores, KeyPartScorer
    from kpig_fast.training.config import KPIGConfig
    from kpig_fast.training.trainer import KPIGTrainer
    from kpig_fast.tree.warmup import warmup

__version__ = "0.1.0"

_HOMES = {
    "EncodedPair": "kpig_fast.data.encoding",
    "GainScores": "kpig_fast.scorer",
    "Instance": "kpig_fast.data.schema",
    "KPIGConfig": "kpig_fast.training.config",
    "KPIGTrainer": "kpig_fast.training.trainer",
    "KeyPartScorer": "kpig_fast.scorer",
    "warmup": "kpig_fast.tree.warmup",
}

__all__ = [
    "EncodedPair",
    "GainScores",
    "Instance",
    "KPIGConfig",
    "KPIGTrainer",
    "KeyPartScorer",
    "__version__",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
