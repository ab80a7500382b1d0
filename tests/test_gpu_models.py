"""A scorer and a trainer on a CUDA GPU (``pytest -m gpu``) and, to prove the tests, on the CPU."""

from pathlib import Path

import pytest
import torch
from separate import largest_error, score_apart
from test_gpu import GPU
from test_scorer import INSTANCES, TOKENIZER, model
from torch import Tensor
from training_cases import tiny, train

from kpig_fast import GainScores, KeyPartScorer, warmup

devices = pytest.mark.parametrize("device", ["cpu", GPU])


class OnDevice(torch.nn.Module):
    """A model as ``separate`` calls it: token ids and logits on the CPU."""

    def __init__(self, lm: torch.nn.Module) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, **inputs: Tensor) -> object:
        device = next(self.lm.parameters()).device
        out = self.lm(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in inputs.items()})
        out.logits = out.logits.float().cpu()
        return out


def scores(device: str, dtype: torch.dtype) -> tuple[GainScores, GainScores, GainScores]:
    """The scorer's on ``device``, those of the model's own forward there, and exact ones."""
    lm = model(dtype).to(device)
    scorer = KeyPartScorer(lm, TOKENIZER, tail_tol=0.0)
    pairs = scorer.encoder.encode_all(INSTANCES)
    exact = score_apart(model(dtype).double(), pairs)
    return scorer.score(INSTANCES), score_apart(OnDevice(lm), pairs), exact


@devices
def test_scorer_in_float32(device: str) -> None:
    found, _, exact = scores(device, torch.float32)
    assert largest_error(found.complete, exact.complete) <= 2e-5
    assert largest_error(found.masked, exact.masked) <= 2e-5
    assert float((found.gain - exact.gain).abs().max()) <= 1e-5


@devices
def test_scorer_in_bf16(device: str) -> None:
    found, own, exact = scores(device, torch.bfloat16)
    for name in ("complete", "masked"):
        truth = getattr(exact, name)
        assert largest_error(getattr(found, name), truth) <= 2 * largest_error(getattr(own, name), truth)


@devices
def test_training(device: str, tmp_path: Path) -> None:
    lm = tiny().to(device)
    warmup(lm)
    start = {name: x.detach().cpu().clone() for name, x in lm.state_dict().items()}
    found = train(tmp_path / "here", lm, use_cpu=device == "cpu")
    expected = train(tmp_path / "cpu", tiny(dtype=torch.float64))
    assert next(found.model.parameters()).device.type == device
    assert found.step_losses == pytest.approx(expected.step_losses, rel=1e-4)
    for name, x in expected.model.state_dict().items():
        change = float((x - start[name]).norm())
        assert float((found.model.state_dict()[name].cpu() - x).norm()) <= 1e-3 * change + 1e-6
