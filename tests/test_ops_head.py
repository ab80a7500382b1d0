"""What the operators over the vocabulary share, as far as no other test reaches it."""

import pytest
import torch
from ops_cases import ops_module
from torch import Tensor

from kpig_fast.ops import linear_jsd, linear_kpig_loss, response_logprob

head = ops_module("head")
GIB = 2**30


@pytest.mark.parametrize(
    ("memory", "vocabulary", "rows"),
    [
        # 1/16 of 141 GB holds more than 2048 pairs of rows of Llama-3.1-8B, and of 80 GB, too.
        (141 * 10**9, 128256, 8588),
        (80 * GIB, 128256, 5232),
        # On 24 GB a sixteenth does not, an eighth does; on 8 GB not even that.
        (24 * GIB, 128256, 2048),
        (8 * GIB, 128256, 1046),
    ],
)
def test_rows_of_a_chunk_on_a_gpu(memory: int, vocabulary: int, rows: int) -> None:
    columns = 2 * vocabulary
    assert head.gpu_chunk_elements(memory // 4, columns) // columns == rows


def test_round_up() -> None:
    assert [head.round_up(n, 64) for n in (1, 64, 65, 50257)] == [64, 64, 128, 50304]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_gradient_lies_over_its_own_row(dtype: torch.dtype) -> None:
    space = torch.zeros(3, 8)
    whole = head.Head(torch.zeros(5, 2, dtype=dtype), None, None, 1.0, torch.zeros(1, 2))
    whole.weight = whole.weight.to(dtype)
    dz = whole.gradient_of(space[:, :5])
    assert dz.dtype == dtype
    assert dz.shape == (3, 5)
    assert [row.data_ptr() for row in dz] == [row.data_ptr() for row in space]
    dz.fill_(1)
    assert torch.equal(space[:, 3:], torch.zeros(3, 5))


def test_a_weight_of_zero_3_is_refused() -> None:
    hidden, weight, target = torch.zeros(2, 4), torch.nn.Parameter(torch.zeros(0)), torch.zeros(2, dtype=torch.long)
    weight.ds_id = 3  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"ZeRO-3.*GatheredParameters"):
        response_logprob(hidden, weight, target)


def test_a_weight_that_is_sharded_is_refused(sharded: Tensor) -> None:
    hidden, target, t = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), torch.ones(2)
    plain = torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"response_logprob .*DTensor.*full_tensor"):
        response_logprob(hidden, sharded, target)
    with pytest.raises(ValueError, match=r"reference side.*DTensor.*full_tensor"):
        linear_jsd(hidden, plain, hidden, sharded, t)
    with pytest.raises(ValueError, match=r"linear_kpig_loss .*DTensor.*full_tensor"):
        linear_kpig_loss(hidden, target, hidden, hidden, t, sharded, plain, ce_scale=1.0, jsd_scale=1.0)


@pytest.fixture
def sharded(tmp_path) -> Tensor:
    """A weight [6, 4] as FSDP2 leaves it, in a group of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        yield distribute_tensor(torch.zeros(6, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    finally:
        dist.destroy_process_group()
