"""The same bits in every run: repeated, on any number of threads, from several Python threads, beside other rows."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from attention_cases import attention_inputs, random_parents, run
from ops_cases import head_inputs, targets, upstream
from torch import Tensor

from kpig_fast.ops import response_logprob, rows_cpu, tree_attention

N, V = 130, 1003

pytestmark = pytest.mark.usefixtures("isa")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """Whatever a test sets the number of threads to."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logprob(rows: slice) -> list[Tensor]:
    """Results and gradients of a row pass over some of the same rows."""
    z, out = 3 * normal(N, V, seed=1)[rows], torch.empty(N)[rows]
    head = (normal(V, seed=2), 3.0, 0.7)
    rows_cpu.logprob(z, targets(N, V)[rows], head, out, (upstream(N)[rows], z))
    return [out, z]


def jsd(rows: slice) -> list[Tensor]:
    z, r, out = 3 * normal(N, V, seed=1)[rows], 3 * normal(N, V, seed=2)[rows], torch.empty(N)[rows]
    t = torch.linspace(0.5, 2, N)[rows]
    rows_cpu.jsd(z, (normal(V, seed=3), 3.0, 0.7), r, (None, None, 1.0), t, out, (upstream(N)[rows], z))
    return [out, z]


def score(rows: slice) -> list[Tensor]:
    state = [normal(N, seed=seed)[rows].abs() for seed in (1, 2, 3)]
    rows_cpu.score_tile(3 * normal(N, V, seed=4)[rows], 5, targets(N, V)[rows], (None, 3.0, 0.7), *state)
    return state


QKV = attention_inputs(300, heads=2, kv_heads=1, d=16, dv=16, sinks=True)
PARENTS = random_parents(300, 2, jumps=0.02)


def attention() -> list[Tensor]:
    return list(run(tree_attention, QKV, PARENTS, torch.float32, window=150).values())


ROW_PASSES = [logprob, jsd, score]
CALLS = {
    "logprob": lambda: logprob(slice(None)),
    "jsd": lambda: jsd(slice(None)),
    "score_tile": lambda: score(slice(None)),
    "tree_attention": attention,
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_call
def test_a_hundred_runs(call: Callable[[], list[Tensor]]) -> None:
    torch.set_num_threads(2)
    first = call()
    assert all(same(call(), first) for _ in range(100))


@every_call
def test_any_number_of_threads(call: Callable[[], list[Tensor]]) -> None:
    torch.set_num_threads(1)
    alone = call()
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert all(same(call(), alone) for _ in range(5))


@every_call
def test_called_from_several_python_threads(call: Callable[[], list[Tensor]]) -> None:
    torch.set_num_threads(2)
    alone = call()
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(call) for _ in range(16)]
    assert all(same(result.result(), alone) for result in results)


def test_python_goes_on_while_a_kernel_runs() -> None:
    # With the lock held, the other thread could look only before and after the kernel.
    torch.set_num_threads(1)
    z, target, out = normal(2000, 4000, seed=1), targets(2000, 4000), torch.empty(2000)
    inside, done, seen = threading.Event(), threading.Event(), []

    def look() -> None:
        while not done.is_set():
            seen.append(inside.is_set())
            time.sleep(0)

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        for _ in range(5):
            inside.set()
            rows_cpu.logprob(z, target, (None, 3.0, 1.0), out, None)
            inside.clear()
        done.set()
        looking.result()
    assert sum(seen) > 100


@pytest.mark.parametrize("row_pass", ROW_PASSES)
def test_a_row_does_not_know_of_the_others(row_pass: Callable[[slice], list[Tensor]]) -> None:
    together = row_pass(slice(None))
    for rows in (slice(0, 1), slice(64, 65), slice(N - 1, N), slice(17, 91)):
        assert same(row_pass(rows), [x[rows] for x in together])


def test_a_row_of_an_operator_differs_by_rounding_only() -> None:
    inputs, target = head_inputs(64, V, 33), targets(64, V, ignored=False)
    together = response_logprob(**inputs, target=target)
    for row in (0, 31, 63):
        alone = response_logprob(inputs["hidden"][row : row + 1], inputs["weight"], target[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])
