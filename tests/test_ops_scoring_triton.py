"""The fused scoring kernel, interpreted on the CPU, against float64."""

import math
from types import SimpleNamespace

import pytest
import torch
from ops_cases import TRANSFORMS, head_inputs, targets
from torch import Tensor
from triton_interpreted import touches_only

from kpig_fast.ops.reference import IGNORE, response_logprob_reference

triton = pytest.importorskip("triton")
scoring_triton = pytest.importorskip("kpig_fast.ops.scoring_triton")

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def interpreted() -> None:
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")


def half_inputs(
    n: int, v: int, d: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Hidden [n, d] and weight [v, d] in half precision, perhaps a bias [v] in float32."""
    return {name: x if name == "bias" else x.to(dtype) for name, x in head_inputs(n, v, d, bias=bias).items()}


def state(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, softcap: float | None = None,
    logit_scale: float = 1.0, processors: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Largest logit, sum and target's logit of each row, written over NaN."""
    top, total, picked = (torch.full((len(hidden),), math.nan) for _ in range(3))
    transform = (bias, softcap, logit_scale)
    scoring_triton.score(hidden, weight, target, transform, top, total, picked, processors=processors)
    return top, total, picked


def log_probs(hidden: Tensor, weight: Tensor, target: Tensor, **options) -> Tensor:
    top, total, picked = state(hidden, weight, target, **options)
    return torch.where(target == IGNORE, 0, (picked - top) - total.log())


def assert_exact(inputs: dict[str, Tensor], target: Tensor, processors: int = 1, **transform: float) -> None:
    """Errs at most twice as far from float64 as plain PyTorch in float32, up to two roundings of the largest entry."""
    wide, single = ({name: x.to(dtype) for name, x in inputs.items()} for dtype in (torch.float64, torch.float32))
    exact = response_logprob_reference(**wide, target=target, **transform)
    own = response_logprob_reference(**single, target=target, **transform)
    found = log_probs(**inputs, target=target, processors=processors, **transform)
    assert found.dtype == torch.float32
    if len(target):
        allowed = 2 * float((own - exact).abs().max()) + 2 * 2**-23 * float(exact.abs().max())
        assert float((found - exact).abs().max()) <= allowed


@pytest.mark.parametrize(
    ("n", "v", "d"),
    [(0, 97, 65), (1, 1, 1), (1, 97, 65), (63, 97, 64), (129, 128, 96), (130, 1003, 65)],
)
def test_log_probs(n: int, v: int, d: int) -> None:
    assert_exact(half_inputs(n, v, d), targets(n, v, ignored=n > 2))


def test_real_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    # The interpreter works on the rows that fill a block up, too.
    monkeypatch.setattr(scoring_triton, "BLOCK_M", 16)
    assert_exact(half_inputs(3, 32001, 16), targets(3, 32001))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_heads(bias: bool, transform: dict[str, float]) -> None:
    assert_exact(half_inputs(20, 300, 65, bias=bias), targets(20, 300), **transform)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_types(dtype: torch.dtype) -> None:
    assert_exact(half_inputs(20, 300, 896, dtype=dtype), targets(20, 300))


@pytest.mark.parametrize("processors", [1, 2, 132])
def test_shares_of_the_vocabulary(processors: int) -> None:
    inputs, target = half_inputs(12, 1300, 32), torch.arange(12) * 118
    target[-1] = 1299
    assert_exact(inputs, target, processors=processors)


@pytest.mark.parametrize(
    ("rows", "columns", "processors", "expected"),
    [
        # Qwen2.5-0.5B on an H200: 1187 tiles of 128 columns; 33 programs for each of 32 blocks of rows.
        (4096, 151936, 132, (36, 33)),
        # Few rows: a tile for each program. Very many rows: the whole vocabulary for each, or half of it.
        (1, 151936, 132, (2, 594)),
        (10**6, 151936, 132, (1187, 1)),
        (128 * 1000, 151936, 132, (594, 2)),
        (1, 1, 132, (1, 1)),
    ],
)
def test_how_the_work_is_shared(rows: int, columns: int, processors: int, expected: tuple[int, int]) -> None:
    share, splits = scoring_triton.shares(rows, columns, processors)
    assert (share, splits) == expected
    tiles = triton.cdiv(columns, scoring_triton.BLOCK_N)
    assert (splits - 1) * share < tiles <= splits * share


def test_state_of_each_row() -> None:
    inputs, target = half_inputs(9, 300, 65), targets(9, 300)
    logits = inputs["hidden"].double() @ inputs["weight"].double().T
    top, total, picked = state(**inputs, target=target, processors=2)
    torch.testing.assert_close(top.double(), logits.amax(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total.double(), (logits - logits.amax(1)[:, None]).exp().sum(1), rtol=2e-6, atol=0)
    expected = torch.where(target == IGNORE, 0, logits.gather(1, target.clamp(min=0)[:, None])[:, 0])
    torch.testing.assert_close(picked.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(picked[target == IGNORE], torch.zeros(int((target == IGNORE).sum())))


@pytest.mark.parametrize("d", [64, 65])
def test_nothing_beyond_the_inputs_is_read_or_written(d: int) -> None:
    inputs, target = half_inputs(20, 150, d, bias=True), targets(20, 150)

    def banded(x: Tensor, fill: float = math.nan) -> tuple[Tensor, Tensor]:
        """A copy of ``x`` inside of a larger buffer, and the buffer."""
        buffer = torch.full([size + 40 for size in x.shape], fill, dtype=x.dtype)
        inside = buffer[tuple(slice(20, 20 + size) for size in x.shape)]
        return inside.copy_(x), buffer

    given = {name: banded(x)[0] for name, x in inputs.items()}
    results, buffers = zip(*(banded(torch.full((20,), math.nan), 7.0) for _ in range(3)))
    transform = (given["bias"], None, 1.0)
    aim = banded(target.double(), 1.0)[0].long()
    with touches_only(*given.values(), aim, stores=False):
        scoring_triton.score(given["hidden"], given["weight"], aim, transform, *results, processors=1)
    for found, expected, buffer in zip(results, state(**inputs, target=target), buffers):
        assert torch.equal(found, expected)
        assert torch.isfinite(expected).all()
        assert int((buffer == 7).sum()) >= 40


def test_columns_that_do_not_lie_side_by_side() -> None:
    inputs, target = half_inputs(5, 97, 33), targets(5, 97)
    turned = {name: x.T.contiguous().T for name, x in inputs.items()}
    assert all(x.stride(1) != 1 for x in turned.values())
    assert torch.equal(log_probs(**turned, target=target), log_probs(**inputs, target=target))


def test_a_bias_may_rule_a_whole_tile_out() -> None:
    inputs, target = half_inputs(6, 300, 32, bias=True), torch.arange(140, 146)
    inputs["bias"][:130] = -math.inf
    assert_exact(inputs, target, processors=1)
    assert torch.isfinite(log_probs(**inputs, target=target)).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_row_that_is_not_a_number_stays_visible() -> None:
    inputs, target = half_inputs(6, 300, 32), torch.arange(6)
    inputs["hidden"][2, 3] = math.nan
    assert log_probs(**inputs, target=target).isnan().tolist() == [row == 2 for row in range(6)]


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits(size: float) -> None:
    inputs, target = half_inputs(9, 300, 16), targets(9, 300)
    inputs["hidden"] *= size
    assert torch.isfinite(log_probs(**inputs, target=target)).all()
    assert_exact(inputs, target)


def test_repeated_runs_give_the_same_bits() -> None:
    inputs, target = half_inputs(40, 700, 65, bias=True), targets(40, 700)
    first, again = (state(**inputs, target=target, softcap=3.0, processors=2) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, again))


@pytest.mark.parametrize(
    ("device", "dtype", "weight_dtype", "d", "expected"),
    [
        ("cuda", torch.bfloat16, torch.bfloat16, 1024, True),
        ("cuda", torch.float16, torch.float16, 65, True),
        ("cuda", torch.bfloat16, torch.bfloat16, 1025, False),
        ("cuda", torch.float32, torch.float32, 64, False),
        ("cuda", torch.bfloat16, torch.float32, 64, False),
        ("cpu", torch.bfloat16, torch.bfloat16, 64, False),
    ],
)
def test_what_is_taken(device: str, dtype: torch.dtype, weight_dtype: torch.dtype, d: int, expected: bool) -> None:
    hidden = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(7, d))
    weight = SimpleNamespace(device=torch.device(device), dtype=weight_dtype, shape=(97, d))
    assert scoring_triton.takes(hidden, weight) is expected
