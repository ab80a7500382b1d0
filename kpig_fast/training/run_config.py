"""``RunConfig``: everything that one continual run needs, as a YAML file."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kpig_fast.data.checks import nearest
from kpig_fast.training.config import KPIGConfig

StrategyName = Literal["kpig", "sft", "replay", "entropy", "inscl", "ewc", "l2", "joint"]
Part = Literal["masks", "divergence", "temperature", "diversity"]

# Set by the run itself; a config that gives them would be overruled.
_OWN_ARGUMENTS = {"output_dir", "seed", "remove_unused_columns", "resume_from_checkpoint"}


class _Loader(yaml.SafeLoader):
    """YAML 1.2 reads ``5e-4`` as a number; the library follows 1.1, to which it is a text."""


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that ``_Loader`` would read as numbers."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
    )


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(_Section):
    """Where tasks and rows come from.

    ``source``: ``suite`` (bundled, generated), ``folder`` (tasks.jsonl + instances.jsonl at ``path``) or
    ``natural_instructions`` (task files at ``path``, key parts or instruction pools from ``side_files``).
    ``n_train``: training rows of a task at most. ``n_test``: leading rows of a task file that are test rows, and
    ``n_validation``: the rows behind them that are validation rows.
    ``seen``, ``held_out``: names of tasks; they go before what the files say, and with ``seen`` no others are used.
    ``strict``: stop at the first bad row.
    """

    source: Literal["suite", "folder", "natural_instructions"] = "suite"
    path: Path | None = None
    side_files: tuple[Path, ...] = ()
    n_train: int | None = Field(default=None, ge=1)
    n_test: int = Field(default=50, ge=1)
    n_validation: int = Field(default=0, ge=0)
    seen: tuple[str, ...] | None = None
    held_out: tuple[str, ...] | None = None
    strict: bool = False

    @model_validator(mode="after")
    def _path_fits(self) -> "DataConfig":
        if (self.path is None) != (self.source == "suite"):
            verb = "takes no" if self.source == "suite" else "needs a"
            raise ValueError(f"data source {self.source!r} {verb} path")
        return self

    @model_validator(mode="after")
    def _roles_differ(self) -> "DataConfig":
        both = sorted(set(self.seen or ()) & set(self.held_out or ()))
        if both:
            raise ValueError(f"task {both[0]!r} is listed as seen and as held out; leave it in one of the lists")
        return self


class StreamConfig(_Section):
    """The time steps: one ``task`` (ST) or one ``category`` (SC) each, in ``order`` or in a seeded shuffle.

    ``steps``: how many steps at most.
    """

    by: Literal["task", "category"] = "task"
    order: tuple[str, ...] | None = None
    steps: int | None = Field(default=None, ge=1)


class ReplayConfig(_Section):
    """Dynamic replay: ``tasks`` (M) earlier tasks with the lowest gain, ``instances`` (N) of each."""

    tasks: int = Field(default=10, ge=0)
    instances: int = Field(default=10, ge=0)


class PenaltyConfig(_Section):
    """The quadratic penalty of ``l2`` and ``ewc``: its ``strength``.

    ``instances``: how many instances of a step the Fisher information of ``ewc`` is estimated from.
    """

    strength: float = Field(default=1.0, ge=0)
    instances: int = Field(default=64, ge=1)


class InsCLConfig(_Section):
    """``embedder``: folder or hub name of a sentence embedder for ``inscl``; default: the model's own hidden states."""

    embedder: str | None = None


class LoRAConfig(_Section):
    """Train a low-rank adapter instead of the weights; its rank, scale and places, as in ``peft.LoraConfig``.

    ``target_modules``: names of linear layers; default: all but the head.
    """

    r: int = Field(default=16, ge=1)
    lora_alpha: float = Field(default=32, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] | str = "all-linear"


