"""The YAML file of a run: defaults, overrides, and errors that name the key and the nearest valid one."""

import pytest
import yaml

from kpig_fast.training.run_config import RunConfig, dump_run_config, load_run_config, parse_yaml

MINIMAL = {"model": "m", "output_dir": "o"}


def load(tmp_path, values, overrides=None) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return load_run_config(path, overrides)


def test_defaults_are_the_papers_for_natural_instructions(tmp_path):
    config = load(tmp_path, MINIMAL)
    assert (config.strategy, config.replay.tasks, config.replay.instances) == ("kpig", 10, 10)
    assert config.data.source == "suite"


def test_the_resolved_config_reads_back_equal(tmp_path):
    config = load(tmp_path, MINIMAL | {"training": {"lam": 0.01}, "stream": {"order": ["a", "b"]}})
    assert load(tmp_path, dump_run_config(config)) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-4", 5e-4), ("-.5E+3", -500.0), ("2.e3", 2000.0), ("12", 12), ("e5", "e5"), ("1e-4x", "1e-4x")],
)
def test_numbers_with_an_exponent_need_no_point(text, value):
    assert parse_yaml(text) == value


def test_a_text_that_looks_like_such_a_number_stays_a_text(tmp_path):
    config = RunConfig(model="5e4", output_dir=tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(dump_run_config(config))
    assert load_run_config(path).model == "5e4"


def test_overrides_reach_into_sections_that_are_absent(tmp_path):
    config = load(tmp_path, MINIMAL, {"replay.tasks": 3, "strategy": "sft", "training.lam": 0.5})
    assert (config.replay.tasks, config.strategy, config.training) == (3, "sft", {"lam": 0.5})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stratgy": "kpig"}, "unknown key 'stratgy'.*did you mean 'strategy'"),
        ({"replay": {"task": 3}}, "unknown key 'replay.task'.*did you mean 'tasks'"),
        ({"training": {"learning_rat": 1}}, "unknown training argument 'learning_rat'.*did you mean 'learning_rate'"),
        ({"training": {"seed": 1}}, "training.seed is set by the run"),
        ({"training": {"hub_token": "x"}}, "set HF_TOKEN instead"),
        ({"strategy": "kipg"}, r"strategy: Input should be 'kpig', 'sft', .*\(did you mean 'kpig'\?\), got 'kipg'"),
        ({"replay": {"tasks": -1}}, "replay.tasks: .*greater than or equal to 0, got -1"),
        ({"data": {"source": "folder"}}, "data source 'folder' needs a path"),
        ({"data": {"source": "suite", "path": "x"}}, "data source 'suite' takes no path"),
        (
            {"data": {"source": "natural_instructions", "path": "x", "seen": ["a", "b"], "held_out": ["b"]}},
            "task 'b' is listed as seen and as held out",
        ),
        ({"model": None}, "model: .*got None"),
    ],
)
def test_errors_name_the_key_and_the_fix(tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path, MINIMAL | change)
    assert "c.yaml" in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("a: [", "is no YAML"), ("- 1", "holds no settings")])
def test_broken_files_are_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, text)


def test_an_override_cannot_enter_a_value(tmp_path):
    with pytest.raises(ValueError, match="'model' is no section"):
        load(tmp_path, MINIMAL, {"model.name": 1})
