"""Hidden states kept in bfloat16: how far the divergence and its gradient move, against bounds and on real tasks.

A number of 8 significant bits is rounded by at most 2^-8 of itself, so a teacher's logit over beta moves by at most
``shift = 2^-8 · |h| @ |W|.T / beta``. All bounds below follow from that one.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from teacher_cases import INSTANCES, make_scorer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kpig_fast import EncodedPair, KeyPartScorer
from kpig_fast.data.natural_instructions import load_natural_instructions
from kpig_fast.data.schema import make_instance
from kpig_fast.method.objective import temperature
from kpig_fast.ops import linear_jsd
from kpig_fast.teacher import Teacher, make_teacher


@dataclass(frozen=True)
class Both:
    """The teacher of one model, kept as it was computed and kept in bfloat16."""

    scorer: KeyPartScorer
    pairs: list[EncodedPair]
    exact: Teacher
    rounded: Teacher

    @property
    def rows(self) -> Tensor:
        return torch.arange(sum(map(len, self.exact.parts)))

    @property
    def head(self) -> Tensor:
        """[V, D]: of the model as it is now."""
        return self.scorer.model.lm_head.weight  # type: ignore[union-attr, return-value]

    @property
    def beta(self) -> Tensor:
        lengths = torch.tensor([len(pair.response_ids) for pair in self.pairs])
        return temperature(self.exact.gain).repeat_interleave(lengths).float()

    @property
    def shift(self) -> Tensor:
        """[M]: how far a logit over beta may move."""
        assert self.exact.weight is not None
        size = self.exact.hidden(self.rows).abs() @ self.exact.weight.abs().T
        return 2**-8 * size.max(1).values / self.beta

    def hidden(self, *, masked: bool) -> Tensor:
        """[M, D]: the model as it is now, its own forward on separate sequences."""
        found = []
        for pair in self.pairs:
            prompt = pair.masked_ids if masked else pair.complete_ids
            ids = torch.tensor([[*prompt, *pair.response_ids]])
            out = self.scorer.model.base_model(input_ids=ids, use_cache=False)  # type: ignore[operator]
            found.append(out.last_hidden_state[0, len(prompt) - 1 : -1])
        return torch.cat(found)

    def divergence(self, teacher: Teacher, hidden: Tensor) -> Tensor:
        """[M] bits, of ``hidden`` under the model's head."""
        assert teacher.weight is not None
        return linear_jsd(hidden, self.head, teacher.hidden(self.rows), teacher.weight, self.beta)

    def cross_entropy(self) -> Tensor:
        logits = self.hidden(masked=False) @ self.head.T
        target = torch.tensor([token for pair in self.pairs for token in pair.response_ids])
        return torch.nn.functional.cross_entropy(logits, target)

    def gradient(self, loss: Tensor) -> Tensor:
        """Of all parameters, as one vector."""
        gradients = torch.autograd.grad(loss, list(self.scorer.model.parameters()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def train(self, steps: int) -> None:
        """As the trainer does by default, on the complete instances alone."""
        optimizer = torch.optim.AdamW(self.scorer.model.parameters(), lr=2e-5)
        for _ in range(steps):
            optimizer.zero_grad()
            self.cross_entropy().backward()
            optimizer.step()


def keep_both(folder: Path, scorer: KeyPartScorer, pairs: list[EncodedPair]) -> Both:
    exact, rounded = (make_teacher(folder, scorer, pairs, dtype=dtype) for dtype in (None, torch.bfloat16))
    return Both(scorer, pairs, exact, rounded)


@pytest.fixture
def small(tmp_path: Path) -> Both:
    scorer = make_scorer()
    return keep_both(tmp_path, scorer, scorer.encoder.encode_all(INSTANCES))


@pytest.fixture
def real(shared: Path, tmp_path: Path) -> Both:
    """38 instances of real tasks."""
    data, folder = shared / "data" / "sni_core", shared / "models" / "stories260K-sni"
    collection, _ = load_natural_instructions(data / "tasks", side_file=data / "manifest.json")
    rows = [row for row in collection.rows if row.split == "train"][::120]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scorer = KeyPartScorer(model, AutoTokenizer.from_pretrained(folder))
    pairs = scorer.encoder.encode_all([make_instance(collection.tasks[row.task], row) for row in rows])
    pairs = [pair for pair in pairs if len(pair.complete_ids) + len(pair.response_ids) < 400]
    assert len(pairs) == 38
    return keep_both(tmp_path, scorer, pairs)


@pytest.fixture(params=["small", "real"])
def both(request: pytest.FixtureRequest) -> Both:
    return request.getfixturevalue(request.param)


def test_numbers_are_rounded_to_the_nearest_and_gains_are_not(both: Both) -> None:
    exact, rounded = both.exact.hidden(both.rows), both.rounded.hidden(both.rows)
    assert rounded.dtype == torch.bfloat16
    assert torch.all((rounded - exact).abs() <= 2**-8 * exact.abs())
    assert not torch.equal(rounded.float(), exact)
    assert torch.equal(both.rounded.gain, both.exact.gain)
    assert torch.equal(both.rounded.weight, both.exact.weight)  # type: ignore[arg-type]


def test_files_are_half_as_large(real: Both, tmp_path: Path) -> None:
    small, large = sorted(path.stat().st_size for path in tmp_path.glob("part-*"))
    numbers = real.exact.parts[0].numel()
    assert large - small == pytest.approx(2 * numbers, abs=16)
    assert small < 1.1 * 2 * numbers


def test_the_first_divergence_is_nearly_nothing(both: Both) -> None:
    """With r the log-ratio of two distributions, JSD <= (E_q r - E_p r) / 4 <= shift^2 / 4 nats."""
    hidden = both.hidden(masked=True).detach()
    found = both.divergence(both.rounded, hidden)
    assert torch.all(found <= both.shift**2 / (4 * math.log(2)) + 1e-9)
    assert float(found.detach().mean()) > 1e2 * float(both.divergence(both.exact, hidden).detach().mean())


def test_divergence_and_gradient_of_a_trained_model_stay_within_bounds(both: Both) -> None:
    both.train(3)
    hidden = both.hidden(masked=True).detach().requires_grad_()
    exact, rounded = both.divergence(both.exact, hidden), both.divergence(both.rounded, hidden)
    # The root of a Jensen-Shannon divergence is a metric: the triangle inequality.
    between = both.shift / (2 * math.log(2) ** 0.5)
    assert torch.all((rounded - exact).abs() <= between * (2 * exact.detach().sqrt() + between) + 1e-7)
    # By a logit: p (log(p/m) - KL) / (2 beta ln 2), where log(p/m) and its mean KL move by 2 shift at most.
    by_hidden = torch.autograd.grad(rounded.sum() - exact.sum(), hidden)[0].norm(dim=1)
    largest = both.head.norm(dim=1).max()
    assert torch.all(by_hidden <= largest * 2 * both.shift / (both.beta * math.log(2)) + 1e-6)


@pytest.mark.slow
def test_the_stated_figures(real: Both) -> None:
    """What the docstring of ``make_teacher`` says, with room of a factor of two to three."""
    for steps, off in ((0, math.inf), (1, 6e-2), (4, 1e-2)):
        real.train(steps)
        hidden = real.hidden(masked=True)
        exact, rounded = (real.divergence(teacher, hidden).mean() for teacher in (real.exact, real.rounded))
        assert abs(float((rounded - exact).detach())) < 2e-6
        error = float(real.gradient(rounded - exact).norm())
        assert error < off * float(real.gradient(exact).norm())
        assert 0.02 * error < 1e-5 * float(real.gradient(real.cross_entropy()).norm())
