"""Operators on any device against float64 on the CPU, and against plain PyTorch on the same device."""

from collections.abc import Callable

import torch
from attention_cases import arrays
from attention_cases import upstream as attention_upstream
from ops_cases import run, widened
from torch import Tensor

from kpig_fast.method.objective import jsd_bits
from kpig_fast.ops.reference import IGNORE, logits_reference

Results = dict[str, Tensor]
# These keep their dtype where the others are rounded to half precision.
EXACT = {"temperature", "target"}


def on(device: str, dtype: torch.dtype, inputs: Results) -> Results:
    """The same inputs on ``device``, in ``dtype`` but for those that are no factors of a product."""
    return {name: x.to(device) if name in EXACT else x.to(device, dtype) for name, x in inputs.items()}


def exact_inputs(dtype: torch.dtype, inputs: Results) -> Results:
    """What ``inputs`` are in ``dtype``, in float64 on the CPU."""
    rounded = on("cpu", dtype, inputs)
    target = {name: rounded.pop(name) for name in ("target",) if name in rounded}
    return widened(rounded) | target


def plain_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """What people write: logits in the dtype of the model, their log-softmax in float32."""
    log_probs = logits_reference(hidden, weight, bias, softcap, logit_scale).float().log_softmax(-1)
    return log_probs.gather(1, target.clamp(min=0)[:, None])[:, 0].masked_fill(target == IGNORE, 0)


def plain_jsd(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, temperature: Tensor, *,
    bias: Tensor | None = None, ref_bias: Tensor | None = None, softcap: float | None = None, logit_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The same of the divergence."""
    z = logits_reference(hidden, weight, bias, softcap, logit_scale).float()
    r = logits_reference(ref_hidden, ref_weight, ref_bias, softcap, logit_scale).float()
    return jsd_bits(z, r, temperature)


def assert_as_exact(found: Results, own: Results, exact: Results) -> None:
    """Errors at most twice those of plain PyTorch on the same device; three times for gradients in float32.

    The floor is two roundings of the largest entry: plain PyTorch is now and then right by luck.
    """
    assert set(found) == set(exact)
    for name, truth in exact.items():
        x = found[name].cpu()
        assert x.shape == truth.shape
        assert torch.isfinite(x).all(), name
        if truth.numel():
            times = 3 if x.dtype == torch.float32 and name != "out" else 2
            allowed = times * float((own[name].cpu() - truth).abs().max())
            allowed += 2 * torch.finfo(x.dtype).eps * float(truth.abs().max())
            assert float((x - truth).abs().max()) <= allowed, name


def assert_head(
    op: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Results,
    wanted: list[str],
    device: str,
    dtype: torch.dtype,
    **options: float,
) -> None:
    """An operator over the vocabulary with a non-uniform upstream gradient."""
    n = len(inputs["hidden"])
    grad = torch.arange(n, dtype=torch.float32) * 0.7 - 1.4
    exact = run(reference, exact_inputs(dtype, inputs), grad, wanted, **options)
    own, found = (run(f, on(device, dtype, inputs), grad.to(device), wanted, **options) for f in (plain, op))
    assert found["out"].dtype == torch.float32
    assert_as_exact(found, own, exact)


def attend(
    function: Callable[..., Tensor], inputs: Results, parents: list[int], device: str, **options: float
) -> Results:
    """Output and all gradients of attention on the tree, wherever the inputs are."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    ends, depths = (x.to(device) for x in arrays(parents))
    q, k, v = (leaves[name] for name in "qkv")
    out = function(q, k, v, ends, depths, sinks=leaves.get("sinks"), **options)
    out.backward(attention_upstream(out.cpu()).to(device))
    return {"out": out.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def gradients(call: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    """The output, and the gradient by every floating argument that gets one."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
    out = call(*leaves)
    out.backward(torch.linspace(-1, 2, out.numel(), device=out.device).view(out.shape).to(out.dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