class EvaluationConfig(_Section):
    """What is asked after every step: ``limit`` rows a task of ``split``, of the tasks learnt so far and the held-out.

    ``gain_rows``: rows a task whose information gain is measured. ``demonstrations``: worked examples before a held-out
    question. ``half_listening``: rows a task that are asked under its changed wording, where it has one. ``untrained``:
    also evaluate the model before the first step.
    """

    split: Literal["validation", "test"] = "test"
    limit: int | None = Field(default=50, ge=1)
    gain_rows: int = Field(default=10, ge=0)
    half_listening: int = Field(default=20, ge=0)
    max_new_tokens: int = Field(default=32, ge=1)
    demonstrations: int = Field(default=2, ge=0)
    untrained: bool = True


class RunConfig(_Section):
    """One continual run.

    ``model``: folder or hub name of a causal language model, or ``bundled`` for the package's own small one.
    ``ablate``: parts that kpig goes without: ``masks`` (replay by entropy, divergence on the complete instance),
    ``divergence``, ``temperature`` (1 for every instance), ``diversity`` (the first wording of a task only).
    ``lora``: train an adapter; None: all weights.
    ``training``: arguments of ``KPIGConfig``, which has those of ``transformers.TrainingArguments``.
    """

    model: str
    output_dir: Path
    strategy: StrategyName = "kpig"
    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    data: DataConfig = DataConfig()
    stream: StreamConfig = StreamConfig()
    ablate: tuple[Part, ...] = ()
    replay: ReplayConfig = ReplayConfig()
    penalty: PenaltyConfig = PenaltyConfig()
    inscl: InsCLConfig = InsCLConfig()
    lora: LoRAConfig | None = None
    training: dict[str, Any] = {}
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _kpig_is_ablated(self) -> "RunConfig":
        if self.ablate and self.strategy != "kpig":
            raise ValueError(f"ablate takes parts away from kpig, but the strategy is {self.strategy!r}; remove it")
        return self

    @model_validator(mode="after")
    def _training_is_known(self) -> "RunConfig":
        known = {f.name for f in fields(KPIGConfig) if f.init} - _OWN_ARGUMENTS
        for name in self.training:
            if name in _OWN_ARGUMENTS:
                raise ValueError(f"training.{name} is set by the run; remove it (seed and output_dir stand at the top)")
            if name == "hub_token":
                raise ValueError("training.hub_token would be written into the run's folder; set HF_TOKEN instead")
            if name not in known:
                raise ValueError(f"unknown training argument {name!r}{nearest(name, known)}")
        return self


def load_run_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a YAML file; paths in it are relative to the working directory.

    Args:
        path: the file.
        overrides: values that replace the file's, by dotted name such as ``replay.tasks``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no YAML, an unknown key (the nearest valid one is named) or a value out of its range.
    """
    try:
        values = parse_yaml(Path(path).read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no settings; it needs at least model and output_dir")
    for name, value in (overrides or {}).items():
        _set(values, name, value)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path}: {_describe(error)}") from error


def parse_yaml(text: str) -> Any:
    """What a YAML text says. Raises ``yaml.YAMLError`` where it is none."""
    return yaml.load(text, _Loader)


def dump_run_config(config: RunConfig) -> str:
    """The resolved config as YAML, every default written out; ``load_run_config`` reads it."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"{name!r} cannot be set: {section!r} is no section")
    values[last] = value


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(str(first['loc'][-1]), _keys_beside(first['loc']))}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "literal_error":
        message += nearest(str(first["input"]), re.findall(r"'([^']*)'", first["msg"]))
    return f"{place}: {message}, got {first['input']!r}" if place else message


def _keys_beside(loc: tuple[int | str, ...]) -> Iterable[str]:
    section: type[BaseModel] = RunConfig
    for part in loc[:-1]:
        annotation = RunConfig.model_fields[str(part)].annotation
        section = next(kind for kind in (*get_args(annotation), annotation) if isinstance(kind, type))
    return section.model_fields
