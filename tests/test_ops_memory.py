"""No operator ever holds a [N, V] or a [T, T] buffer: every allocation is recorded, in both directions."""

from collections.abc import Callable

import pytest
from attention_cases import arrays, attention_inputs
from ops_cases import head_inputs, jsd_inputs, ops_module, run, targets, upstream
from ops_paths import FASTEST
from torch.profiler import ProfilerActivity, profile

from kpig_fast.ops import linear_jsd, linear_kpig_loss, response_logprob, tree_attention

N, V, D = 300, 2000, 16
FLOAT = 4
WEIGHT = V * D * FLOAT
TILE = 32 * 128 * FLOAT
CHUNK = 80_000 * FLOAT
SWEEP = V * FLOAT
# Gradients of both sides' hidden states, and vectors over the rows.
ROWS = (2 * N * D + 16 * N) * FLOAT

pytestmark = [
    pytest.mark.usefixtures("path"),
    pytest.mark.parametrize("path", FASTEST, indirect=True, scope="module"),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 × 128, chunks of 40 rows (divergence: 20), sweeps of 1."""
    monkeypatch.setattr(ops_module("response_logprob"), "CPU_TILE", (32, 128))
    monkeypatch.setattr(ops_module("head"), "CHUNK_ELEMENTS", CHUNK // FLOAT)
    monkeypatch.setattr(ops_module("rows_torch"), "SWEEP_ELEMENTS", V)


def allocations(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest tensor that ``call`` allocates, and of all that it holds at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return max(event.nbytes() for event in events), peak


def test_the_recorder_sees_what_operators_allocate_inside() -> None:
    inputs = head_inputs(N, V, D)
    largest, peak = allocations(lambda: (inputs["hidden"] @ inputs["weight"].t()).logsumexp(-1))
    assert largest == N * V * FLOAT
    assert peak >= 2 * N * V * FLOAT


def test_scoring() -> None:
    inputs, target = head_inputs(N, V, D), targets(N, V)
    largest, peak = allocations(lambda: response_logprob(**inputs, target=target))
    assert largest == TILE
    assert peak <= 2 * TILE + 16 * N * FLOAT


def test_log_prob_training() -> None:
    inputs, target, grad = head_inputs(N, V, D), targets(N, V), upstream(N)
    largest, peak = allocations(lambda: run(response_logprob, inputs, grad, ["hidden", "weight"], target=target))
    assert largest == CHUNK
    assert peak <= CHUNK + WEIGHT + 4 * SWEEP + ROWS
    largest, peak = allocations(lambda: run(response_logprob, inputs, grad, ["hidden"], target=target))
    assert peak <= CHUNK + 4 * SWEEP + ROWS


@pytest.mark.parametrize("wanted", [[], ["hidden"], ["hidden", "weight"]], ids=str)
def test_divergence(wanted: list[str]) -> None:
    inputs, grad = jsd_inputs(N, V, D), upstream(N)

    def call() -> object:
        return run(linear_jsd, inputs, grad, wanted) if wanted else linear_jsd(**inputs)

    largest, peak = allocations(call)
    # Two heads' logits share a chunk.
    assert largest == CHUNK
    assert peak <= CHUNK + WEIGHT * ("weight" in wanted) + 8 * SWEEP + ROWS


@pytest.mark.parametrize("wanted", [[], ["hidden"], ["hidden", "weight"]], ids=str)
def test_loss(wanted: list[str]) -> None:
    inputs = {name: x.requires_grad_(name in wanted) for name, x in jsd_inputs(N, V, D).items()}
    masked, target = inputs["hidden"].flip(0), targets(N, V)

    def call() -> None:
        out = linear_kpig_loss(**inputs, masked_hidden=masked, target=target, ce_scale=0.1, jsd_scale=0.1)
        if wanted:
            out.loss.backward()

    largest, peak = allocations(call)
    assert largest == CHUNK
    # The weight's gradient is formed in the forward pass and scaled in the backward pass.
    assert peak <= CHUNK + 2 * WEIGHT * ("weight" in wanted) + 8 * SWEEP + 2 * ROWS


@pytest.mark.parametrize("train", [False, True])
def test_tree_attention(train: bool, path: str) -> None:
    # A prompt of 100 tokens with 38 responses of 50 tokens each.
    tokens, block = 2000, ops_module("attention_torch").BLOCK
    parents = [token - 1 if token < 100 or token % 50 else 99 for token in range(tokens)]
    ends, depths = arrays(parents)
    assert int(depths.max()) == 149
    q, k, v = (x.requires_grad_(train) for x in attention_inputs(tokens, heads=2, kv_heads=1, d=16, dv=16).values())

    def call() -> None:
        out = tree_attention(q, k, v, ends, depths)
        if train:
            out.sum().backward()

    largest, peak = allocations(call)
    one_head = tokens * 16 * FLOAT
    # Kernels hold scores outside of tensors, and gradients of keys and values in pieces that are added up at the end.
    scores = 2 * block * (150 + block) * FLOAT if path == "torch" else 0
    pieces = ops_module("attention_cpu").PIECES if train and path != "torch" else 0
    assert largest <= max(scores, 2 * one_head, pieces * one_head)
    assert peak <= 3 * scores + (16 + 2 * pieces) * one_head
    assert peak < tokens * tokens * FLOAT / 2
