"""Reports in files: the page as a browser reads it, against figures by hand, and what lies beside it."""

import json
import re
import sys
from base64 import b64decode
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import pytest
from sample_runs import (
    BEFORE,
    CURVES,
    HELD_OUT,
    HISTORY,
    SEEN,
    STRATEGIES,
    sample_history,
    step_metrics,
    table_rows,
    task_result,
    write_run,
)

from kpig_fast.evaluation.runs import read_run, steps_csv, summarise
from kpig_fast.report.html import write_comparison, write_report, write_run_outputs
from kpig_fast.report.page import make_section
from kpig_fast.report.plots import Plot
from kpig_fast.report.tables import comparison_table


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of three runs over the same tasks."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: write_run(folder / name, sample_history(name)) for name in STRATEGIES}


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory) -> Path:
    """The folder of a comparison of the three runs."""
    return write_comparison(runs, tmp_path_factory.mktemp("compared")).parent


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """The folder of a run with figures by hand, with its outputs."""
    run = write_run(tmp_path_factory.mktemp("runs") / "mine", HISTORY)
    write_run_outputs(run)
    return run


class Page(HTMLParser):
    """What a browser sees of a page: tags, attributes, the cells of every table, texts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._in_cell = tag in ("th", "td")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif self._in_cell:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        self.text += data
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [value for name, value in self.attributes if name == attribute]


def test_page_needs_nothing_but_itself(compared):
    page = Page(compared / "report.html")
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    # Images in base64 have no colon.
    assert "://" not in page.source
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert not page.values("href")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    assert set(page.values("content")) == {"width=device-width, initial-scale=1"}
    assert "prefers-color-scheme: dark" in page.source


def test_images_of_the_page_are_the_plots_beside_it(compared):
    page = Page(compared / "report.html")
    images = [b64decode(source.split(",")[1]) for source in page.values("src")]
    names = [*CURVES, *(f"tasks-{name}" for name in STRATEGIES)]
    assert images == [(compared / "plots" / f"{name}.png").read_bytes() for name in names]
    assert len(page.values("alt")) == len(names)
    assert all(page.values("alt"))


def test_page_holds_the_comparison_as_the_table_has_it(runs, compared):
    histories = {name: read_run(run) for name, run in runs.items()}
    page = Page(compared / "report.html")
    assert page.tables[0] == table_rows(comparison_table(histories))
    assert (compared / "comparison.md").read_text("utf-8") == comparison_table(histories, "markdown") + "\n"
    assert (compared / "comparison.csv").read_text("utf-8") == comparison_table(histories, "csv") + "\n"


def test_page_has_two_tables_a_run(compared):
    assert len(Page(compared / "report.html").tables) == 1 + 2 * len(STRATEGIES)


def test_every_task_is_named_and_escaped(compared):
    page = Page(compared / "report.html")
    assert [row[0] for row in page.tables[1][1:]] == [*SEEN, *HELD_OUT]
    assert "speaker &lt;User/Agent&gt;" in page.source
    assert "<User/Agent>" not in page.source
    assert "join &amp; trim" in page.source


def test_hostile_names_stay_text(tmp_path):
    evil = "</title><script>alert('x')</script>"
    run = write_run(tmp_path / "run", [step_metrics(0, [task_result(evil, 1.0)], tasks=[evil])])
    page = Page(write_report({f'"{evil}"': run}, tmp_path / "out"))
    assert "script" not in page.tags
    assert page.tables[1][1][0] == evil


def test_tasks_of_the_page_by_hand(mine):
    assert Page(mine / "report.html").tables[1] == [
        ["task", "role", "P", "V", "WFR", "OOS", "WR", "gain", "forgetting", "learnt at step", "answers", "metric"],
        ["a", "seen", "50.0", "20.0", "20.0", "–", "–", "0.250", "30.0", "1", "10", "acc"],
        ["b", "seen", "90.0", "–", "–", "–", "–", "0.750", "–", "2", "10", "acc"],
        ["h", "held-out", "40.0", "10.0", "–", "0.0", "20.0", "0.375", "–", "–", "10", "acc"],
    ]


def test_replay_choices_of_the_page_by_hand(mine):
    assert Page(mine / "report.html").tables[2] == [
        ["step", "learnt", "replayed (mean gain before the step)", "instances", "loss", "seconds"],
        ["1", "a", "–", "–", "2.000", "12.0"],
        ["2", "b", "a (0.125)", "–", "1.000", "30.5"],
    ]


def test_replay_choices_without_a_plan_are_names(tmp_path):
    run = write_run(tmp_path, HISTORY)
    (run / "step-001" / "plan.json").unlink()
    assert make_section("mine", run, HISTORY, Plot("", "", b"")).steps[2][2] == "a"


def test_config_and_environment_are_shown_as_they_are(runs, compared):
    page = Page(compared / "report.html")
    for run in runs.values():
        assert (run / "config.yaml").read_text("utf-8") in page.text
        assert (run / "environment.json").read_text("utf-8") in page.text
    assert page.tags.count("details") == 2 * len(runs)


def test_a_run_without_these_files_has_no_such_part(tmp_path):
    run = write_run(tmp_path / "run", HISTORY)
    (run / "config.yaml").unlink()
    (run / "environment.json").unlink()
    assert "details" not in Page(write_report({"run": run}, tmp_path / "out")).tags


def test_tasks_that_were_not_scored_are_listed(compared):
    page = Page(compared / "report.html")
    assert page.text.count(f"needs a judge, and not part of P: {HELD_OUT[1]}") == len(STRATEGIES)
    assert page.tables[1][-1][:3] == [HELD_OUT[1], "held-out", "–"]


def test_runs_over_different_tasks_are_warned_of(tmp_path, compared):
    runs = {"whole": write_run(tmp_path / "whole", HISTORY), "half": write_run(tmp_path / "half", HISTORY[:2])}
    warning = "not evaluated on the same tasks"
    assert warning in Page(write_report(runs, tmp_path)).text
    assert warning not in Page(compared / "report.html").text


@pytest.mark.parametrize(
    ("history", "n_tables", "n_images"),
    [
        (sample_history("kpig", held_out=()), 3, 4),
        ([BEFORE], 2, 7),
        ([step_metrics(0, [task_result("a", None, metric="gpt")], tasks=["a"])], 3, 1),
    ],
    ids=["no held-out", "untrained only", "one step, not scored"],
)
def test_page_of_a_small_run(tmp_path, history, n_tables, n_images):
    page = Page(write_report({"run": write_run(tmp_path, history)}, tmp_path))
    assert (len(page.tables), page.tags.count("img")) == (n_tables, n_images)
    assert [row[0] for row in page.tables[1][1:]] == history[-1].evaluated


def test_outputs_of_a_run_lie_in_its_folder(mine, tmp_path):
    bare = write_run(tmp_path, HISTORY)
    written = {path.relative_to(mine) for path in mine.rglob("*")} - {
        path.relative_to(bare) for path in bare.rglob("*")
    }
    plots = {f"plots/{name}.png" for name in [*CURVES, "tasks-mine"]}
    assert {str(path) for path in written} == {"summary.json", "steps.csv", "report.html", "plots"} | plots
    assert json.loads((mine / "summary.json").read_text()) == json.loads(summarise(HISTORY).to_json())
    assert (mine / "steps.csv").read_text("utf-8") == steps_csv(HISTORY)


def test_outputs_follow_the_run_and_depend_on_nothing_else(mine, tmp_path):
    run = write_run(tmp_path / "mine", HISTORY[:2])
    half = write_run_outputs(run).read_bytes()
    write_run(run, HISTORY)
    whole = write_run_outputs(run).read_bytes()
    assert whole == (mine / "report.html").read_bytes() != half
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no complete step in {re.escape(str(tmp_path))}"):
        write_report({"nothing": tmp_path}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("library", "module"), [("matplotlib", "plots"), ("jinja2", "page")])
def test_a_missing_library_is_one_sentence(monkeypatch, library, module):
    monkeypatch.delitem(sys.modules, f"kpig_fast.report.{module}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"need {library}; install it with: pip install 'kpig-fast\[train\]'"
    ):
        import_module(f"kpig_fast.report.{module}")
