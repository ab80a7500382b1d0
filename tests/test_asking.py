"""``kpig ask``: a model that is not trained here, asked what a run asks."""

import json
import threading

import pytest
import yaml
from endpoint_server import SECRET, chat, completion, failure, serving
from evaluation_models import byte_tokenizer
from small_run import TASKS, collection, config_values, small_folder, write_config  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast import endpoint as endpoint_module
from kpig_fast.cli import main
from kpig_fast.data.encoding import PromptEncoder
from kpig_fast.data.schema import Constraints, Demonstration, PoolInstruction, Row, Task, TaskCollection
from kpig_fast.endpoint import Endpoint
from kpig_fast.evaluation.evaluate import evaluate, questions, read_predictions
from kpig_fast.evaluation.generation import generate_answers
from kpig_fast.evaluation.runs import is_complete, read_run, summarise
from kpig_fast.evaluation.served import ask_served
from kpig_fast.training.run_config import load_run_config

SHOWN = tuple(Demonstration(context=c, output=c.upper()) for c in "abc")
COLLECTION = TaskCollection.of(
    [
        Task(task="copy", instructions=(PoolInstruction(text="Copy."),), metric="acc", demonstrations=SHOWN),
        Task(
            task="shout",
            role="held_out",
            instructions=(PoolInstruction(text="Shout."),),
            metric="acc",
            constraints=Constraints(max_words=1),
            demonstrations=SHOWN,
        ),
    ],
    [
        Row(task=task, id=f"{task}-{n}", context=f"w{n}", outputs=("x",), split="test")
        for task in ("copy", "shout")
        for n in range(3)
    ],
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(endpoint_module, "_LONGEST_WAIT", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_questions_are_the_rows_with_demonstrations_for_held_out_tasks():
    asked = questions(COLLECTION, limit=2, demonstrations=1)
    assert [row.id for row, _ in asked] == ["copy-0", "copy-1", "shout-0", "shout-1"]
    assert [tuple(question) for _, question in asked[1:3]] == [("Copy.", "w1", ()), ("Shout.", "w0", SHOWN[:1])]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_a_served_model_is_shown_what_a_loaded_one_is(template, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    asked = questions(COLLECTION)
    reply = completion(" yes \n") if template == "plain" else chat(" yes \n")
    with serving(lambda *_: reply) as server:
        path = tmp_path / "predictions.jsonl"
        endpoint = Endpoint("served", server.url, concurrency=1)
        said = ask_served(endpoint, asked, template=template, max_new_tokens=5, predictions_path=path)
    assert read_predictions(path) == said
    assert [(one.task, one.id, one.context, one.answer, one.references) for one in said] == [
        (row.task, row.id, row.context, "yes", ("x",)) for row, _ in asked
    ]
    for body, (_, question) in zip(server.bodies, asked, strict=True):
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("served", 0, 5)
        if template == "plain":
            text = tokenizer.decode(PromptEncoder(tokenizer).prompt(*question))
            assert body["prompt"] == text.removeprefix("<s>")
        else:
            worked = [(f"{question.instruction}\n\n{one.context}", one.output) for one in question.demonstrations]
            texts = [text for pair in worked for text in pair] + [f"{question.instruction}\n\n{question.context}"]
            assert [turn["content"] for turn in body["messages"]] == texts
    assert server.paths[0].endswith("/chat/completions" if template == "chat" else "/v1/completions")


def test_no_room_for_an_answer_is_named():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        ask_served(Endpoint("m", "http://127.0.0.1:9"), questions(COLLECTION), template="plain", max_new_tokens=0)


def ask(config, out, *more):
    return main(["ask", str(config), "--out", str(out), "--quiet", *more])


@pytest.fixture
def by_model(small_folder):  # noqa: F811
    """A server that answers a completion as the small model does."""
    model = AutoModelForCausalLM.from_pretrained(small_folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(small_folder / "model")
    # Requests come in several threads, and generation switches the model's attention.
    alone = threading.Lock()

    def reply(_, body):
        prompts = [tokenizer(body["prompt"]).input_ids]
        with alone:
            return completion(generate_answers(model, tokenizer, prompts, max_new_tokens=body["max_tokens"])[0])

    return reply


def test_a_loaded_and_a_served_model_give_the_same_run(small_folder, by_model, tmp_path, capsys):  # noqa: F811
    config, model = write_config(small_folder, tmp_path / "never"), str(small_folder / "model")
    assert ask(config, tmp_path / "hf", "--model", model) == 0
    assert "held_out" in capsys.readouterr().out
    with serving(by_model) as server:
        assert ask(config, tmp_path / "served", "--model", "m", "--engine", "openai", "--base-url", server.url) == 0
    loaded, served = read_run(tmp_path / "hf"), read_run(tmp_path / "served")
    assert loaded == served
    assert (loaded[0].step, loaded[0].evaluated[-1], loaded[0].gains) == (-1, "last", {})
    assert [(one.task, one.n) for one in loaded[0].obedience] == [("shout", 3)]
    changed = read_predictions(tmp_path / "served" / "untrained" / "half_listening.jsonl")
    assert all("whisper" in one.prompt for one in changed)
    said = [read_predictions(tmp_path / name / "untrained" / "predictions.jsonl") for name in ("hf", "served")]
    assert [one.answer for one in said[0]] == [one.answer for one in said[1]]
    assert len(said[0]) == 2 * (len(TASKS) + 1)
    assert not (tmp_path / "never").exists()


def test_the_figures_are_those_of_the_evaluation(small_folder, tmp_path):  # noqa: F811
    model = str(small_folder / "model")
    assert ask(write_config(small_folder, tmp_path / "never"), tmp_path / "hf", "--model", model) == 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    result = evaluate(
        AutoModelForCausalLM.from_pretrained(model),
        tokenizer,
        collection(),
        encoder=PromptEncoder(tokenizer),
        limit=2,
        max_new_tokens=2,
    )
    assert read_run(tmp_path / "hf")[0].evaluation == result


def test_the_folder_is_a_run(small_folder, tmp_path):  # noqa: F811
    run, model = tmp_path / "hf", str(small_folder / "model")
    assert ask(write_config(small_folder, tmp_path / "never"), run, "--model", model) == 0
    config = load_run_config(run / "config.yaml")
    assert (config.model, config.output_dir) == (model, run)
    assert is_complete(run / "untrained")
    assert json.loads((run / "environment.json").read_text())
    assert summarise(read_run(run)).steps == 0
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "report.html").exists()


def test_a_stopped_command_goes_on_and_a_finished_one_is_read(small_folder, tmp_path, capsys):  # noqa: F811
    config, run = write_config(small_folder, tmp_path / "never"), tmp_path / "served"
    with serving(lambda number, _: completion("a b") if number < 3 else failure(503, "overloaded")) as server:
        arguments = ["--model", "m", "--engine", "openai", "--base-url", server.url]
        assert ask(config, run, *arguments) != 0
        assert "503" in capsys.readouterr().err
        assert not is_complete(run / "untrained")
        server.reply, sent = (lambda *_: completion("a b")), len(server.bodies)
        assert ask(config, run, *arguments) == 0
        # Two rows of each task, and three that show the changed wording, but for the three that were answered.
        assert len(server.bodies) - sent == 8 + 3 - 3
        sent = len(server.bodies)
        assert ask(config, run, *arguments) == 0
        assert len(server.bodies) == sent
        assert ask(config, run, "--model", "other", *arguments[2:]) == 2
        assert "holds a run with other config" in capsys.readouterr().err


def test_no_file_and_no_line_holds_the_key(small_folder, tmp_path, capsys):  # noqa: F811
    config, run = write_config(small_folder, tmp_path / "never"), tmp_path / "served"
    arguments = [config, run, "--model", "m", "--engine", "openai", "--base-url"]
    with serving(lambda *_: failure(401, f"{SECRET} is wrong")) as server:
        assert ask(*arguments, server.url) == 2
        server.reply = lambda *_: completion("a")
        assert ask(*arguments, server.url) == 0
        assert set(server.keys) == {f"Bearer {SECRET}"}
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 10
    assert all(SECRET.encode() not in file.read_bytes() for file in files)
    shown = capsys.readouterr()
    assert "401" in shown.err
    assert SECRET not in shown.out + shown.err


def test_chat_is_chosen_by_the_config(small_folder, tmp_path):  # noqa: F811
    values = config_values(small_folder, tmp_path / "never")
    values["training"] = {**values["training"], "template": "chat"}
    config = tmp_path / "chat.yaml"
    config.write_text(yaml.safe_dump(values))
    with serving(lambda *_: chat("a b")) as server:
        assert ask(config, tmp_path / "run", "--model", "m", "--engine", "openai", "--base-url", server.url) == 0
    assert set(server.paths) == {"/v1/chat/completions"}


def test_an_address_without_its_engine_is_named(small_folder, tmp_path, capsys):  # noqa: F811
    config = write_config(small_folder, tmp_path / "never")
    assert ask(config, tmp_path / "run", "--model", "m", "--base-url", "http://here/v1") == 2
    assert "add --engine openai" in capsys.readouterr().err
