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
        max_tokens: tokens of one token tree, which is one forward and backward pass; ``auto``: what the free memory
            holds, by :func:`kpig_fast.training.sizing.largest_tree`. Either is halved when memory runs out.
        template: prompt template, ``plain`` or ``chat``.
        mask_text: what stands for a key part.
        end_of_sequence: end every response with the end-of-sequence token.
        fixed_temperature: use this temperature for every instance instead of 2 - min(G, 1).
        teacher_dtype: keep the frozen model's hidden states as ``bfloat16``, in half the space (see
            :func:`kpig_fast.teacher.make_teacher` for the error); None: as the model computes them.
        early_stop_patience: stop when ``eval_loss`` has not fallen in so many evaluations.

    ``per_device_train_batch_size`` counts instances. The loss is normalised over the response tokens of the whole
    optimizer batch, so neither it, nor ``gradient_accumulation_steps``, nor ``max_tokens`` changes the result.
    """

    lam: float = field(default=0.02, metadata={"help": "weight of the divergence from the frozen model"})
    alpha: float = field(default=0.3, metadata={"help": "decay of the information gain"})
    tail_tol: float = field(default=1e-7, metadata={"help": "error of the gain that late tokens may cause"})
    max_tokens: int | Literal["auto"] = field(default=8192, metadata={"help": "tokens of one token tree"})
    template: Literal["plain", "chat"] = field(default="plain", metadata={"help": "prompt template"})
    mask_text: str = field(default=MASK_TEXT, metadata={"help": "what stands for a key part"})
    end_of_sequence: bool = field(default=True, metadata={"help": "end responses with the end-of-sequence token"})
    fixed_temperature: float | None = field(default=None, metadata={"help": "temperature instead of 2 - min(G, 1)"})
    teacher_dtype: Literal["bfloat16"] | None = field(
        default=None, metadata={"help": "dtype of the hidden states kept"}
    )
    early_stop_patience: int | None = field(default=None, metadata={"help": "evaluations without a lower loss"})
    learning_rate: float = field(default=2e-5, metadata={"help": "initial learning rate"})
    num_train_epochs: float = field(default=1.0, metadata={"help": "epochs of a step"})

    def __post_init__(self) -> None:
        if self.early_stop_patience is not None and self.metric_for_best_model is None:
            self.metric_for_best_model = "eval_loss"
        super().__post_init__()
        if self.lam < 0:
            raise ValueError(f"lam is {self.lam}; the weight of the divergence is 0 or more")
        if self.max_tokens != "auto" and not (isinstance(self.max_tokens, int) and self.max_tokens > 0):
            raise ValueError(f"max_tokens is {self.max_tokens!r}; give a number of tokens, at least 1, or auto")
        if self.fixed_temperature is not None and self.fixed_temperature <= 0:
            raise ValueError(f"fixed_temperature is {self.fixed_temperature}; a temperature is positive")
        if self.teacher_dtype not in (None, "bfloat16"):
            raise ValueError(f"teacher_dtype is {self.teacher_dtype!r}; give bfloat16 or leave it out")
        if self.early_stop_patience is not None:
            if self.early_stop_patience < 1:
                raise ValueError(f"early_stop_patience is {self.early_stop_patience}; give 1 evaluation or more")
            if self.eval_strategy == "no":
                raise ValueError("early_stop_patience needs evaluations; set eval_strategy to steps or epoch")
        if self.dataloader_drop_last:
            raise ValueError("dataloader_drop_last would leave instances out; the last optimizer batch may be small")
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process would copy the model, which a token tree cannot follow; "
                "start one process for each with accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
            )
        # The instances are objects of ours, not columns that the model's forward would know.
        self.remove_unused_columns = False
        # Buffers of a language model are constants, and a process out of memory would begin its pass again alone.
        self.ddp_broadcast_buffers = False
