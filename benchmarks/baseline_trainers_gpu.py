"""Fine-tuning on packs with public fused heads, for the GPU benchmark."""

from baseline_heads_gpu import CrossEntropy, cross_entropies
from baseline_trainers import PackedTrainer
from torch import Tensor, nn

# Those that are worth their compilation in a benchmark of minutes.
FUSED = "Liger fused linear cross-entropy", "cut-cross-entropy"


def fused_trainers() -> dict[str, type[PackedTrainer]]:
    """A trainer for each fused head that is installed, by the head's name."""
    return {name: _trainer(loss) for name, loss in cross_entropies().items() if name in FUSED}


def _trainer(loss: CrossEntropy) -> type[PackedTrainer]:
    class FusedTrainer(PackedTrainer):
        """Fine-tuning on packs; response rows meet the head inside of the fused loss."""

        def cross_entropy(self, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
            """As that of ``PackedTrainer``."""
            return loss(hidden, head.weight, labels)

    return FusedTrainer
