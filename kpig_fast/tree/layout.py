"""The token tree: sequences laid out as a forest of tries, so that a shared prefix is computed once.

Rows stand in depth-first order; row q may attend to row k if and only if ``k <= q < subtree_end[k]``.
A sequence is a prompt followed by a response. The response token at index j is predicted at the row of the token at
j - 1, so a sequence's last token needs no row, and a sequence with an empty response needs none at all.
"""

from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kpig_fast import _native

INT32_MAX = 2**31 - 1

_NO_TOKENS = np.empty(0, np.int32)


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A forest of token tries as flat arrays: T rows that serve S sequences with R response tokens.

    Attributes:
        input_ids: [T] int32, token of each row.
        position_ids: [T] int32, depth: the position that the token has in its own sequences.
        subtree_end: [T] int32, first row after the row's subtree.
        sequences: [S] int64, which of the packed sequences are served; those with an empty response never are.
        rows: [R] int64, the row that predicts each response token, sequence after sequence.
        row_offsets: [S + 1] int64, where each served sequence's part of ``rows`` starts.
    """

    input_ids: Tensor
    position_ids: Tensor
    subtree_end: Tensor
    sequences: Tensor
    rows: Tensor
    row_offsets: Tensor

    def __len__(self) -> int:
        """Number of rows T, the tokens laid out."""
        return len(self.input_ids)

    def rows_of(self, i: int) -> Tensor:
        """[K_i] int64, the rows that predict the response of ``sequences[i]``, in response order."""
        return self.rows[self.row_offsets[i] : self.row_offsets[i + 1]]

    def to(self, device: torch.device | str) -> "TokenTree":
        """The same tree with its tensors on ``device``."""
        return TokenTree(*(getattr(self, field.name).to(device) for field in fields(self)))


def pack(
    sequences: Sequence[Sequence[int] | NDArray[np.integer]], response_start: Sequence[int], *, max_tokens: int
) -> list[TokenTree]:
    """Lay sequences out as trees of at most ``max_tokens`` rows each, with the fewest rows over all consecutive cuts.

    The cuts are consecutive in lexicographic order; a cut repeats the prefix that both sides share. A sequence that
    needs more than ``max_tokens`` rows gets a larger tree of its own, together with the prefixes and copies of it.

    Args:
        sequences: token ids, prompt and response.
        response_start: for each sequence the index of its first response token; its length for an empty response.
        max_tokens: rows that a tree may have.

    Returns:
        Trees that serve every sequence with a response exactly once; none if there is no such sequence.

    Raises:
        ValueError: a token id is negative, beyond int32 or no integer; the lengths of the arguments differ; a response
            starts outside its sequence or at its first token; ``max_tokens`` lies outside 1 ... 2^31 - 1.
    """
    tokens, offsets = _flatten(sequences)
    starts = _vector(response_start, "response_start").astype(np.int64)
    forests = _native.pack_forests(tokens, offsets, starts, max_tokens=max_tokens)
    return [TokenTree(*map(torch.from_numpy, forest)) for forest in forests]


def build(sequences: Sequence[Sequence[int] | NDArray[np.integer]], response_start: Sequence[int]) -> TokenTree:
    """Lay sequences out as one tree, as :func:`pack` does; empty if no sequence has a response.

    Raises:
        ValueError: as :func:`pack`, or the tree would pass 2^31 - 1 rows.
    """
    trees = pack(sequences, response_start, max_tokens=INT32_MAX)
    if len(trees) > 1:
        raise ValueError(f"{len(sequences)} sequences need more than {INT32_MAX} rows in one tree; use pack instead")
    return trees[0] if trees else _empty()


def filler_tree() -> TokenTree:
    """One row that serves nothing: for a process without a tree while others, which share the model, have one."""
    row, index = torch.zeros(1, dtype=torch.int32), torch.empty(0, dtype=torch.int64)
    return TokenTree(row, row, row + 1, index, index, torch.zeros(1, dtype=torch.int64))


def _empty() -> TokenTree:
    row = torch.empty(0, dtype=torch.int32)
    index = torch.empty(0, dtype=torch.int64)
    return TokenTree(row, row, row, index, index, torch.zeros(1, dtype=torch.int64))


def _flatten(sequences: Sequence[Sequence[int] | NDArray[np.integer]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    parts = [_vector(sequence, f"sequence {i}") for i, sequence in enumerate(sequences)]
    offsets = np.zeros(len(parts) + 1, np.int64)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    tokens = np.concatenate([_NO_TOKENS, *parts])
    if tokens.size and not 0 <= tokens.min() <= tokens.max() <= INT32_MAX:
        at = np.flatnonzero((tokens < 0) | (tokens > INT32_MAX))[0]
        i = np.searchsorted(offsets, at, side="right") - 1
        raise ValueError(f"sequence {i} has token id {tokens[at]}; token ids lie in 0 ... {INT32_MAX}")
    return tokens.astype(np.int32, copy=False), offsets


def _vector(values: Sequence[int] | NDArray[np.integer], name: str) -> NDArray[np.integer]:
    if isinstance(values, list):
        # Several times faster than numpy on lists, which it would first search for a type; what fails is named below.
        with suppress(TypeError, OverflowError):
            return np.asarray(array("I", values))
    vector = np.asarray(values)
    if vector.ndim != 1 or (vector.size and vector.dtype.kind not in "iu"):
        raise ValueError(f"{name} has shape {vector.shape} and type {vector.dtype}; give one-dimensional integers")
    # numpy takes an empty tuple for float64.
    return vector if vector.size else _NO_TOKENS
