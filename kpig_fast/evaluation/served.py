"""Answers of a served model to the questions of an evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from kpig_fast.data.schema import Row
from kpig_fast.data.templates import ChatTemplate, PlainTemplate, Question
from kpig_fast.endpoint import Endpoint, Request
from kpig_fast.evaluation.evaluate import Prediction, write_predictions


def ask_served(
    endpoint: Endpoint,
    asked: Sequence[tuple[Row, Question]],
    *,
    template: Literal["plain", "chat"],
    max_new_tokens: int,
    progress: bool = False,
    predictions_path: Path | None = None,
) -> list[Prediction]:
    """Ask a served model greedily, up to its end-of-sequence token, as ``evaluate`` asks a loaded one.

    Args:
        endpoint: the served model.
        asked: rows and questions, as of ``questions``.
        template: ``plain`` sends the plain prompt to the completions of a base model; ``chat`` sends the turns of the
            question to the chat completions, and the server's own chat template writes the prompt.
        max_new_tokens: longest answer, in tokens.
        progress: show a progress bar.
        predictions_path: JSONL file for the answers; ``read_predictions`` reads it.

    Raises:
        ValueError, ConnectionError, ModuleNotFoundError: what ``Endpoint.answer`` raises, or ``max_new_tokens`` is
            below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; an answer needs at least 1")
    shown = [_shown(question, template) for _, question in asked]
    requests: list[Request] = [{**prompt, "max_tokens": max_new_tokens, "temperature": 0} for prompt in shown]
    answers = endpoint.answer(requests, progress=progress, what="answering")
    predictions = [
        Prediction(row.task, row.id, _text(prompt), row.context, answer.strip(), row.outputs)
        for (row, _), prompt, answer in zip(asked, shown, answers, strict=True)
    ]
    if predictions_path is not None:
        write_predictions(predictions, predictions_path)
    return predictions


def _shown(question: Question, template: Literal["plain", "chat"]) -> dict[str, Any]:
    if template == "chat":
        return {"messages": ChatTemplate.messages(*question)}
    return {"prompt": PlainTemplate.text(*question)}


def _text(prompt: dict[str, Any]) -> str:
    return prompt["prompt"] if "prompt" in prompt else json.dumps(prompt["messages"], ensure_ascii=False)
