"""The model card: ``README.md`` in the folder of a kept model, with what it was trained on and whom to cite.

It names no path and no user: a model that was loaded from a folder is just a local model.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import yaml
from huggingface_hub.utils import HFValidationError, validate_repo_id

from kpig_fast import __version__
from kpig_fast.data.files import write_lines
from kpig_fast.data.schema import Role
from kpig_fast.evaluation.runs import StepMetrics
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.planning import chosen_strategy
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.strategies.chance import nothing

CARD_FILE = "README.md"

_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```"""

_CITATION = f"""\
```bibtex
@inproceedings{{he-etal-2025-dont,
  title = {{Don't Half-listen: Capturing Key-part Information in Continual Instruction Tuning}},
  author = {{He, Yongquan and Zhang, Wenyuan and Huang, Xuancheng and Zhang, Peng and Meng, Lingxun and Zhou, Xiang and
            Zeng, Ke and Cai, Xunliang}},
  booktitle = {{Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics
               (Volume 1: Long Papers)}},
  year = {{2025}},
  pages = {{23649--23668}},
  url = {{https://aclanthology.org/2025.acl-long.1153}},
  eprint = {{2403.10056}},
  archivePrefix = {{arXiv}}
}}

@software{{kpig_fast,
  title = {{kpig\\_fast: continual instruction tuning with Key-Part Information Gain on a token tree}},
  author = {{{{The kpig\\_fast authors}}}},
  version = {{{__version__}}},
  license = {{Apache-2.0}}
}}
```"""


def write_model_card(
    folder: Path,
    config: RunConfig,
    args: KPIGConfig,
    learnt: Sequence[Sequence[str]],
    metrics: StepMetrics | None = None,
) -> None:
    """Write ``README.md`` into ``folder``, in place of one that lies there; the arguments are :func:`model_card`'s."""
    write_lines(folder / CARD_FILE, [model_card(config, args, learnt, metrics)])


def model_card(
    config: RunConfig, args: KPIGConfig, learnt: Sequence[Sequence[str]], metrics: StepMetrics | None = None
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        config: the run.
        args: the Trainer's arguments of the step, with the weight of the divergence that the strategy leaves.
        learnt: task names of every step so far, this one last.
        metrics: what the step measured; None leaves the scores out.
    """
    sections = [
        f"---\n{yaml.safe_dump(_front_matter(config), sort_keys=False)}---",
        f"# Continual instruction tuning: the model after step {len(learnt)}",
        f"Trained with kpig_fast {__version__}, strategy `{config.strategy}`, from {_origin(config.model)}.",
        f"## Training\n\n{_table('setting', 'value', rows=_settings(config, args))}",
        "Tasks of the steps:\n\n" + "\n".join(f"{n}. {', '.join(tasks)}" for n, tasks in enumerate(learnt, start=1)),
        *([_scores(metrics)] if metrics else []),
        f"## How to load it\n\n{_LOADING}\n\nPrompts were written with the `{args.template}` template of kpig_fast.",
        f"## Citation\n\n{_CITATION}",
    ]
    return "\n\n".join(sections)


def _front_matter(config: RunConfig) -> dict[str, object]:
    base = {"base_model": config.model} if _on_hub(config.model) else {}
    tags = ["continual-learning", "instruction-tuning", "kpig"]
    library = "transformers" if config.lora is None else "peft"
    return {"library_name": library, "pipeline_tag": "text-generation", **base, "tags": tags}


def _on_hub(model: str) -> bool:
    """Whether ``model`` names one on the hub: neither the bundled one nor a folder."""
    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return model != "bundled" and not Path(model).exists()


def _origin(model: str) -> str:
    if model == "bundled":
        return "the small model that kpig_fast bundles"
    return f"`{model}`" if _on_hub(model) else "a local model"


def _settings(config: RunConfig, args: KPIGConfig) -> Iterator[tuple[str, object]]:
    strategy = chosen_strategy(config)
    if config.ablate:
        yield "left out", ", ".join(config.ablate)
    yield "λ, weight of the divergence", args.lam
    yield "α, decay of the information gain", args.alpha
    if strategy.plan is not nothing:
        yield "M, replayed tasks of a step at most", config.replay.tasks
        yield "N, replayed instances of each", config.replay.instances
    if strategy.penalty:
        yield "strength of the penalty", config.penalty.strength
    if config.lora:
        yield "rank of the LoRA adapter, which is all that was trained", config.lora.r
    yield "instances of an optimizer batch", args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    yield "learning rate", args.learning_rate
    yield "epochs of a step", args.num_train_epochs
    yield "seed", config.seed


def _scores(metrics: StepMetrics) -> str:
    rows = []
    for role in get_args(Role):
        scores = metrics.scores(role)
        rows.append((role.replace("_", " "), _figure(scores.p, 1), _figure(scores.v, 1), _figure(scores.gain, 3)))
    explained = (
        "P: mean over tasks of the task's metric, 0–100. V: mean share of answers that break a rule of the "
        "instruction, in percent. Gain: mean information gain of the key parts."
    )
    return (
        f"## Scores after step {metrics.step + 1}\n\n{_table('tasks', 'P ↑', 'V ↓', 'gain', rows=rows)}\n\n{explained}"
    )


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _table(*head: str, rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
