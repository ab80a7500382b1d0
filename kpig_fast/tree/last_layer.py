"""The last layer's feed-forward network, computed only for the rows that are read.

After the last attention no row meets another, and of a tree only the rows that predict response tokens are read:
a small share of all. What the network would have given for the others becomes 0.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from kpig_fast.tree.attention import ROWS, SUBTREE_END

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def only_rows_read(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, a forward pass with tree arguments computes the last feed-forward network for their rows alone."""
    handles = []
    layer = _last_layer(lm)
    if layer is not None:
        narrowing = _Narrowing()
        handles += [layer.register_forward_pre_hook(narrowing.forget), layer.register_forward_hook(narrowing.forget)]
        for module in layer.children():
            # Norms cost less than picking rows for them.
            if any(parameter.dim() > 1 for parameter in module.parameters()):
                handles.append(module.register_forward_pre_hook(narrowing.narrow, with_kwargs=True))
                handles.append(module.register_forward_hook(narrowing.widen))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_layer(lm: PreTrainedModel) -> nn.Module | None:
    count = lm.config.get_text_config().num_hidden_layers
    lists = (module for module in lm.base_model.modules() if isinstance(module, nn.ModuleList))
    return next((layers[-1] for layers in lists if len(layers) == count), None)


class _Narrowing:
    """Hooks of a layer's modules. The attention brings the tree, and not the layer, whose hooks checkpointing skips."""

    tokens: int = 0
    rows: Tensor | tuple[()] = ()

    def forget(self, *_: Any) -> None:
        """Before and after each pass: a module that runs before the attention gets all rows."""
        self.tokens, self.rows = 0, ()

    def narrow(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        """Keep the rows that are read of a module's input; of the attention, note the tree."""
        if SUBTREE_END in kwargs:
            self.tokens, self.rows = len(kwargs[SUBTREE_END]), kwargs[ROWS]
        elif args and self._has(args[0], self.tokens):
            return (args[0].index_select(-2, self.rows), *args[1:]), kwargs
        return None

    def widen(self, _: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        """Give what a narrowed module returns its place among all rows."""
        if not args or not self._has(args[0], len(self.rows)):
            return out
        return tree_map(self._widen, out)

    def _widen(self, x: Any) -> Any:
        if not self._has(x, len(self.rows)):
            return x
        return x.new_zeros(*x.shape[:-2], self.tokens, x.shape[-1]).index_copy(-2, self.rows, x)

    def _has(self, x: Any, rows: int) -> bool:
        return isinstance(x, Tensor) and x.dim() > 1 and x.shape[-2] == rows
