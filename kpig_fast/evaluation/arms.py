"""Runs that differ in their seed alone are one arm of a comparison; its name says what sets it apart."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_RUN_ITSELF = ("strategy", "seed", "output_dir")


def arm_names(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """The arm of every run: equal names for settings that are equal but for ``seed`` and ``output_dir``.

    A name is the strategy and the settings that differ between arms of that strategy: ``kpig``, ``kpig -masks``,
    ``kpig lam=0.1``. A setting goes by the last part of its dotted name where that is clear; one that is absent, empty
    or None is not shown.

    Args:
        runs: strategy and resolved config of every run.
    """
    flat = [(strategy, dict(_flat(settings))) for strategy, settings in runs]
    return [
        " ".join([strategy, *_shown(settings, [other for name, other in flat if name == strategy])])
        for strategy, settings in flat
    ]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names, and values as JSON."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value not in (None, [], ()) and prefix + name not in _RUN_ITSELF:
            yield prefix + name, json.dumps(value, default=str, ensure_ascii=False)


def _shown(settings: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> Iterator[str]:
    names = dict.fromkeys(name for other in others for name in other)
    differing = [name for name in names if len({other.get(name) for other in others}) > 1]
    ends = [name.rpartition(".")[2] for name in differing]
    for name, end in zip(differing, ends):
        if name == "ablate" and name in settings:
            yield from (f"-{part}" for part in json.loads(settings[name]))
        elif name in settings:
            yield f"{end if ends.count(end) == 1 else name}={settings[name].strip(chr(34))}"
