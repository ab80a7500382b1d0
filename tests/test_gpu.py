"""Everything that a CUDA GPU computes; ``pytest -m gpu``. What can run on a CPU runs there, too, to prove the tests."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attention_cases import arrays, attention_inputs, random_parents
from gpu_cases import (
    Results,
    assert_as_exact,
    assert_head,
    attend,
    exact_inputs,
    gradients,
    on,
    plain_jsd,
    plain_logprob,
    same,
)
from ops_cases import head_inputs, jsd_inputs, ops_module, targets
from test_ops_linear_kpig_loss import SCALES, loss_inputs
from test_ops_linear_kpig_loss import reference as exact_loss
from test_ops_linear_kpig_loss import run as run_loss
from torch import Tensor

from kpig_fast.ops import KPIGLoss, linear_jsd, linear_kpig_loss, response_logprob, tree_attention
from kpig_fast.ops.reference import linear_jsd_reference, response_logprob_reference, tree_attention_reference

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from bench_gpu_head import stated_bytes

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [N, V, D] for every device: ragged tails, a row alone. Those for a GPU: real heads, and both sides of the hidden size
# up to which one kernel scores.
SHAPES = [(1, 97, 65), (63, 1003, 64), (5, 32001, 33)]
GPU_SHAPES = [(257, 1003, 1024), (130, 32001, 1032), (33, 128256, 2048), (65, 151936, 896)]
TRANSFORMS = [{}, {"softcap": 2.5, "logit_scale": 1.7}]

devices = pytest.mark.parametrize("device", ["cpu", GPU])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
only_gpu = pytest.mark.parametrize("device", [GPU])


shapes = pytest.mark.parametrize(
    ("device", "shape"),
    [("cpu", shape) for shape in SHAPES]
    + [pytest.param("cuda", shape, marks=GPU.marks) for shape in [*SHAPES, *GPU_SHAPES]],
)


@pytest.fixture(params=["fastest", pytest.param("triton", marks=GPU.marks)])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By which row passes a GPU works: clusters where it has them, or Triton."""
    if request.param == "triton":
        monkeypatch.setattr(ops_module("rows_cuda"), "refusal", lambda z, sides: "the test wants Triton")
    return request.param


@pytest.mark.usefixtures("rows")
@shapes
@dtypes
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_log_probs(device: str, shape: tuple[int, int, int], dtype: torch.dtype, transform: dict) -> None:
    n, v, d = shape
    inputs = head_inputs(n, v, d, bias=bool(transform)) | {"target": targets(n, v)}
    wanted = [name for name in inputs if name != "target"]
    ops = response_logprob, plain_logprob, response_logprob_reference
    assert_head(*ops, inputs, wanted, device, dtype, **transform)
    # Scoring without a gradient is another path.
    with torch.no_grad():
        found, own = (op(**on(device, dtype, inputs), **transform) for op in ops[:2])
        exact = response_logprob_reference(**exact_inputs(dtype, inputs), **transform)
    assert_as_exact({"out": found}, {"out": own}, {"out": exact})
    assert torch.equal(found[::5].cpu(), torch.zeros(len(found[::5])))
    assert float(found.max()) <= 0


@pytest.mark.usefixtures("rows")
@shapes
@dtypes
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_divergences(device: str, shape: tuple[int, int, int], dtype: torch.dtype, transform: dict) -> None:
    inputs, wanted = jsd_inputs(*shape, bias=bool(transform)), ["hidden", "weight"]
    assert_head(linear_jsd, plain_jsd, linear_jsd_reference, inputs, wanted, device, dtype, **transform)


def plain_loss(
    hidden: Tensor, target: Tensor, masked_hidden: Tensor, ref_hidden: Tensor, temperature: Tensor, weight: Tensor,
    ref_weight: Tensor, *, ce_scale: float, jsd_scale: float, bias: Tensor, ref_bias: Tensor,
) -> KPIGLoss:  # fmt: skip
    log_probs = plain_logprob(hidden, weight, target, bias=bias)
    jsd = plain_jsd(masked_hidden, weight, ref_hidden, ref_weight, temperature, bias=bias, ref_bias=ref_bias)
    return KPIGLoss(jsd_scale * jsd.sum() - ce_scale * log_probs.sum(), log_probs, jsd)


@pytest.mark.usefixtures("rows")
@devices
@dtypes
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("n", "m"), [(9, 8), (0, 7), (63, 41)])
def test_loss(device: str, dtype: torch.dtype, frozen: bool, n: int, m: int) -> None:
    inputs = loss_inputs(n, m, v=1003, d=64)
    wanted = ["hidden", "masked_hidden"] if frozen else ["hidden", "masked_hidden", "weight", "bias"]
    exact = run_loss(exact_loss, exact_inputs(dtype, inputs), wanted, grad=-2.5)
    own, found = (run_loss(f, on(device, dtype, inputs), wanted, grad=-2.5) for f in (plain_loss, linear_kpig_loss))
    assert_as_exact(found, own, exact)


