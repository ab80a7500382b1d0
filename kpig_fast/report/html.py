"""Reports in files: ``report.html``, which needs no other file, and the plots, tables and figures beside it."""

from collections.abc import Mapping
from pathlib import Path

from kpig_fast.data.files import write_bytes, write_lines
from kpig_fast.evaluation.runs import read_run, steps_csv, summarise
from kpig_fast.report.page import make_section, render_page
from kpig_fast.report.plots import plot_curves, plot_tasks
from kpig_fast.report.tables import comparison_table

REPORT_FILE, PLOTS_FOLDER, SUMMARY_FILE, STEPS_FILE = "report.html", "plots", "summary.json", "steps.csv"


def write_report(runs: Mapping[str, Path], folder: Path) -> Path:
    """Write ``report.html`` and its plots, as PNG images in ``plots/``, into ``folder``; returns the page's path.

    Args:
        runs: folders of the runs, by the name that the page gives them.
        folder: where to write; made where it is not there.

    Raises:
        FileNotFoundError: a run has no complete step.
    """
    histories = {name: read_run(run) for name, run in runs.items()}
    curves = plot_curves(histories)
    heat_maps = {name: plot_tasks(name, history) for name, history in histories.items()}
    for plot in (*curves, *heat_maps.values()):
        write_bytes(folder / PLOTS_FOLDER / f"{plot.name}.png", [plot.png])
    sections = [make_section(name, run, histories[name], heat_maps[name]) for name, run in runs.items()]
    write_lines(folder / REPORT_FILE, [render_page(histories, sections, curves)])
    return folder / REPORT_FILE


def write_run_outputs(run: Path) -> Path:
    """Write ``summary.json``, ``steps.csv`` and the report of one run into its own folder; returns the page's path.

    Raises FileNotFoundError where the run has no complete step.
    """
    history = read_run(run)
    write_lines(run / SUMMARY_FILE, [summarise(history).to_json()])
    write_lines(run / STEPS_FILE, [steps_csv(history).rstrip("\n")])
    return write_report({run.resolve().name: run}, run)


def write_comparison(runs: Mapping[str, Path], folder: Path) -> Path:
    """Write ``comparison.md``, ``comparison.csv`` and the report of several runs; returns the page's path.

    Takes and raises what ``write_report`` does.
    """
    histories = {name: read_run(run) for name, run in runs.items()}
    write_lines(folder / "comparison.md", [comparison_table(histories, "markdown")])
    write_lines(folder / "comparison.csv", [comparison_table(histories, "csv")])
    return write_report(runs, folder)
