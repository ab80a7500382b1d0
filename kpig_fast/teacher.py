"""What must be kept of the frozen model M_{t-1} while M_t trains: gains, masked hidden states, and the old head.

The teacher's distributions at the masked response positions are ``hidden @ weight.T``; keeping ``hidden`` costs D
numbers a token instead of V, and only M_t sits in memory while it trains. The instances are cut into parts: each is
one file, made by one process and named by what it was made of, so that a pre-pass that was stopped goes on. All
processes read all files through memory mappings.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.processes import rank, wait, whole, world
from kpig_fast.scorer import KeyPartScorer
from kpig_fast.tree.model import causal_lm, output_head

# Masked response rows of one part: bounds the memory of the pre-pass, and what is lost when it is stopped.
PART_ROWS = 2**16

_FORMAT = "kpig_fast teacher 2"


@dataclass(frozen=True)
class Teacher:
    """A pre-pass of M_{t-1} over the n training instances of one step.

    Attributes:
        gain: float64 [n], G of each instance.
        starts: int64 [n], the first masked response row of each instance; its others follow.
        parts: the hidden states [M_j, D] of consecutive rows, mapped from their files.
        weight, bias: the old head [V, D], [V]; None what is not trained, so that the model's own stays the old one.
    """

    gain: Tensor
    starts: Tensor
    parts: Sequence[Tensor]
    weight: Tensor | None = None
    bias: Tensor | None = None

    def to(self, like: Tensor) -> "Teacher":
        """The same teacher with its old head on the device and in the dtype of ``like``."""
        weight, bias = (None if x is None else x.to(like) for x in (self.weight, self.bias))
        return replace(self, weight=weight, bias=bias)

    def hidden(self, rows: Tensor) -> Tensor:
        """[M, D]: the hidden states of the given rows (int64 [M]), in the dtype in which they are kept."""
        first_rows = torch.tensor([0, *map(len, self.parts)]).cumsum(0)[:-1]
        part_of = torch.bucketize(rows, first_rows, right=True) - 1
        found = self.parts[0].new_empty(len(rows), self.parts[0].shape[1])
        for number in part_of.unique().tolist():
            here = part_of == number
            found[here] = self.parts[number].index_select(0, rows[here] - first_rows[number])
        return found


def make_teacher(
    folder: Path,
    scorer: KeyPartScorer,
    pairs: Sequence[EncodedPair],
    *,
    planned: Sequence[EncodedPair] = (),
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Teacher:
    """Run the scorer's model, adapters included, once over ``pairs`` and keep what training needs of it.

    The processes of a launch share the work; each of them calls this. A file that is there already is used again.

    Args:
        folder: where the files go; all processes see it.
        scorer: holds M_{t-1}.
        pairs: the training instances of the step, neighbours sharing their instruction.
        planned: instances that have gone through a pre-pass into the same folder; those that are trained, too, are
            read from its files.
        dtype: how hidden states are kept; default: as the model computes them. ``torch.bfloat16`` halves float32 files
            and moves every number by 1/256 of itself at most; gains stay as they are. On real tasks
            (``pytest tests/test_teacher_bf16.py``) the mean divergence is off by 1e-6 bits, even while M_t still is
            M_{t-1} and it should be 0. The error of its gradient is 3e-6 of the whole gradient at lambda = 0.02: of
            its own 3 % after one step of AdamW at 2e-5, 0.5 % after five.
        progress: show progress bars.

    Raises:
        ValueError: ``pairs`` is empty, an instance is longer than the model's positions, or a file is damaged or
            missing.
        OSError: a file cannot be written, such as on a full disk; what was written before stays of use.
    """
    if not pairs:
        raise ValueError("pairs is empty; a teacher needs at least one instance")
    scorer.check_positions(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    lm = causal_lm(scorer.model)
    model = _hash(model_hash(lm), _adapters(lm))
    head = _trained_head(scorer.model)
    head_path = folder / f"head-{_hash(model, *head)}.safetensors"
    if head and rank() == 0 and not head_path.exists():
        _save(head_path, head)
    known = {_key(pair) for pair in planned}
    parts = _cut(planned) + _cut([pair for pair in pairs if _key(pair) not in known])
    settings = (model, scorer.alpha, scorer.scored_length, dtype)
    paths = [folder / f"part-{i}-{_hash(*settings, *part)}.safetensors" for i, part in enumerate(parts)]
    mine = range(rank(), len(parts), world())
    for i in tqdm(mine, desc="teacher", unit="part", disable=not progress or len(mine) == 1):
        todo = [] if paths[i].exists() else parts[i]
        # Every process calls the model equally often, as one that is sharded over them needs it.
        scores = scorer.score_pairs(todo, keep_hidden=True, progress=progress and bool(todo))
        if todo:
            hidden = torch.cat([x.to(dtype or x.dtype) for x in scores.hidden])
            _save(paths[i], {"gain": scores.gain, "hidden": hidden})
    wait()
    opened = [_open(path) for path, part in zip(paths, parts) if part]
    made = [pair for part in parts for pair in part]
    place = {_key(pair): i for i, pair in enumerate(made)}
    places = torch.tensor([place[_key(pair)] for pair in pairs])
    gain = torch.cat([part["gain"] for part in opened])
    return Teacher(
        gain[places], _offsets(made)[places], [part["hidden"] for part in opened], **(_open(head_path) if head else {})
    )


def model_hash(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of a model's parameters and buffers, names included.

    Every process that holds a piece of a sharded model calls this, and gets the hash of the whole.
    """
    return _hash_tensors(sorted(model.state_dict().items()))


