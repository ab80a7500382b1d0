"""``KPIGConfig``: transformers' training arguments and the few that the method adds."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from kpig_fast.method.masking import MASK_TEXT


@dataclass
class KPIGConfig(TrainingArguments):
    """Arguments of ``KPIGTrainer``: everything that ``transformers.TrainingArguments`` has, and:

    Args:
        lam: lambda, weight of the divergence from the frozen model; 0 trains plain cross-entropy.
        alpha: decay of the information gain, in (0, 1].
        tail_tol: error of the gain that leaving out late response tokens may cause.
        max_tokens: tokens of one token tree, which is one forward and backward pass.
        template: prompt template, ``plain`` or ``chat``.
        mask_text: what stands for a key part.
        end_of_sequence: end every response with the end-of-sequence token.
        fixed_temperature: use this temperature for every instance instead of 2 - min(G, 1).

    ``per_device_train_batch_size`` counts instances. The loss is normalised over the response tokens of the whole
    optimizer batch, so neither it, nor ``gradient_accumulation_steps``, nor ``max_tokens`` changes the result.
    """

    lam: float = field(default=0.02, metadata={"help": "weight of the divergence from the frozen model"})
    alpha: float = field(default=0.3, metadata={"help": "decay of the information gain"})
    tail_tol: float = field(default=1e-7, metadata={"help": "error of the gain that late tokens may cause"})
    max_tokens: int = field(default=8192, metadata={"help": "tokens of one token tree"})
    template: Literal["plain", "chat"] = field(default="plain", metadata={"help": "prompt template"})
    mask_text: str = field(default=MASK_TEXT, metadata={"help": "what stands for a key part"})
    end_of_sequence: bool = field(default=True, metadata={"help": "end responses with the end-of-sequence token"})
    fixed_temperature: float | None = field(default=None, metadata={"help": "temperature instead of 2 - min(G, 1)"})
    learning_rate: float = field(default=2e-5, metadata={"help": "initial learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "epochs of a step"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam < 0:
            raise ValueError(f"lam is {self.lam}; the weight of the divergence is 0 or more")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; a tree needs room for at least one token")
        if self.fixed_temperature is not None and self.fixed_temperature <= 0:
            raise ValueError(f"fixed_temperature is {self.fixed_temperature}; a temperature is positive")
        # The instances are objects of ours, not columns that the model's forward would know.
        self.remove_unused_columns = False
