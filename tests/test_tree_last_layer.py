"""In the last layer only rows that are read reach the feed-forward network, and nothing that is read changes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import (
    SUPPORTED,
    Branches,
    gradients,
    loss_of,
    make_branches,
    make_model,
    run_together,
    worst_gradient_error,
)
from torch import Tensor, nn

from kpig_fast.tree import last_layer
from kpig_fast.tree.layout import build
from kpig_fast.tree.model import run_tree, tree_mode

BRANCHES = make_branches()
TREE = build(BRANCHES.sequences, BRANCHES.starts)
READ = len(TREE.rows.unique())

# Norms and rotations are float32 inside a float64 model too.
NEARLY_EXACT = 1e-6


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows came back from every module that was given fewer."""
    rows: list[int] = []
    own = last_layer._Narrowing._widen

    def counted(self: last_layer._Narrowing, x: object) -> object:
        out = own(self, x)
        if out is not x:
            assert isinstance(x, Tensor)
            rows.append(x.shape[-2])
        return out

    monkeypatch.setattr(last_layer._Narrowing, "_widen", counted)
    return rows


@contextmanager
def every_row(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The model computes what no one reads, too."""
    with monkeypatch.context() as patch:
        patch.setattr(last_layer, "_last_layer", lambda lm: None)
        yield


def outcome(model: nn.Module, branches: Branches = BRANCHES) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs of all branches, and the gradients of their loss."""
    with tree_mode(model):
        log_probs = run_together(model, branches)
        loss_of(log_probs, branches).backward()
    return log_probs.detach(), gradients(model)


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_leaves_out_rows(family: str, widened: list[int]) -> None:
    assert len(TREE) > READ
    model = make_model(family)
    with tree_mode(model), torch.no_grad():
        run_tree(model, TREE, lambda hidden, head: None)
    assert widened
    assert set(widened) == {READ}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "cohere"])
def test_nothing_that_is_read_changes(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(family, dtype=torch.float64)
    log_probs, by = outcome(model)
    with every_row(monkeypatch):
        all_log_probs, all_by = outcome(model)
    torch.testing.assert_close(log_probs, all_log_probs, rtol=NEARLY_EXACT, atol=NEARLY_EXACT)
    assert worst_gradient_error(by, all_by) <= NEARLY_EXACT


def test_checkpointing_runs_the_layer_again_with_the_rows_of_its_own_tree() -> None:
    model = make_model("llama", dtype=torch.float64)
    other = make_branches(seed=1)
    expected = [outcome(model, branches)[1] for branches in (BRANCHES, other)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with tree_mode(model):
        first = loss_of(run_together(model, BRANCHES), BRANCHES)
        second = loss_of(run_together(model, other), other)
        first.backward()
        found = [gradients(model)]
        second.backward()
        found.append(gradients(model))
    assert max(map(worst_gradient_error, found, expected)) <= NEARLY_EXACT


def test_no_hook_stays() -> None:
    model = make_model("llama")
    with tree_mode(model):
        assert any(module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_a_model_whose_layers_are_not_found_computes_every_row(widened: list[int]) -> None:
    model = make_model("llama")
    expected, _ = outcome(model)
    model.config.num_hidden_layers = 7
    widened.clear()
    torch.testing.assert_close(outcome(model)[0], expected)
    assert not widened
