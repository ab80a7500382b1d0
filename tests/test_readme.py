"""What README shows is what works: its commands run, its code is the example's, its config is accepted."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kpig_fast.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = [line.partition("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which README's relative paths lead to the checkout, and what is written does not."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.readme
def test_kpig_commands_run_in_their_order(workplace):
    for command in commands():
        if command.startswith("kpig "):
            run([sys.executable, "-m", "kpig_fast.cli", *shlex.split(command)[1:]], workplace)
    assert (workplace / "scores.jsonl").exists()
    assert (workplace / "runs" / "report" / "report.html").exists()


def test_every_command_is_known():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for command in commands():
        program, first = shlex.split(command)[:2]
        assert program == "kpig" or (program == "make" and first in targets), command


@pytest.mark.readme
def test_the_python_code_is_the_example_and_runs(workplace):
    (code,) = blocks("python")
    assert code.strip() in (ROOT / "examples" / "score.py").read_text("utf-8")
    assert "tensor(" in run([sys.executable, "examples/score.py"], workplace)


def test_configs_are_accepted():
    (shown,) = blocks("yaml")
    for text in (shown, *(path.read_text("utf-8") for path in (ROOT / "configs").glob("*.yaml"))):
        RunConfig.model_validate(yaml.safe_load(text))


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://arxiv.org") or (ROOT / target).exists(), target
