"""What a launch under DeepSpeed ZeRO-3 is refused before it trains; no DeepSpeed is needed to say so."""

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from training_cases import config, tiny

from kpig_fast.training import placement
from kpig_fast.training.placement import is_partitioned, load_again, shard

ROOT = Path(__file__).resolve().parents[1]


def launched(folder: Path, *, gather: bool = True, partitioned: bool = False, **changes: Any) -> Any:
    """A trainer as ZeRO-3 shows it."""
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gather}
    settings = HfDeepSpeedConfig({"zero_optimization": zero})
    # A Trainer's own settings know it.
    settings.dtype = lambda: torch.bfloat16  # type: ignore[attr-defined]
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, hf_ds_config=settings))
    model = tiny()
    if partitioned:
        model.lm_head.weight.ds_status = "NOT_AVAILABLE"
    accelerator = SimpleNamespace(state=state, device=torch.device("cpu"))
    return SimpleNamespace(model=model, args=config(folder, **changes), accelerator=accelerator)


def test_what_deepspeed_will_train_is_whole_and_in_its_dtype(tmp_path: Path) -> None:
    trainer = launched(tmp_path)
    model = shard(trainer)
    assert model is trainer.model
    assert not is_partitioned(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_model_that_is_in_pieces_must_be_loaded_again(tmp_path: Path) -> None:
    trainer = launched(tmp_path, partitioned=True)
    assert is_partitioned(trainer.model)
    with pytest.raises(ValueError, match=r"taken this model apart.*load it again, before its KPIGConfig"):
        shard(trainer)


def test_evaluation_inside_a_step_is_refused(tmp_path: Path) -> None:
    trainer = launched(tmp_path, eval_strategy="epoch")
    with pytest.raises(ValueError, match=r"eval_strategy is 'epoch'.*fsdp2\.yaml"):
        shard(trainer)


def test_weights_that_would_not_come_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero3_save_16bit_model: true"):
        shard(launched(tmp_path, gather=False))
    assert "zero3_save_16bit_model: true" in (ROOT / "configs" / "accelerate" / "zero3.yaml").read_text("utf-8")


@pytest.mark.parametrize("stage", [1, 2])
def test_other_stages_evaluate_inside_a_step(stage: int, tmp_path: Path) -> None:
    trainer = launched(tmp_path, gather=False, eval_strategy="epoch")
    trainer.accelerator.state.deepspeed_plugin.zero_stage = stage
    assert shard(trainer) is trainer.model


def test_what_deepspeed_hung_on_a_model_is_gone_before_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Optimizer:
        def __init__(self) -> None:
            # Reference counts alone would not free it.
            self.itself = self

    model, optimizer, seen = tiny(), Optimizer(), []
    model.lm_head.weight.optimizer = optimizer
    left = weakref.ref(optimizer)
    del optimizer
    monkeypatch.setattr(placement, "load_model", lambda *given: seen.append((left(), *given)) or "loaded")
    assert load_again(model, "config", Path("kept"), "args") == "loaded"  # type: ignore[arg-type]
    assert seen == [(None, "config", Path("kept"), "args")]