def _adapters(lm: nn.Module) -> list[object]:
    """How PEFT's layers use their weights, which a state dict does not tell: which of them, and times what."""
    layers = [m for m in lm.modules() if isinstance(getattr(m, "active_adapters", None), list)]
    return [(m.active_adapters, m.disable_adapters, getattr(m, "scaling", None)) for m in layers]


def _trained_head(model: nn.Module) -> dict[str, Tensor]:
    # What adapters make of trained pieces, such as single rows, only then shows that it is trained.
    with torch.enable_grad():
        head = output_head(model)
    both = {"weight": head.weight, "bias": head.bias}
    return {name: whole(x.detach()).cpu().contiguous() for name, x in both.items() if x is not None and x.requires_grad}


def _key(pair: EncodedPair) -> tuple[tuple[int, ...], ...]:
    return tuple(pair.complete_ids), tuple(pair.masked_ids), tuple(pair.response_ids)


def _offsets(pairs: Sequence[EncodedPair]) -> Tensor:
    """int64 [n + 1]: where the response rows of each of n instances begin, and where the last ones end."""
    return torch.tensor([0, *(len(pair.response_ids) for pair in pairs)]).cumsum(0)


def _cut(pairs: Sequence[EncodedPair]) -> list[Sequence[EncodedPair]]:
    """Consecutive parts, equally many for each process, that differ in rows by less than the longest response."""
    offsets = _offsets(pairs)
    rows = int(offsets[-1])
    n = max(-(-rows // (PART_ROWS * world())), bool(pairs)) * world()
    first = torch.searchsorted(offsets[:-1] * n, torch.arange(n) * rows).tolist()
    return [pairs[start:stop] for start, stop in pairwise([*first, len(pairs)])]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        save_file(tensors, partial, {"sha256": _checksum(path, tensors)})
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size = sum(tensor.nbytes for tensor in tensors.values())
        raise OSError(
            f"{path.parent} did not take {path.name}, which needs {size} bytes ({error}); free space there, choose "
            "another output_dir, or halve the teacher with teacher_dtype bfloat16; finished files are used again"
        ) from error
    os.replace(partial, path)


def _open(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(
            f"{path} is missing, though a process has made it; output_dir must be a folder that all machines share"
        )
    tensors, checksum = _map(path)
    if checksum != _checksum(path, tensors):
        raise ValueError(f"{path} is damaged (checksum differs); delete it to make it again")
    # The checksum has read the whole file into memory; a new mapping holds none of it.
    return _map(path)[0]


def _map(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in sorted(file.keys())}, (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to make it again") from error


def _checksum(path: Path, tensors: dict[str, Tensor]) -> str:
    """Of the name, too: a file stands for nothing else than what it was made of."""
    return _hash(path.name, _hash_tensors(sorted(tensors.items())))


def _hash(*values: object) -> str:
    digest = hashlib.sha256(_FORMAT.encode())
    for value in values:
        digest.update(f" {value}".encode())
    return digest.hexdigest()


def _hash_tensors(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
