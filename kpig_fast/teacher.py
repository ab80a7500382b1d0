"""What must be kept of the frozen model M_{t-1} while M_t trains: gains, masked hidden states, and the old head.

The teacher's distributions at the masked response positions are ``hidden @ weight.T``; keeping ``hidden`` costs D
numbers a token instead of V, and only M_t sits in memory while it trains. The file is memory-mapped.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.scorer import KeyPartScorer
from kpig_fast.tree.model import causal_lm, output_head

_FORMAT = "kpig_fast teacher 1"


class Teacher:
    """A pre-pass of M_{t-1} over the training instances of one step, read from its file.

    Attributes:
        gain: float64 [n], G of each instance.
        offsets: int64 [n + 1]; the masked response rows of instance i are ``offsets[i] : offsets[i + 1]``.
        weight, bias: the old head [V, D], [V]; None what is not trained, so that the model's own stays the old one.

    Raises:
        ValueError: the file is no teacher, is damaged, or ``key`` names other content.
    """

    def __init__(self, path: str | Path, key: str | None = None) -> None:
        self.path = Path(path)
        try:
            self._file = safe_open(self.path, framework="pt")
            metadata = self._file.metadata() or {}
        except Exception as error:
            raise ValueError(
                f"{self.path} cannot be read as a teacher ({error}); delete it to make it again"
            ) from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{self.path} is no teacher of this version; delete it to make it again")
        if key is not None and metadata["key"] != key:
            raise ValueError(f"{self.path} belongs to another model or other data; delete it to make it again")
        names = set(self._file.keys())
        tensors = {name: self._file.get_tensor(name) for name in sorted(names)}
        if _checksum(tensors) != metadata["sha256"]:
            raise ValueError(f"{self.path} is damaged (checksum differs); delete it to make it again")
        self.gain: Tensor = tensors["gain"]
        self.offsets: Tensor = tensors["offsets"]
        self.weight: Tensor | None = tensors.get("weight")
        self.bias: Tensor | None = tensors.get("bias")
        self._hidden: Tensor = tensors["hidden"]

    def hidden(self, rows: Tensor) -> Tensor:
        """[M, D]: the hidden states of the given rows (int64 [M]), read from the file's mapping."""
        return self._hidden.index_select(0, rows)


def make_teacher(
    path: str | Path, scorer: KeyPartScorer, pairs: Sequence[EncodedPair], *, progress: bool = False
) -> Teacher:
    """Run the scorer's model once over ``pairs`` and keep what training needs of it; an equal file is used again.

    Args:
        path: where the file goes; written beside it first, then moved.
        scorer: holds M_{t-1}.
        pairs: the training instances of the step.
        progress: show a progress bar.

    Raises:
        ValueError: a file of another model or other data lies at ``path``.
    """
    path = Path(path)
    key = _key(scorer, pairs)
    if path.exists():
        return Teacher(path, key)
    scores = scorer.score_pairs(pairs, keep_hidden=True, progress=progress)
    lengths = torch.tensor([0, *(len(hidden) for hidden in scores.hidden)])
    tensors = {"gain": scores.gain, "offsets": lengths.cumsum(0), "hidden": torch.cat(scores.hidden)}
    head = output_head(scorer.model)
    trained = {"weight": head.weight, "bias": head.bias}
    tensors |= {name: x.detach().cpu() for name, x in trained.items() if x is not None and x.requires_grad}
    partial = path.with_name(path.name + ".partial")
    metadata = {"format": _FORMAT, "key": key, "sha256": _checksum(tensors)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata)
    os.replace(partial, path)
    return Teacher(path, key)


def model_hash(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of a model's parameters and buffers, names included."""
    return _hash_tensors(sorted(model.state_dict().items()))


def _key(scorer: KeyPartScorer, pairs: Sequence[EncodedPair]) -> str:
    digest = hashlib.sha256(model_hash(causal_lm(scorer.model)).encode())
    digest.update(f"{scorer.alpha} {scorer.scored_length}".encode())
    for pair in pairs:
        digest.update(f"{pair.complete_ids}{pair.masked_ids}{pair.response_ids}".encode())
    return digest.hexdigest()


def _checksum(tensors: dict[str, Tensor]) -> str:
    return _hash_tensors(sorted(tensors.items()))


def _hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