ATTENTION = [
    ({"d": 64, "dv": 64, "heads": 14, "kv_heads": 2}, {}),
    ({"d": 80, "dv": 80}, {"softcap": 2.0}),
    ({"d": 96, "dv": 96, "heads": 4, "kv_heads": 4}, {"window": 20}),
    ({"d": 128, "dv": 128, "heads": 8, "kv_heads": 1}, {"window": 40, "softcap": 3.0, "scale": 0.1}),
    ({"d": 256, "dv": 256, "heads": 2, "kv_heads": 1}, {"window": 9, "softcap": 3.0}),
    ({"d": 64, "dv": 64, "sinks": True}, {"window": 17}),
]


@devices
@dtypes
@pytest.mark.parametrize(("size", "options"), ATTENTION, ids=str)
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_attention(device: str, dtype: torch.dtype, size: dict, options: dict, tokens: int) -> None:
    inputs, parents = attention_inputs(tokens, **size), random_parents(tokens, tokens, jumps=0.03)
    exact = attend(tree_attention_reference, exact_inputs(dtype, inputs), parents, "cpu", **options)
    on_device = on(device, dtype, inputs)
    own, found = (attend(f, on_device, parents, device, **options) for f in (tree_attention_reference, tree_attention))
    assert found["out"].dtype == dtype
    if tokens == 1:
        # The gradient by the only key is exactly zero, which rounding of plain PyTorch may miss by less than ours.
        for results in (own, found, exact):
            del results["q"], results["k"]
    assert_as_exact(found, own, exact)


N, V, D = 70, 1003, 64


