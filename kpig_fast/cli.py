"""The command ``kpig``. Every subcommand imports what it needs when it runs, so that ``kpig --help`` is quick.

Exit codes: 0 done; 1 the run failed; 2 the command, the config or the data is wrong; 130 stopped from the keyboard.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpig_fast import __version__
from kpig_fast.failures import explain

if TYPE_CHECKING:
    from kpig_fast.data.schema import Instance
    from kpig_fast.data.validation import ValidationReport
    from kpig_fast.scorer import GainScores, KeyPartScorer
    from kpig_fast.training.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kpig`` with the given arguments (default: those of the process); returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (Exception, KeyboardInterrupt) as error:
        explained = explain(error, arguments.command, getattr(arguments, "out", None))
        if arguments.debug or explained is None:
            raise
        code, text = explained
        print(f"kpig {arguments.command}: {text}", file=sys.stderr)
        return code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kpig", description="Continual instruction tuning with Key-Part Information Gain."
    )
    parser.add_argument("--version", action="version", version=f"kpig {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, help_text, add_arguments in (
        ("score", _score, "information gain of the key parts of every instance", _add_score),
        ("train", _train, "a continual run: gain, replay, objective, evaluation, report", _add_train),
        ("eval", _eval, "score the answers of runs again and compare the runs, with intervals and tests", _add_eval),
        ("ask", _ask, "ask a served or a local model what a run asks, to compare it", _add_ask),
        ("harness", _harness, "write the questions of a run as lm-evaluation-harness tasks", _add_harness),
        ("report", _report, "compare runs: table, plots and one HTML page", _add_report),
        ("env", _env, "versions and hardware, as JSON", lambda _: None),
    ):
        command = commands.add_parser(
            name, help=help_text, description=help_text, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
    return parser


def _add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data", type=Path, help="JSON Lines of instances, or a folder: tasks.jsonl + instances.jsonl, or task files"
    )
    parser.add_argument("--model", required=True, help="folder or hub name of a causal language model, or 'bundled'")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to write, one row an instance")
    parser.add_argument("--alpha", type=float, default=0.3, help="decay of the gain")
    parser.add_argument("--tail-tol", type=float, default=1e-7, help="accepted error of the gain; 0 scores all tokens")
    parser.add_argument("--max-tokens", type=int, default=8192, help="tokens of one tree")
    parser.add_argument("--template", choices=("plain", "chat"), default="plain", help="prompt template")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cuda or cpu", help="torch device; a GPU where there is one by default")
    parser.add_argument("--strict", action="store_true", help="stop at bad data instead of dropping it with a report")
    parser.add_argument(
        "--side-file", type=Path, action="append", default=[], help="task files: key parts or pools (repeatable)"
    )
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train", help="folders: which rows")
    parser.add_argument("--limit", type=int, default=None, help="folders: rows of a task at most")


def _score(arguments: argparse.Namespace) -> None:
    from kpig_fast.data.files import write_lines
    from kpig_fast.data.lengths import check_lengths

    # Only then is torch imported: bad data is named at once.
    instances, report = _instances_to_score(arguments)
    scorer = _load_scorer(arguments)
    from kpig_fast.tree.model import position_limit

    limit = position_limit(scorer.model)
    if limit is not None:
        instances = check_lengths(instances, scorer.encoder, limit, report, strict=arguments.strict)
    print(report)
    scores = scorer.score(instances, progress=True)
    write_lines(arguments.out, (json.dumps(_score_row(i, scores, n)) for n, i in enumerate(instances)))
    print(_score_summary(instances, scores))
    print(f"wrote {arguments.out}")


def _instances_to_score(arguments: argparse.Namespace) -> "tuple[list[Instance], ValidationReport]":
    from kpig_fast.data.collection import load_collection
    from kpig_fast.data.instances import read_instances
    from kpig_fast.data.natural_instructions import load_natural_instructions
    from kpig_fast.data.schema import make_instance

    if not arguments.data.is_dir():
        return read_instances(arguments.data, strict=arguments.strict)
    if any((arguments.data / name).exists() for name in ("tasks.jsonl", "tasks.jsonl.gz")):
        collection, report = load_collection(arguments.data, strict=arguments.strict)
    else:
        collection, report = load_natural_instructions(
            arguments.data, side_file=arguments.side_file, strict=arguments.strict
        )
    instances = [
        make_instance(task, row)
        for name, task in collection.tasks.items()
        for row in collection.of_task(name, arguments.split)[: arguments.limit]
    ]
    return instances, report


def _load_scorer(arguments: argparse.Namespace) -> "KeyPartScorer":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from kpig_fast.data.base_model import resolve_model
    from kpig_fast.scorer import KeyPartScorer

    disable_progress_bar()
    device = arguments.device
    if device == "cuda or cpu":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    source = resolve_model(arguments.model)
    dtype = "float32" if arguments.dtype == "auto" and device == "cpu" else arguments.dtype
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.to(device)  # type: ignore[arg-type]
    return KeyPartScorer(
        model,
        AutoTokenizer.from_pretrained(source),
        alpha=arguments.alpha,
        tail_tol=arguments.tail_tol,
        max_tokens=arguments.max_tokens,
        template=arguments.template,
    )


def _score_row(instance: "Instance", scores: "GainScores", n: int) -> dict[str, Any]:
    return {
        "id": instance.id,
        "task": instance.task,
        "gain": float(scores.gain[n]),
        "complete_log_probs": scores.complete[n].tolist(),
        "masked_log_probs": scores.masked[n].tolist(),
    }


def _score_summary(instances: "list[Instance]", scores: "GainScores") -> str:
    by_task: dict[str, list[float]] = {}
    for instance, gain in zip(instances, scores.gain.tolist()):
        by_task.setdefault(instance.task or "(no task)", []).append(gain)
    means = sorted((sum(gains) / len(gains), task, len(gains)) for task, gains in by_task.items())
    stats = scores.stats
    sharing = f" ({stats.tokens_naive / stats.tokens:.2f}x fewer than apart)" if stats.tokens else ""
    return "\n".join(
        [
            f"{'mean gain':>10}  {'n':>6}  task (lowest gain first)",
            *(f"{mean:>10.4f}  {n:>6}  {task}" for mean, task, n in means),
            f"{len(instances)} instances, {stats.tokens} tokens laid out{sharing}, {stats.seconds:.1f} s",
        ]
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file, see configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="override a setting, such as replay.tasks=3"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="train nothing: print what would be trained, its memory and its time"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars, no lines")


def _train(arguments: argparse.Namespace) -> None:
    from kpig_fast.training.run_config import load_run_config, parse_yaml

    overrides = {}
    for setting in arguments.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting!r} has no '='; write NAME=VALUE, such as replay.tasks=3")
        overrides[name] = parse_yaml(value)
    config = load_run_config(arguments.config, overrides)
    arguments.out = config.output_dir
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    (_print_dry_run if arguments.dry_run else _run_stream)(config, progress=not arguments.quiet)
    from kpig_fast.processes import leave

    leave()


def _run_stream(config: "RunConfig", *, progress: bool) -> None:
    from kpig_fast.processes import rank
    from kpig_fast.report.html import REPORT_FILE, write_run_outputs
    from kpig_fast.training.stream import Stream

    Stream.open(config, after_step=write_run_outputs, progress=progress).run()
    if rank() == 0:
        _print_comparison([config.output_dir])
        print(f"wrote {config.output_dir / REPORT_FILE}")


def _print_dry_run(config: "RunConfig", *, progress: bool) -> None:
    from kpig_fast.processes import rank
    from kpig_fast.training.dry_run import dry_run

    done = dry_run(config, progress=progress)
    if rank() == 0:
        print(done.to_text())


def _add_ask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of a run: its data, steps, evaluation and template")
    parser.add_argument("--model", required=True, help="its name on the server; hf: folder, hub name or 'bundled'")
    parser.add_argument("--engine", choices=("hf", "openai"), default="hf", help="load the model, or ask a server")
    parser.add_argument("--base-url", help="openai: address of the server; OPENAI_BASE_URL by default")
    parser.add_argument("--out", type=Path, required=True, help="run folder to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _ask(arguments: argparse.Namespace) -> None:
    from kpig_fast.endpoint import Endpoint
    from kpig_fast.training.run_config import load_run_config

    if arguments.base_url and arguments.engine == "hf":
        raise ValueError(f"--base-url {arguments.base_url} is of no use to --engine hf; add --engine openai")
    config = load_run_config(arguments.config, {"model": arguments.model, "output_dir": str(arguments.out)})
    endpoint = Endpoint(arguments.model, arguments.base_url) if arguments.engine == "openai" else None
    from transformers.utils.logging import disable_progress_bar

    from kpig_fast.training.asking import ask_model

    disable_progress_bar()
    print(ask_model(config, endpoint, progress=not arguments.quiet).evaluation.format_table())
    print(f"wrote {arguments.out}")


def _add_harness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file of a run: its data and evaluation")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, for lm_eval --include_path")
    parser.add_argument("--name", default="kpig_suite", help="name of the group of all tasks")


def _harness(arguments: argparse.Namespace) -> None:
    from kpig_fast.evaluation.harness import write_harness_tasks
    from kpig_fast.training.data import load_data
    from kpig_fast.training.run_config import load_run_config

    config = load_run_config(arguments.config)
    settings = config.evaluation
    collection, report = load_data(config.data, progress=True)
    print(report)
    written = write_harness_tasks(
        collection,
        arguments.out,
        name=arguments.name,
        split=settings.split,
        limit=settings.limit,
        demonstrations=settings.demonstrations,
        max_new_tokens=settings.max_new_tokens,
    )
    print(
        f"wrote {len(written)} tasks; run: lm_eval --include_path {arguments.out} --tasks {arguments.name} --model hf"
    )


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of kpig train or kpig ask")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for CSV, JSON and Markdown")
    parser.add_argument("--baseline", help="arm that the others are compared with; that of the first run by default")
    parser.add_argument("--judge", metavar="MODEL", help="served model that judges the tasks with metric gpt")
    parser.add_argument("--judge-url", help="address of its server; OPENAI_BASE_URL by default")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _eval(arguments: argparse.Namespace) -> None:
    from kpig_fast.data.files import write_lines
    from kpig_fast.endpoint import Endpoint
    from kpig_fast.evaluation.comparison import compare_runs
    from kpig_fast.evaluation.comparison_tables import all_tables, summary_tables
    from kpig_fast.evaluation.judge import EndpointJudge
    from kpig_fast.training.stored_runs import open_runs

    if arguments.judge_url and not arguments.judge:
        raise ValueError(f"--judge-url {arguments.judge_url} has no judge; add --judge MODEL")
    progress = not arguments.quiet
    judge = None
    if arguments.judge:
        served = Endpoint(arguments.judge, arguments.judge_url, cache=arguments.out / "judge")
        judge = EndpointJudge(served, progress)
    runs = open_runs(_by_name(arguments.runs), progress=progress)
    comparison = compare_runs(runs, baseline=arguments.baseline, judge=judge, progress=progress)
    comparison.write(arguments.out)
    write_lines(arguments.out / "comparison.md", [all_tables(comparison)])
    print(summary_tables(comparison))
    print(f"\nwrote {arguments.out}")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of kpig train")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder for report.html and the plots")


def _report(arguments: argparse.Namespace) -> None:
    from kpig_fast.report.html import write_comparison

    page = write_comparison(_by_name(arguments.runs), arguments.out)
    _print_comparison(arguments.runs)
    print(f"wrote {page}")


def _by_name(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs by the shortest ends of their paths that tell them apart. Raises ValueError for a run given twice."""
    paths = [run.resolve() for run in runs]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, runs))
    raise ValueError(f"a run is given twice among {', '.join(map(str, runs))}; name each once")


def _print_comparison(runs: Sequence[Path]) -> None:
    from kpig_fast.evaluation.runs import read_run
    from kpig_fast.report.tables import comparison_table

    print(comparison_table({name: read_run(run) for name, run in _by_name(runs).items()}))


def _env(_: argparse.Namespace) -> None:
    from kpig_fast.environment import environment

    print(json.dumps(environment(), indent=2))


if __name__ == "__main__":
    sys.exit(main())
