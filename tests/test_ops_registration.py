"""The operators as torch sees them: schema, fake kernels, autograd, compilation, autocast, repeated runs."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import arrays, attention_inputs, random_parents
from ops_cases import head_inputs, jsd_inputs, targets
from ops_paths import FASTEST
from torch import Tensor

from kpig_fast.ops import linear_jsd, linear_kpig_loss, response_logprob, tree_attention

N, V, D, T = 9, 97, 8, 150
OPS = torch.ops.kpig_fast
TARGET = targets(N, V)
TREE = arrays(random_parents(T, 1))

Call = Callable[..., Tensor]

pytestmark = [
    pytest.mark.usefixtures("path"),
    pytest.mark.parametrize("path", FASTEST, indirect=True, scope="module"),
]


def logprob_arguments() -> list[Tensor]:
    return list(head_inputs(N, V, D, bias=True).values())


def logprob(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return response_logprob(hidden, weight, TARGET, bias=bias, softcap=3.0, logit_scale=0.7)


def jsd_arguments() -> list[Tensor]:
    inputs = jsd_inputs(N, V, D, bias=True)
    return [
        inputs[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight", "temperature", "bias", "ref_bias")
    ]


def jsd(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, t: Tensor, *biases: Tensor) -> Tensor:
    return linear_jsd(hidden, weight, ref_hidden, ref_weight, t, bias=biases[0], ref_bias=biases[1], softcap=3.0)


def loss_arguments() -> list[Tensor]:
    return [*jsd_arguments(), head_inputs(N, V, D, seed=5)["hidden"]]


def loss(
    masked: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, t: Tensor, bias: Tensor, ref_bias: Tensor,
    hidden: Tensor,
) -> Tensor:  # fmt: skip
    out = linear_kpig_loss(
        hidden, TARGET, masked, ref_hidden, t, weight, ref_weight,
        ce_scale=0.1, jsd_scale=0.2, bias=bias, ref_bias=ref_bias, logit_scale=0.7,
    )  # fmt: skip
    return out.loss


def attention_arguments() -> list[Tensor]:
    return list(attention_inputs(T, sinks=True).values())


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    return tree_attention(q, k, v, *TREE, window=9, softcap=2.0, sinks=sinks)


CALLS = [
    pytest.param(logprob, logprob_arguments, id="response_logprob"),
    pytest.param(jsd, jsd_arguments, id="linear_jsd"),
    pytest.param(loss, loss_arguments, id="linear_kpig_loss"),
    pytest.param(attention, attention_arguments, id="tree_attention"),
]


def with_gradients(call: Call, arguments: list[Tensor]) -> list[Tensor]:
    """The output, and the gradient by every argument that gets one."""
    leaves = [x.detach().requires_grad_() for x in arguments]
    out = call(*leaves)
    out.backward(torch.linspace(-1, 2, out.numel()).view(out.shape))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def operators() -> list:
    """Every registered operator, those of the backward passes too, with arguments that require gradients."""
    grad = torch.linspace(-1, 2, N)
    hidden, weight, bias = (x.requires_grad_() for x in logprob_arguments())
    sides = [x.requires_grad_(i != 4) for i, x in enumerate(jsd_arguments())]
    masked, head, ref_hidden, ref_head, t, head_bias, _ = sides
    q, k, v, sinks = (x.requires_grad_() for x in attention_arguments())
    plain = [x.detach() for x in (hidden, weight, q, k, v)]
    lse_of_queries = torch.full(q.shape[:2], 3.0)
    rows = (hidden, TARGET, masked, ref_hidden.detach(), t, head, ref_head.detach(), head_bias, None)
    return [
        (OPS.response_logprob, (hidden, weight, TARGET, bias, 3.0, 0.7)),
        (OPS.response_logprob_backward, (grad, *plain[:2], TARGET, None, None, 1.0, True, False)),
        (OPS.linear_jsd, (*sides, None, 0.7)),
        (OPS.linear_jsd_backward, (grad, *(x.detach() for x in sides), 3.0, 1.0, True, True)),
        (OPS.linear_kpig_loss, (*rows, 3.0, 1.0, 0.1, 0.2, True, True, True)),
        (OPS.tree_attention, (q, k, v, *TREE, 0.3, 9, 2.0, sinks)),
        (OPS.tree_attention_backward, (*plain[2:3], *plain[2:], plain[2], lse_of_queries, *TREE, 0.3, None, None)),
    ]


@pytest.mark.parametrize("index", range(7))
def test_opcheck(index: int) -> None:
    operator, arguments = operators()[index]
    torch.library.opcheck(operator.default, arguments)


def test_every_operator_is_checked() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("kpig_fast::")
    }
    assert {str(operator).split(".")[-1] for operator, _ in operators()} == registered


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_compiled_gives_the_same(call: Call, arguments: Callable[[], list[Tensor]], backend: str) -> None:
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for found, expected in zip(with_gradients(compiled, arguments()), with_gradients(call, arguments()), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_repeated_runs_give_the_same_bits(call: Call, arguments: Callable[[], list[Tensor]]) -> None:
    first = with_gradients(call, arguments())
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(call, arguments()), strict=True))


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_autocast_does_not_lower_the_precision(call: Call, arguments: Callable[[], list[Tensor]]) -> None:
    expected = with_gradients(call, arguments())
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(call, arguments())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_inference_mode(call: Call, arguments: Callable[[], list[Tensor]]) -> None:
    with torch.inference_mode():
        found = call(*arguments())
    assert torch.equal(found, call(*arguments()))


@pytest.mark.parametrize(("call", "arguments"), CALLS)
def test_no_second_derivative_rather_than_a_wrong_one(call: Call, arguments: Callable[[], list[Tensor]]) -> None:
    leaves = [x.requires_grad_() for x in arguments()]
    (first,) = torch.autograd.grad(call(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula was registered|does not require grad"):
        first.sum().backward()
