"""Fine-tuning on packs with public fused heads, for the GPU benchmark."""

from typing import Any

from baseline_heads_gpu import CrossEntropy, cross_entropies
from baseline_trainers import PackedTrainer
from torch import Tensor

# Those that are worth their compilation in a benchmark of minutes.
FUSED = "Liger fused linear cross-entropy", "cut-cross-entropy"


def fused_trainers() -> dict[str, type[PackedTrainer]]:
    """A trainer for each fused head that is installed, by the head's name."""
    return {name: _trainer(loss) for name, loss in cross_entropies().items() if name in FUSED}


def _trainer(loss: CrossEntropy) -> type[PackedTrainer]:
    class FusedTrainer(PackedTrainer):
        """Fine-tuning on packs; response rows meet the head inside of the fused loss."""

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Tensor],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Tensor:
            """Cross-entropy of a pack, as its share of the mean over the optimizer batch."""
            labels = inputs.pop("labels")[:, 1:]
            hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
            return loss(hidden[labels >= 0], model.lm_head.weight, labels[labels >= 0]) / num_items_in_batch

    return FusedTrainer
