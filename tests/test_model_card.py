"""The model card: valid metadata, what was trained, whom to cite, and nothing that names a machine or a person."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from small_run import config_values
from transformers import AutoModelForCausalLM, AutoTokenizer

import kpig_fast
from kpig_fast.evaluation.evaluate import EvaluationResult
from kpig_fast.evaluation.runs import StepMetrics
from kpig_fast.evaluation.tables import TaskResult
from kpig_fast.training.model_card import model_card, write_model_card
from kpig_fast.training.planning import training_arguments
from kpig_fast.training.run_config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
LEARNT = [["sort"], ["count", "greet"]]


def config(run: Path, **changes) -> RunConfig:
    return RunConfig.model_validate(
        {"model": "some-lab/some-model", "output_dir": run, "training": {"use_cpu": True}} | changes
    )


def card(run: Path, metrics: StepMetrics | None = None, **changes) -> str:
    chosen = config(run, **changes)
    return model_card(chosen, training_arguments(chosen, run, 1), LEARNT, metrics)


def table(text: str) -> dict[str, str]:
    """The rows of all tables by their first cell; the rest joined."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first: " ".join(rest) for first, *rest in rows}


def measured() -> StepMetrics:
    tasks = [
        TaskResult("sort", "seen", "a", "acc", 40.0, {"WFR": 10.0}, 5),
        TaskResult("count", "seen", "a", "acc", 60.5, {"WFR": 20.0, "OOS": 40.0}, 5),
        TaskResult("last", "held_out", "a", "acc", 12.34, {}, 5),
    ]
    gains = {"sort": 0.1, "count": 0.2, "last": -0.05}
    return StepMetrics(1, "kpig", ("count", "greet"), (), EvaluationResult(tasks), gains)


def test_metadata_is_what_the_hub_reads(tmp_path):
    data = ModelCard(card(tmp_path)).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "some-lab/some-model",
        "tags": ["continual-learning", "instruction-tuning", "kpig"],
    }


@pytest.mark.parametrize("name", ["some-lab/some.model-7B_v2", "gpt2", "yes", "123", "null"])
def test_a_hub_name_stays_a_text(tmp_path, name):
    assert ModelCard(card(tmp_path, model=name)).data.to_dict()["base_model"] == name


@pytest.mark.parametrize("name", ["/home/ann/llama", "./llama", "../models/llama", "~/llama", "a/b/c", "C:\\llama"])
def test_a_path_is_not_told(tmp_path, name):
    text = card(tmp_path, model=name)
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "from a local model." in text
    assert name not in text


def test_a_folder_that_looks_like_a_hub_name_is_not_told(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert "models/mine" in card(tmp_path, model="models/mine")
    monkeypatch.chdir(tmp_path)
    assert "models/mine" not in card(tmp_path, model="models/mine")


def test_the_bundled_model_is_named_and_is_none_of_the_hub(tmp_path):
    text = card(tmp_path, model="bundled")
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert "the small model that kpig_fast bundles" in text


def test_nothing_names_the_machine_the_user_or_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    data = {"source": "folder", "path": str(tmp_path / "private")}
    text = card(tmp_path / "run", data=data, model=str(tmp_path / "model"))
    for secret in (str(tmp_path), "private", "hf_secret", f"{Path.home()}/"):
        assert secret not in text


def test_settings_are_those_of_the_run(tmp_path):
    training = {"use_cpu": True, "lam": 0.07, "alpha": 0.6, "learning_rate": 3e-4, "num_train_epochs": 2}
    training |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 5, "template": "chat"}
    text = card(tmp_path, training=training, replay={"tasks": 3, "instances": 100}, seed=11, ablate=["temperature"])
    rows = table(text)
    assert rows["λ, weight of the divergence"] == "0.07"
    assert rows["α, decay of the information gain"] == "0.6"
    assert rows["M, replayed tasks of a step at most"] == "3"
    assert rows["N, replayed instances of each"] == "100"
    assert rows["instances of an optimizer batch"] == "20"
    assert float(rows["learning rate"]) == 3e-4
    assert float(rows["epochs of a step"]) == 2
    assert rows["seed"] == "11"
    assert rows["left out"] == "temperature"
    assert "`chat` template" in text
    assert "1. sort\n2. count, greet\n" in text


@pytest.mark.parametrize(
    ("strategy", "replays", "penalty"),
    [("kpig", True, False), ("entropy", True, False), ("sft", False, False), ("joint", False, False), ("l2", 0, 1)],
)
def test_only_what_the_strategy_does_is_told(tmp_path, strategy, replays, penalty):
    rows = table(card(tmp_path, strategy=strategy))
    assert ("M, replayed tasks of a step at most" in rows) == replays
    assert ("strength of the penalty" in rows) == penalty
    assert (float(rows["λ, weight of the divergence"]) > 0) == (strategy == "kpig")


def test_scores_stand_there_when_they_are_known(tmp_path):
    text = card(tmp_path, measured())
    assert "## Scores after step 2" in text
    # P (40 + 60.5) / 2; V (10 + (20 + 40) / 2) / 2; gain (0.1 + 0.2) / 2.
    assert table(text)["seen"] == "50.2 20.0 0.150"
    assert table(text)["held out"] == "12.3 – -0.050"
    assert "Scores" not in card(tmp_path)


def test_the_citations_are_those_of_the_citation_file(tmp_path):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    (paper,) = cited["references"]
    text = " ".join(card(tmp_path).replace("\\_", "_").split())
    assert paper["title"] in text
    assert " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"]) in text
    assert f"{paper['start']}--{paper['end']}" in text
    assert paper["url"] in text
    assert "2403.10056" in text
    assert paper["collection-title"] in text
    assert cited["title"] in text
    assert cited["license"] in text
    assert f"version = {{{kpig_fast.__version__}}}" in text
    assert text.count("{") == text.count("}")


@pytest.mark.parametrize(("lora", "library"), [(None, "transformers"), ({"r": 4}, "peft")])
def test_the_snippet_loads_what_lies_beside_it(small_folder, tmp_path, lora, library):
    folder = tmp_path / "model"
    model = AutoModelForCausalLM.from_pretrained(small_folder / "model")
    (model if lora is None else get_peft_model(model, LoraConfig(**lora))).save_pretrained(folder)
    AutoTokenizer.from_pretrained(small_folder / "model").save_pretrained(folder)
    (folder / "README.md").write_text("another card")
    chosen = RunConfig.model_validate(config_values(small_folder, tmp_path / "run", lora=lora))
    write_model_card(folder, chosen, training_arguments(chosen, tmp_path, 0), LEARNT)
    text = (folder / "README.md").read_text("utf-8")
    assert text.startswith(f"---\nlibrary_name: {library}\n")
    assert ("rank of the LoRA adapter, which is all that was trained | 4 |" in text) == (lora is not None)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(code.replace("path/to/this/folder", str(folder)), names)
    assert len(names["tokenizer"]) == names["model"].config.vocab_size
    assert any("lora" in name for name in names["model"].state_dict()) == (lora is not None)
    assert not list(folder.glob("*.partial"))
