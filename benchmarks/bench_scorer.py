"""Scoring under the complete and the masked instruction: one pass over token trees against two padded passes.

``python benchmarks/bench_scorer.py --quick``; README.md beside this file says how to read it.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from common import Setting, labelled, parser, race, ratios, report, require, setting
from torch import Tensor
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM

from kpig_fast import EncodedPair, KeyPartScorer
from kpig_fast.method.gain import gains

ALPHA, TAIL_TOL = 0.3, 1e-7
OURS, OURS_WHOLE = "token trees", "token trees, with tokenization"

# The model, padded inputs and shifted labels [B, L - 1] -> log-probs of the labels, row after row.
LogProbs = Callable[[LlamaForCausalLM, dict[str, Tensor], Tensor], Tensor]
# Log-probs of the response tokens of every instance, under the complete and under the masked instruction.
Scores = tuple[list[Tensor], list[Tensor]]


def full_logits(model: LlamaForCausalLM, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """From the logits of every position."""
    log_probs = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    return log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0][labels >= 0]


def response_rows(model: LlamaForCausalLM, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """From the logits of the positions that predict a response token, only."""
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    log_probs = model.lm_head(hidden[labels >= 0]).log_softmax(-1)
    return log_probs.gather(-1, labels[labels >= 0][:, None])[:, 0]


@torch.inference_mode()
def padded(s: Setting, pairs: Sequence[EncodedPair], log_probs: LogProbs, *, batch: int, by_length: bool) -> Scores:
    """Two passes over right-padded batches with SDPA, every response token scored.

    Args:
        s: the model and its tokenizer.
        pairs: the instances.
        log_probs: :func:`full_logits` or :func:`response_rows`.
        batch: sequences of a batch.
        by_length: batches of similar lengths, so that little is padded, instead of the order of ``pairs``.
    """
    collate = DataCollatorForSeq2Seq(s.tokenizer)

    def one_pass(sequences: list[dict[str, list[int]]]) -> list[Tensor]:
        order = list(range(len(sequences)))
        if by_length:
            order.sort(key=lambda i: len(sequences[i]["input_ids"]))
        scores: dict[int, Tensor] = {}
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            inputs = collate([sequences[i] for i in part])
            labels = inputs.pop("labels")[:, 1:]
            scores |= zip(part, log_probs(s.model, inputs, labels).split([len(pairs[i].response_ids) for i in part]))
        return [scores[i] for i in range(len(sequences))]

    return (
        one_pass([labelled(pair.complete_ids, pair.response_ids) for pair in pairs]),
        one_pass([labelled(pair.masked_ids, pair.response_ids) for pair in pairs]),
    )


def padded_runs(s: Setting, pairs: Sequence[EncodedPair], batch: int) -> dict[str, Callable[[], Scores]]:
    """The four padded contestants by name."""
    return {
        f"padded, {rows}, {order}": partial(padded, s, pairs, log_probs, batch=batch, by_length=by_length)
        for rows, log_probs in (("full logits", full_logits), ("response rows", response_rows))
        for order, by_length in (("in given order", False), ("sorted by length", True))
    }


def check(ours: Scores, other: Scores) -> None:
    """Require the same log-probs, and the same gains up to the tail that ours leaves out."""
    sides = [(a, b) for one, two in zip(ours, other, strict=True) for a, b in zip(one, two, strict=True)]
    require("log-probs differ by", max(float((a - b[: len(a)]).abs().max()) for a, b in sides), 1e-4)
    difference = gains(*ours, ALPHA) - gains(*other, ALPHA)
    require("gains differ by", float(difference.abs().max()), 1e-5 + TAIL_TOL)


def main(command: Sequence[str] | None = None) -> None:
    """Run the benchmark; ``command``: its options, default those of the command line."""
    arguments = parser("Token trees against two padded passes.", tasks=20, instances=10).parse_args(command)
    s = setting(arguments)
    scorer = KeyPartScorer(s.model, s.tokenizer, alpha=ALPHA, tail_tol=TAIL_TOL)
    pairs = scorer.encoder.encode_all(s.instances)
    others = padded_runs(s, pairs, arguments.batch)
    ours = scorer.score_pairs(pairs)
    for run in tqdm(others.values(), desc="checking", unit="run"):
        check((ours.complete, ours.masked), run())
    runs = {OURS: partial(scorer.score_pairs, pairs), OURS_WHOLE: partial(scorer.score, s.instances), **others}
    seconds = race(
        {name: lambda run=run: run for name, run in runs.items()},
        arguments.rounds,
        processor_time=arguments.processor_time,
    )
    facts = {
        "parameters": s.model.num_parameters(),
        "tokens": ours.stats.tokens,
        "tokens_naive": ours.stats.tokens_naive,
        "tokens_ratio": round(ours.stats.tokens_naive / ours.stats.tokens, 2),
        "largest_gain": float(ours.gain.abs().max()),
    }
    print(facts)
    report(arguments, seconds, {f"as fast as {name}": ratios(seconds, name, OURS) for name in others}, **facts)


if __name__ == "__main__":
    main()
