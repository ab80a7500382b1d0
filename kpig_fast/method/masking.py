"""Key parts of an instruction and the masked instruction (He et al., ACL 2025).

A key part is a span of the instruction. Each one, after overlapping spans have been merged, becomes one literal
mask text. Spans are half-open character ranges ``(start, end)``.
"""

from collections.abc import Sequence

MASK_TEXT = "[MASK]"

Span = tuple[int, int]
KeyPart = str | Span


def find_spans(instruction: str, key_parts: Sequence[KeyPart], *, where: str = "instance") -> tuple[Span, ...]:
    """Resolve key parts to sorted, disjoint character spans of ``instruction``.

    A text takes its first occurrence that no earlier equal text has taken; an offset pair is taken as it is.
    Overlapping spans are merged (touching ones are not: they are two parts).

    Args:
        instruction: the complete instruction.
        key_parts: verbatim texts or ``(start, end)`` character offsets, mixed freely.
        where: how error messages name the instance.

    Raises:
        ValueError: a text does not occur (often enough), or an offset lies outside the instruction.
    """
    spans = []
    next_search: dict[str, int] = {}
    for part in key_parts:
        if isinstance(part, str):
            start = instruction.find(part, next_search.get(part, 0)) if part else -1
            if start < 0:
                again = " once more" if part in next_search else ""
                raise ValueError(
                    f"{where}: key part {part!r} does not occur{again} in the instruction {_short(instruction)}; "
                    "copy it verbatim from the instruction or give (start, end) offsets"
                )
            span = (start, start + len(part))
            next_search[part] = span[1]
        else:
            span = (int(part[0]), int(part[1]))
            if not 0 <= span[0] < span[1] <= len(instruction):
                raise ValueError(
                    f"{where}: key part {span} is no span of the instruction {_short(instruction)}; "
                    f"offsets need 0 <= start < end <= {len(instruction)}"
                )
        spans.append(span)
    return _merge(spans)


def mask_instruction(
    instruction: str, key_parts: Sequence[KeyPart], *, mask_text: str = MASK_TEXT, where: str = "instance"
) -> str:
    """The instruction with every key part replaced by one ``mask_text``; without key parts, the instruction itself."""
    pieces = []
    done = 0
    for start, end in find_spans(instruction, key_parts, where=where):
        pieces += [instruction[done:start], mask_text]
        done = end
    return "".join([*pieces, instruction[done:]])


def _merge(spans: list[Span]) -> tuple[Span, ...]:
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def _short(text: str, limit: int = 80) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
