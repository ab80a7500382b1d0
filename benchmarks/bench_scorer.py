"""Scoring under the complete and the masked instruction: one pass over token trees against two padded passes.

``python benchmarks/bench_scorer.py --quick``; README.md beside this file says how to read it.
"""

from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

from baseline_scorers import FUSED, SLOW, Scores, padded_runs
from common import parser, race, ratios, report, require, setting
from tqdm import tqdm

from kpig_fast import KeyPartScorer
from kpig_fast.method.gain import gains

ALPHA, TAIL_TOL = 0.3, 1e-7
OURS, OURS_WHOLE = "token trees", "token trees, with tokenization"


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
        slow=SLOW & others.keys(),
    )
    facts = {
        "parameters": s.model.num_parameters(),
        "tokens": ours.stats.tokens,
        "tokens_naive": ours.stats.tokens_naive,
        "tokens_ratio": round(ours.stats.tokens_naive / ours.stats.tokens, 2),
        "largest_gain": float(ours.gain.abs().max()),
        "trl": version("trl") if FUSED in others else None,
    }
    print(facts)
    report(arguments, seconds, {f"as fast as {name}": ratios(seconds, name, OURS) for name in others}, **facts)


if __name__ == "__main__":
    main()
