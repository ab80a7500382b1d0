"""A model is proved before it is used: a small tree against the same sequences apart, through the model itself."""

import torch
from torch import Tensor, nn

from kpig_fast.ops.reference import logits_reference
from kpig_fast.tree.layout import TokenTree, build
from kpig_fast.tree.model import (
    OutputHead,
    UnsupportedModelError,
    causal_lm,
    evaluation_mode,
    run_tree,
    tree_mode,
)

# Root-mean-square error of the logits, relative to their spread: rounding is far below, a wrong mask far above.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


def prove(model: nn.Module) -> float:
    """Check that ``model`` gives the same logits on a token tree as on separate sequences; leaves it as it was.

    Returns:
        The root-mean-square error of the logits, relative to their spread.

    Raises:
        UnsupportedModelError: it does not, or cannot run on a tree at all; the message names the model type.
    """
    lm = causal_lm(model)
    kind = lm.config.model_type
    if getattr(lm.config.get_text_config(), "attention_chunk_size", None):
        raise UnsupportedModelError(
            f"models of type {kind!r} cut their attention into chunks by position, which a token tree does not know"
        )
    sequences = _branches(lm.config.get_text_config().vocab_size)
    tree = build(sequences, [1] * len(sequences)).to(lm.device)
    with evaluation_mode(model):
        apart = torch.cat([_logits_apart(model, sequences[i], lm.device) for i in tree.sequences.tolist()])
        together, dtype = _logits_together(model, tree, kind)
    error = float((together - apart).square().mean().sqrt() / apart.std())
    if not error <= TOLERANCE.get(dtype, HALF_TOLERANCE):
        raise UnsupportedModelError(
            f"models of type {kind!r} cannot run on a token tree: their logits differ from those of separate "
            f"sequences (relative error {error:.1e}). Some layer mixes tokens outside of transformers' attention "
            "interface, or logits are computed in a way that this version does not know"
        )
    return error


def _branches(vocabulary: int) -> list[list[int]]:
    """A shared start, then three branches of which two share more; the ids spread over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 4, vocabulary, (5, 6), generator=generator).tolist()
    start, both, first, second, third = ids
    return [start + both + first, start + both + second, start + third]


def _logits_apart(model: nn.Module, sequence: list[int], device: torch.device) -> Tensor:
    ids = torch.tensor([sequence], device=device)
    # Not the model inside PEFT: FSDP puts parameters together in the outermost forward.
    return model(input_ids=ids, use_cache=False).logits[0, :-1].double()


def _logits_together(model: nn.Module, tree: TokenTree, kind: str) -> tuple[Tensor, torch.dtype]:
    """The logits, and the dtype they were computed in, which is not always that of the stored weights."""

    def logits(hidden: Tensor, head: OutputHead) -> tuple[Tensor, torch.dtype]:
        rows = hidden[tree.rows].to(head.weight.dtype)
        return logits_reference(rows, head.weight, head.bias, **head.transform).double(), head.weight.dtype

    try:
        with tree_mode(model):
            return run_tree(model, tree, logits)
    except UnsupportedModelError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"models of type {kind!r} cannot run on a token tree: {error}") from error
