"""The heads of the GPU benchmark: training, scoring, and memory against the stated formula.

N complete and N masked rows, D hidden size, V vocabulary. Factors are bf16 on a GPU, all temperatures are 1, which is
all that other heads take.
"""

from collections.abc import Callable

import torch
from baseline_heads_gpu import cross_entropies, divergences, scorers
from bench_gpu_common import MB, Bench, Run, difference
from torch import Tensor

from kpig_fast.ops import linear_kpig_loss, response_logprob
from kpig_fast.ops.head import CHUNK_ELEMENTS, ROW_BYTES, gpu_chunk_elements, round_up
from kpig_fast.ops.reference import linear_jsd_reference, response_logprob_reference

# Factors on the two sums, so that both show in a gradient.
CE_SCALE, JSD_SCALE = 1.0, 2.0
# Of plain PyTorch's float32 gradient, by norm: the rounding of the gradient by a bf16 logit, and of results to bf16.
TOLERANCE = 1e-2
# What a peer's gradient in bf16 may differ from ours: they round logits, too.
PEER_TOLERANCE = 5e-2
# Rows with which ours is compared with plain PyTorch in float32.
CHECKED = 256


class Inputs:
    """Random sides of the loss on one device; logits have a standard deviation of about 2."""

    def __init__(self, bench: Bench, n: int, d: int, v: int, *, frozen: bool) -> None:
        generator = torch.Generator(bench.device).manual_seed(0)

        def normal(rows: int, size: float = 1.0) -> Tensor:
            drawn = torch.randn(rows, d, generator=generator, device=bench.device, dtype=bench.dtype)
            return drawn.mul_(size)

        self.hidden, self.masked = normal(n).requires_grad_(), normal(n).requires_grad_()
        self.ref_hidden = self.masked.detach() + normal(n, 0.3)
        self.weight = normal(v, 2 / d**0.5).requires_grad_(not frozen)
        self.ref_weight = self.weight.detach() + normal(v, 0.2 / d**0.5)
        self.target = torch.randint(v, (n,), generator=generator, device=bench.device)
        self.temperature = torch.ones(n, device=bench.device)

    def gradients(self, loss: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
        """The loss, and its gradients by the hidden states and, if it is trained, by the head."""
        leaves = [*wanted, *([self.weight] if self.weight.requires_grad else [])]
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def ours(self) -> tuple[Tensor, ...]:
        """The whole loss in one operator."""
        out = linear_kpig_loss(
            self.hidden, self.target, self.masked, self.ref_hidden, self.temperature, self.weight, self.ref_weight,
            ce_scale=CE_SCALE, jsd_scale=JSD_SCALE,
        )  # fmt: skip
        return self.gradients(out.loss, self.hidden, self.masked)

    def our_cross_entropy(self) -> tuple[Tensor, ...]:
        """What a peer's cross-entropy has to give."""
        return self.gradients(-response_logprob(self.hidden, self.weight, self.target).sum(), self.hidden)

    def our_divergence(self) -> tuple[Tensor, ...]:
        """What a peer's divergence has to give."""
        out = linear_kpig_loss(
            self.hidden[:0], self.target[:0], self.masked, self.ref_hidden, self.temperature, self.weight,
            self.ref_weight, ce_scale=0.0, jsd_scale=1.0,
        )  # fmt: skip
        return self.gradients(out.loss, self.masked)

    def products(self) -> Run:
        """The matrix products alone that the loss needs: 7, or 5 with a frozen head, into buffers made before."""
        z, dhidden = self.hidden.new_empty(len(self.hidden), len(self.weight)), torch.empty_like(self.hidden)
        trained = self.weight.requires_grad
        dweight = torch.empty_like(self.weight) if trained else None

        @torch.no_grad()
        def run() -> tuple[Tensor, ...]:
            for hidden in (self.hidden, self.masked):
                torch.mm(hidden, self.weight.t(), out=z)
                torch.mm(z, self.weight, out=dhidden)
                if dweight is not None:
                    torch.mm(z.t(), hidden, out=dweight)
            torch.mm(self.ref_hidden, self.ref_weight.t(), out=z)
            return ()

        return run


def check(bench: Bench, d: int, v: int) -> float:
    """Error of our loss and gradients on a few rows against plain PyTorch in float32. Raises ValueError if large."""
    few = Inputs(bench, CHECKED if not bench.quick else 16, d, v, frozen=False)
    leaves = [x.detach().float().requires_grad_() for x in (few.hidden, few.masked, few.weight)]
    hidden, masked, weight = leaves
    log_probs = response_logprob_reference(hidden, weight, few.target)
    sides = masked, weight, few.ref_hidden.float(), few.ref_weight.float(), few.temperature
    loss = JSD_SCALE * linear_jsd_reference(*sides).sum() - CE_SCALE * log_probs.sum()
    error = difference(few.ours(), (loss.detach(), *torch.autograd.grad(loss, leaves)))
    if not error <= TOLERANCE:
        raise ValueError(f"our loss or its gradient is off by {error:.2e}, relative; at most {TOLERANCE} is allowed")
    return error


def training(bench: Bench) -> None:
    """The training loss, forward and backward, with a trained and with a frozen head."""
    n, d, v = bench.pick((4096, 4096, 128256), (32, 64, 1003))
    bench.add("training head", "ours on a few rows", error=check(bench, d, v))
    for frozen, limit in ((False, 40), (True, 29)):
        case = f"training head{', frozen' if frozen else ''}, {n} rows a branch, D {d}, V {v}"
        x = Inputs(bench, n, d, v, frozen=frozen)
        ours = bench.milliseconds(x.ours)
        units = 2 * n * d * v * (5 if frozen else 7)
        bench.add(case, "ours", ms=ours, mb=bench.megabytes(x.ours), tflops=units / ours / 1e9)
        bare = bench.milliseconds(x.products())
        bench.add(case, "its matrix products", ms=bare, tflops=units / bare / 1e9)
        bench.target(case, "ours, ms", ours, at_most=limit)
        best = composition(bench, case, x)
        if best is not None:
            bench.add(case, "best composition of public parts", ms=best)
            bench.target(case, "as fast as the best composition", best / ours, at_least=1.15)


def composition(bench: Bench, case: str, x: Inputs) -> float | None:
    """Milliseconds of the fastest public cross-entropy and the fastest public divergence together."""

    def ce(loss: Callable[..., Tensor]) -> Run:
        return lambda: x.gradients(loss(x.hidden, x.weight, x.target), x.hidden)

    def jsd(loss: Callable[..., Tensor]) -> Run:
        return lambda: x.gradients(loss(x.masked, x.weight, x.ref_hidden, x.ref_weight), x.masked)

    first = {name: ce(loss) for name, loss in cross_entropies().items()}
    second = {name: jsd(loss) for name, loss in divergences().items()}
    times = [
        bench.compare(f"{case}, cross-entropy alone", first, x.our_cross_entropy, PEER_TOLERANCE),
        bench.compare(f"{case}, divergence alone", second, x.our_divergence, PEER_TOLERANCE),
    ]
    return sum(min(part.values()) for part in times) if all(times) else None


@torch.no_grad()
def scoring(bench: Bench) -> None:
    """Log-probs of both branches' rows without a gradient, against a bare matrix product of the same size."""
    for n, d, v in bench.pick([(8192, 4096, 128256), (8192, 896, 151936)], [(32, 64, 1003)]):
        case = f"scoring head, {n} rows, D {d}, V {v}"
        x = Inputs(bench, n, d, v, frozen=True)

        def ours(x: Inputs = x) -> tuple[Tensor, ...]:
            return (response_logprob(x.hidden, x.weight, x.target),)

        few = slice(0, min(n, CHECKED))
        exact = response_logprob_reference(x.hidden[few].float(), x.weight.float(), x.target[few])
        error = difference((ours()[0][few],), (exact,))
        if not error <= TOLERANCE:
            raise ValueError(f"our log-probs are off by {error:.2e}, relative; at most {TOLERANCE} is allowed")
        logits = x.hidden.new_empty(n, v)
        bare = bench.milliseconds(lambda x=x, logits=logits: torch.mm(x.hidden, x.weight.t(), out=logits))
        del logits
        took = bench.milliseconds(ours)
        bench.add(case, "ours", ms=took, mb=bench.megabytes(ours), error=error, tflops=2 * n * d * v / took / 1e9)
        bench.add(case, "a bare matrix product", ms=bare, tflops=2 * n * d * v / bare / 1e9)
        bench.target(case, "share of a bare matrix product's speed", bare / took, at_least=0.9)
        peers = {
            name: lambda score=score, x=x: (score(x.hidden, x.weight, x.target),) for name, score in scorers().items()
        }
        bench.compare(case, peers, ours, PEER_TOLERANCE)


def memory(bench: Bench) -> None:
    """What the training loss needs at its peak, against the formula."""
    for n, d, v in bench.pick([(4096, 4096, 128256), (4096, 896, 151936)], [(32, 64, 1003)]):
        for frozen in (False, True):
            case = f"memory{', frozen' if frozen else ''}, {n} rows a branch, D {d}, V {v}"
            x = Inputs(bench, n, d, v, frozen=frozen)
            stated = stated_bytes(n, n, d, v, frozen=frozen, dtype=bench.dtype, device=bench.device) / MB
            used = bench.megabytes(x.ours)
            bench.add(case, "ours", mb=used, stated_mb=stated)
            if used is not None:
                bench.target(case, "share of the formula", used / stated, at_most=1.05)


def stated_bytes(n: int, m: int, d: int, v: int, *, frozen: bool, dtype: torch.dtype, device: str) -> int:
    """What ``linear_kpig_loss`` may take at its peak for n complete and m masked rows, results included.

    A chunk's logits in float32; the head's gradient in float32, and once more in the head's dtype if that is another;
    those by the hidden states.
    """
    size = dtype.itemsize
    by_head = 0 if frozen else v * d * (4 + (size if size != 4 else 0))
    return 4 * chunk_elements(max((n + 1) // 2, m), v, device) + by_head + (n + m) * d * size


def chunk_elements(pairs: int, v: int, device: str) -> int:
    """Logits of a chunk of at most ``pairs`` rows of both sides."""
    columns, elements = 2 * v, CHUNK_ELEMENTS
    if device == "cuda":
        columns = 2 * round_up(v, ROW_BYTES // 4)
        elements = gpu_chunk_elements(torch.cuda.get_device_properties(device).total_memory // 4, columns)
    return columns * max(1, min(pairs, elements // columns))