def calls(device: str, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each operator as a function of tensors with one result, and its arguments."""
    head = on(device, dtype, head_inputs(N, V, D))
    sides, loss = on(device, dtype, jsd_inputs(N, V, D)), on(device, dtype, loss_inputs(N, N - 1, V, D))
    target = targets(N, V).to(device)
    inputs, (ends, depths) = on(device, dtype, attention_inputs(300)), tree(300, device)
    return {
        "response_logprob": (lambda hidden, weight: response_logprob(hidden, weight, target), list(head.values())),
        "linear_jsd": (lambda *x: linear_jsd(**dict(zip(sides, x))), list(sides.values())),
        "linear_kpig_loss": (
            lambda *x: linear_kpig_loss(**dict(zip(loss, x)), **SCALES).loss,
            list(loss.values()),
        ),
        "tree_attention": (lambda *x: tree_attention(*x, ends, depths, window=99), list(inputs.values())),
    }


def tree(tokens: int, device: str) -> tuple[Tensor, ...]:
    """``subtree_end`` and ``position_ids`` of a random forest."""
    return tuple(x.to(device) for x in arrays(random_parents(tokens, 2, jumps=0.02)))


every_call = pytest.mark.parametrize("name", [*calls("cpu", torch.float32)])


@pytest.mark.usefixtures("rows")
@devices
@every_call
def test_repeated_runs_give_the_same_bits(device: str, name: str) -> None:
    call, arguments = calls(device, torch.bfloat16)[name]
    first = gradients(call, arguments)
    assert all(same(gradients(call, arguments), first) for _ in range(50 if device == "cuda" else 2))


@devices
@every_call
def test_compiled_without_a_break_gives_the_same(device: str, name: str) -> None:
    call, arguments = calls(device, torch.bfloat16)[name]
    compiled = torch.compile(call, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert same(gradients(compiled, arguments), gradients(call, arguments))


def replayable(call: Callable[[], list[Tensor]], device: str) -> Callable[[], list[Tensor]]:
    """``call`` as a CUDA graph, which reads its inputs again where they are; itself on a CPU."""
    if device == "cpu":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@pytest.mark.usefixtures("rows")
@devices
@pytest.mark.parametrize("d", [64, 1032])
def test_graph_of_scoring(device: str, d: int) -> None:
    inputs, target = on(device, torch.bfloat16, head_inputs(N, V, d)), targets(N, V).to(device)

    @torch.no_grad()
    def call() -> list[Tensor]:
        return [response_logprob(**inputs, target=target)]

    replay = replayable(call, device)
    for _ in range(2):
        inputs["hidden"].mul_(-0.5)
        target.copy_(target.roll(1))
        assert same(replay(), call())


@pytest.mark.usefixtures("rows")
@devices
def test_graph_of_the_loss(device: str) -> None:
    inputs = on(device, torch.bfloat16, loss_inputs(N, N, V, D))
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "masked_hidden", "weight")]

    def call() -> list[Tensor]:
        out = linear_kpig_loss(**inputs, **SCALES)
        return [out.loss.detach(), out.jsd, *torch.autograd.grad(out.loss, leaves)]

    replay = replayable(call, device)
    for _ in range(2):
        inputs["masked_hidden"].data.mul_(-0.5)
        inputs["temperature"].add_(0.25)
        assert same(replay(), call())


@pytest.mark.parametrize(("device", "other"), [("cpu", "cpu"), pytest.param("cuda:0", "cuda:1", marks=GPU.marks)])
@every_call
def test_tensors_on_another_device_than_the_current_one(device: str, other: str, name: str) -> None:
    if device != "cpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here, there = (gradients(*calls(where, torch.bfloat16)[name]) for where in (device, other))
    assert all(x.device == torch.device(other) for x in there)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))


beyond_32_bits = pytest.mark.parametrize(
    ("device", "n", "v"), [("cpu", 40, 1003), pytest.param("cuda", 14_200, 151_936, marks=GPU.marks)]
)


def needs_memory(gib: int, device: str) -> None:
    """Skip where the GPU has less free memory."""
    if device == "cuda" and torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


@pytest.mark.usefixtures("rows")
@beyond_32_bits
def test_logits_beyond_32_bits(device: str, n: int, v: int) -> None:
    """The last rows of a buffer of more than 2^31 logits are what they are in a buffer of their own."""
    needs_memory(40, device)
    stride, tail, head = -(-v // 64) * 64, slice(n - 8, n), ops_module("head")
    space, own = torch.empty(2, n, stride, device=device), torch.empty(2, 8, stride, device=device)
    generator = torch.Generator(device).manual_seed(0)
    own[:, :, :v].normal_(0, 3, generator=generator)
    space[:, tail] = own
    target, t = targets(n, v, ignored=False).to(device), torch.linspace(0.5, 2, n, device=device)
    upstream, transform = torch.linspace(1, 2, n, device=device), head.Transform(None, None, 1.0)
    z, r = space[0, :, :v], space[1, :, :v]
    space[:, : n - 8].zero_()
    divergence, log_probs = torch.empty(n, device=device), torch.empty(n, device=device)
    for whole, part in ((z, own[0, :, :v]), (r, own[1, :, :v])):
        passes = head.row_passes(whole)
        few = torch.empty(8, device=device)
        # The gradients lie over the logits.
        gradient = part.clone(memory_format=torch.preserve_format)
        passes.logprob(gradient, target[tail], transform, few, (upstream[tail], gradient))
        passes.logprob(whole, target, transform, log_probs, (upstream, whole))
        assert torch.equal(log_probs[tail], few)
        assert torch.equal(whole[tail], gradient)
        whole[tail] = part
    passes, few = head.row_passes(z, 2), torch.empty(8, device=device)
    passes.jsd(z, transform, r, transform, t, divergence, (upstream, z))
    few_z, few_r = own[0, :, :v], own[1, :, :v]
    passes.jsd(few_z, transform, few_r, transform, t[tail], few, (upstream[tail], few_z))
    assert torch.equal(divergence[tail], few)
    assert torch.equal(z[tail], few_z)


@beyond_32_bits
def test_scores_of_more_than_32_bits_of_logits(device: str, n: int, v: int) -> None:
    needs_memory(8, device)
    inputs = on(device, torch.bfloat16, head_inputs(n, v, 16)) | {"target": targets(n, v).to(device)}
    few = inputs | {name: inputs[name][-8:] for name in ("hidden", "target")}
    torch.testing.assert_close(response_logprob(**inputs)[-8:], response_logprob(**few), rtol=1e-6, atol=1e-5)


@only_gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_memory_of_the_loss_is_that_of_the_formula(device: str, frozen: bool) -> None:
    needs_memory(8, device)
    n, m, v, d = 4096, 4000, 32000, 1024
    inputs: Results = {name: x.to(device) for name, x in loss_inputs(n, m, v, d).items() if "bias" not in name}
    inputs = on(device, torch.bfloat16, inputs)
    wanted = ["hidden", "masked_hidden", *([] if frozen else ["weight"])]
    for name in wanted:
        inputs[name].requires_grad_()
    # The first run also makes cuBLAS's workspace.
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_kpig_loss(**inputs, **SCALES).loss.backward()
        used = torch.cuda.max_memory_allocated() - before
        for name in wanted:
            inputs[name].grad = None
    stated = stated_bytes(n, m, d, v, frozen=frozen, dtype=torch.bfloat16, device=device)
    assert used == pytest.approx(stated, rel=0.05)


def test_formula_of_the_memory() -> None:
    # Both sides of 50 rows, and the head's gradient in float32; in bf16 a copy of that, too.
    sizes = 100, 50, 16, 1000
    frozen = stated_bytes(*sizes, frozen=True, dtype=torch.float32, device="cpu")
    assert frozen == 4 * (2 * 50 * 1000 + 150 * 16)
    assert stated_bytes(*sizes, frozen=False, dtype=torch.float32, device="cpu") == frozen + 4 * 16_000
    half = stated_bytes(*sizes, frozen=False, dtype=torch.bfloat16, device="cpu")
    assert half == 4 * 100_000 + 6 * 16_000 + 2 * 150 * 16
