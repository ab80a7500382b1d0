"""The performance metrics behind the P-score, each 0–100 for the answers of one task (He et al., ACL 2025).

Which metric looks at what:

======  ======================================================================================================
acc     the normalised answer equals a normalised reference
match   the items of the answer and of a reference are the same set
f1      F1 of the words of the items, counted as a multiset; the best reference
rougeL  ROUGE-L F-measure over words of letters and digits of any script; the best reference
bleu    corpus BLEU over all answers, any number of references each; n-gram orders that no answer is long enough
        for are left out, so that short right answers reach 100
gpt     needs a judge, which is not configured here: not scored
======  ======================================================================================================

Performance is about content, so every metric ignores letter case; the violations measure form, exactly.

**Normalisation** (acc, match, f1): case folded, Unicode composed, runs of white space become one blank; then
surrounding pairs of quotes and trailing full stops are taken away for as long as there are any. What consists of
nothing else stays as it is.

**Items** (match, f1): the elements of a Python or JSON list. Other text loses one surrounding pair of brackets and is
split at commas, semicolons, vertical bars and new lines, or at white space where it has none of them.
"""

import ast
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kpig_fast.data.schema import Metric

_QUOTES = {'"': '"', "'": "'", "`": "`", "“": "”", "‘": "’", "«": "»"}
_BRACKETS = {"[": "]", "(": ")", "{": "}"}

Item = str | tuple["Item", ...]


@dataclass(frozen=True)
class Tally:
    """A figure of one task as what is counted in each of its answers, so that it can be had of any choice of them.

    Args:
        counts: float64 [n, c], a row for every answer.
        of_sums: [..., c], sums of n of these rows, to the figure [...] of those n answers.
    """

    counts: NDArray[np.float64]
    of_sums: Callable[[NDArray[np.float64]], NDArray[np.float64]]

    @property
    def value(self) -> float:
        """The figure of all the answers."""
        return float(self.of_sums(self.counts.sum(0)))


def mean_tally(values: Sequence[float]) -> Tally:
    """The mean of one value an answer."""
    return Tally(np.asarray(values, float)[:, None], lambda sums: sums[..., 0] / len(values))


def score(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float | None:
    """The score of one task's answers, 0–100, or None where the metric needs a judge.

    Args:
        metric: the task's metric.
        answers: what the model said.
        references: for every answer one or more right answers.

    Raises:
        ValueError: unknown metric, no answers, lengths that differ, or an answer without references.
        ModuleNotFoundError: the library of the metric is not installed.
    """
    found = tally(metric, answers, references)
    return None if found is None else found.value


def tally(metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tally | None:
    """``score`` as what is counted in each answer. Arguments and errors are those of ``score``."""
    if not answers or len(answers) != len(references):
        raise ValueError(
            f"{len(answers)} answers and {len(references)} references; need at least one, and as many of each"
        )
    for index, right in enumerate(references):
        if not right or isinstance(right, str):
            raise ValueError(f"references {index} are {right!r}; give a list of one or more right answers")
    match metric:
        case "acc":
            compare = _equal
        case "match":
            compare = _same_items
        case "f1":
            compare = _f1
        case "rougeL":
            compare = _rouge_l()
        case "bleu":
            return _bleu(answers, references)
        case "gpt":
            return None
        case _:
            raise ValueError(f"unknown metric {metric!r}; choose one of {', '.join(get_args(Metric))}")
    return mean_tally([100 * compare(answer, right) for answer, right in zip(answers, references)])


def normalise(text: str) -> str:
    """``text`` as the metrics compare it: rules in the module docstring."""
    text = " ".join(unicodedata.normalize("NFC", text.casefold()).split())
    inner = text
    while True:
        shorter = _unwrap(inner, _QUOTES).rstrip(".").strip()
        if shorter == inner:
            return inner or text
        inner = shorter


def items(text: str) -> list[Item]:
    """The normalised items that ``text`` lists: rules in the module docstring. A list inside a list is one item."""
    literal = _literal(text.strip())
    if literal is not None:
        return [_canonical(element) for element in literal]
    inner = _unwrap(text.strip(), _BRACKETS)
    pieces = re.split(r"[,;|\n]", inner)
    if len(pieces) == 1:
        pieces = inner.split()
    return [normalise(piece) for piece in pieces if piece.strip()] or [normalise(text)]


def _equal(answer: str, right: Sequence[str]) -> float:
    return float(normalise(answer) in map(normalise, right))


def _same_items(answer: str, right: Sequence[str]) -> float:
    return float(set(items(answer)) in (set(items(reference)) for reference in right))


def _f1(answer: str, right: Sequence[str]) -> float:
    return max(_f1_of(_words(answer), _words(reference)) for reference in right)


def _f1_of(found: Counter[str], wanted: Counter[str]) -> float:
    if found == wanted:
        return 1.0
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def _words(text: str) -> Counter[str]:
    return Counter(word for item in items(text) for word in _flat(item))


def _flat(item: Item) -> list[str]:
    if isinstance(item, str):
        return item.split() or [item]
    return [word for part in item for word in _flat(part)]


def _rouge_l() -> Callable[[str, Sequence[str]], float]:
    scorer = _library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    return lambda answer, right: scorer.score_multi(right, answer)["rougeL"].fmeasure


class _WordTokenizer:
    """Words for ROUGE. The library's own tokenizer drops everything outside a–z and 0–9; on those both agree."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text).lower())


def _bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Tally:
    metric = _library("sacrebleu.metrics").BLEU(lowercase=True, effective_order=True)
    # The BLEU of a corpus is that of the sums of what is counted in its sentences.
    found = [metric.sentence_score(answer, list(right)) for answer, right in zip(answers, references)]
    order = metric.max_ngram_order

    def bleu(sums: NDArray[np.float64]) -> float:
        counted = [int(number) for number in sums]
        result = metric.compute_bleu(
            counted[:order], counted[order:-2], *counted[-2:], smooth_method="exp", effective_order=True
        )
        # The library's sum of logarithms can end a rounding error above 100.
        return min(result.score, 100.0)

    return Tally(
        np.array([[*one.counts, *one.totals, one.sys_len, one.ref_len] for one in found], float),
        lambda sums: np.apply_along_axis(bleu, -1, sums),
    )


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this metric needs the package {name.split('.')[0]!r}; install it with: pip install 'kpig-fast[eval]'"
        ) from error


def _unwrap(text: str, pairs: dict[str, str]) -> str:
    if len(text) > 1 and text[-1] == pairs.get(text[0]):
        return text[1:-1].strip()
    return text


def _literal(text: str) -> list[Any] | None:
    if text[:1] not in _BRACKETS:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            value = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    return list(value) if isinstance(value, list | tuple) else None


def _canonical(element: Any) -> Item:
    if isinstance(element, list | tuple):
        return tuple(_canonical(part) for part in element)
    return normalise(str(element))
