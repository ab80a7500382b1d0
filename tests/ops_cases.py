"""Random inputs for the operators over the vocabulary, and how far from float64 a result may lie."""

import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

# [N, V, D]: no row, one row, ragged tails of rows and vocabulary, hidden size 1, real hidden and vocabulary sizes.
SHAPES = [
    (0, 97, 65),
    (1, 97, 65),
    (63, 97, 65),
    (257, 97, 896),
    (1, 1003, 896),
    (63, 1003, 1),
    (257, 1003, 65),
    (1, 32001, 65),
    (63, 32001, 1),
    (5, 50257, 65),
]
SMALLEST = [(1, 1, 1), (1, 2, 1), (1, 97, 1), (2, 1, 3)]
TRANSFORMS = [{}, {"softcap": 4.0}, {"logit_scale": 0.3}, {"softcap": 2.5, "logit_scale": 1.7}]

Operator = Callable[..., Tensor]
Transform = tuple[Tensor | None, float | None, float]


def ops_module(name: str) -> ModuleType:
    """The module ``kpig_fast.ops.<name>``; its package shows the function of the same name instead."""
    return sys.modules[f"kpig_fast.ops.{name}"]


def head_inputs(n: int, v: int, d: int, *, bias: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """float32 hidden [n, d], weight [v, d] and perhaps bias [v], whose logits have a standard deviation of about 3."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "hidden": torch.randn(n, d, generator=generator),
        "weight": torch.randn(v, d, generator=generator) * 3 / d**0.5,
    }
    return inputs | ({"bias": torch.randn(v, generator=generator)} if bias else {})


def jsd_inputs(n: int, v: int, d: int, *, bias: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Both sides of a divergence, the reference's hidden size one larger, with a temperature for each row."""
    reference = head_inputs(n, v, d + 1, bias=bias, seed=seed + 1)
    temperature = 0.5 + 2 * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    sides = head_inputs(n, v, d, bias=bias, seed=seed) | {f"ref_{name}": x for name, x in reference.items()}
    return sides | {"temperature": temperature}


def targets(n: int, v: int, *, ignored: bool = True) -> Tensor:
    """int64 [n]; the vocabulary's last entry is among them, and every fifth row is left out."""
    target = torch.randint(v, (n,), generator=torch.Generator().manual_seed(7))
    target[: n // 2] = v - 1
    if ignored:
        target[::5] = -100
    return target


def upstream(n: int) -> Tensor:
    """A non-uniform gradient by the output, with a zero and both signs."""
    return torch.arange(n, dtype=torch.float32) * 0.7 - 1.4


def run(op: Operator, inputs: dict[str, Tensor], grad: Tensor, wanted: list[str], **fixed: object) -> dict[str, Tensor]:
    """The output of ``op`` as ``out``, and the gradient by each of the ``wanted`` inputs."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in inputs.items()}
    out = op(**leaves, **fixed)
    out.backward(grad.to(out.dtype))
    return {"out": out.detach()} | {name: leaves[name].grad for name in wanted}


def widened(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same numbers in ``dtype``."""
    return {name: x.to(dtype) for name, x in inputs.items()}


def relative(found: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm of ``exact``."""
    return float((found.double() - exact).norm() / exact.norm())


def assert_exact_in_float64(
    op: Operator, reference: Operator, inputs: dict[str, Tensor], grad: Tensor, wanted: list[str], **fixed: object
) -> None:
    """Output and gradients of float64 inputs equal the reference's up to float64 rounding."""
    exact = run(reference, widened(inputs), grad, wanted, **fixed)
    found = run(op, widened(inputs), grad, wanted, **fixed)
    for name, truth in exact.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(found[name], truth, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: name + text)


def assert_as_exact_as_torch(
    op: Operator, reference: Operator, inputs: dict[str, Tensor], grad: Tensor, wanted: list[str], **fixed: object
) -> None:
    """Error against float64 at most twice (gradients: three times) that of plain PyTorch in float32.

    The floor is two roundings of the largest entry: plain PyTorch is now and then right by luck.
    """
    exact = run(reference, widened(inputs), grad, wanted, **fixed)
    own = run(reference, inputs, grad, wanted, **fixed)
    found = run(op, inputs, grad, wanted, **fixed)
    for name, truth in exact.items():
        assert found[name].shape == truth.shape
        assert found[name].dtype == torch.float32
        if truth.numel():
            allowed = (2 if name == "out" else 3) * float((own[name] - truth).abs().max())
            allowed += 2 * 2**-23 * float(truth.abs().max())
            assert float((found[name] - truth).abs().max()) <= allowed, name
