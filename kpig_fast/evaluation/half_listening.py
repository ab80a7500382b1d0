"""The half-listening test: asked for a new form, does a model still answer in the old one (He et al., ACL 2025)?"""

from collections.abc import Sequence

from kpig_fast.data.schema import Constraints
from kpig_fast.evaluation.violations import violations


def obedience(
    answers: Sequence[str], asked: Constraints, old: Constraints, contexts: Sequence[str] | None = None
) -> dict[str, float]:
    """Shares of the answers, in percent, that obey what was ``asked``, else the ``old`` constraints, else ``neither``.

    An answer obeys constraints when it violates none of them.

    Args:
        answers: what the model said when asked under the changed instruction.
        asked: the constraints of the changed instruction.
        old: the constraints that the model was trained on.
        contexts: the context of every answer, for scopes that are spans of the context.

    Raises:
        ValueError: no answers, a number of contexts that differs from theirs, or constraints that check nothing.
    """
    if not answers or (contexts is not None and len(contexts) != len(answers)):
        raise ValueError(f"{len(answers)} answers and {len(contexts or ())} contexts; need answers, a context for each")
    for name, constraints in (("asked", asked), ("old", old)):
        if not violations(constraints, ""):
            raise ValueError(
                f"the {name} constraints check nothing; give labels, a format, spans_of_context or max_words"
            )
    counts = {"asked": 0, "old": 0, "neither": 0}
    for answer, context in zip(answers, contexts or [""] * len(answers), strict=True):
        if not any(violations(asked, answer, context).values()):
            counts["asked"] += 1
        elif not any(violations(old, answer, context).values()):
            counts["old"] += 1
        else:
            counts["neither"] += 1
    return {name: 100 * count / len(answers) for name, count in counts.items()}
