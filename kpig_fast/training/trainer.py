"""``KPIGTrainer``: transformers' Trainer on token trees with the refined objective (He et al., ACL 2025, Eq. 4-5)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.data.instances import as_instance
from kpig_fast.data.schema import Instance
from kpig_fast.method.objective import temperature
from kpig_fast.ops.linear_kpig_loss import KPIGLoss, linear_kpig_loss
from kpig_fast.scorer import KeyPartScorer, names_of
from kpig_fast.teacher import Teacher, make_teacher
from kpig_fast.training.batches import Forest, ForestCollator, GroupedSampler, TrainingExample
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.penalty import QuadraticPenalty
from kpig_fast.tree.model import OutputHead, run_tree, tree_mode

TEACHER_FILE = "teacher.safetensors"


def make_scorer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: KPIGConfig) -> KeyPartScorer:
    """The scorer that measures what training with ``args`` needs."""
    return KeyPartScorer(
        model,
        tokenizer,
        alpha=args.alpha,
        tail_tol=args.tail_tol,
        max_tokens=args.max_tokens,
        template=args.template,
        mask_text=args.mask_text,
        end_of_sequence=args.end_of_sequence,
    )


class KPIGTrainer(Trainer):
    """Trains one time step: cross-entropy on the complete instances, divergence on the masked ones.

    The model that it is given is M_{t-1}: ``train`` first runs it once over the instances (gains and masked hidden
    states, kept in ``output_dir``), then trains it on. With ``lam = 0`` it is plain fine-tuning on a token tree.

    Args:
        model: a Hugging Face causal language model, PEFT adapters included.
        args: a ``KPIGConfig``.
        train_dataset: instances, or rows in any form that ``as_instance`` takes.
        processing_class: the model's tokenizer.
        progress: show bars of the pre-pass; default: unless ``args.disable_tqdm``.
        kwargs: everything else that ``transformers.Trainer`` takes.

    Raises:
        UnsupportedModelError: the model does not give the same result on a token tree.
        ValueError: a row is no instance, a key part does not occur, a response is empty, or an instance is longer than
            the model's positions; an argument asks for what this trainer does not do.
    """

    args: KPIGConfig

    def __init__(
        self,
        model: nn.Module,
        args: KPIGConfig,
        train_dataset: Sequence[Instance | Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        *,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> None:
        _check(args, kwargs)
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            data_collator=ForestCollator(args.max_tokens, masked=args.lam > 0),
            processing_class=processing_class,
            **kwargs,
        )
        # The loss is divided by the response tokens of the whole optimizer batch here, not by the Trainer.
        self.model_accepts_loss_kwargs = True
        self.scorer = make_scorer(model, processing_class, args)
        instances = [as_instance(row) for row in train_dataset]
        self.progress = not args.disable_tqdm if progress is None else progress
        self.pairs = self.scorer.encoder.encode_all(instances, progress=self.progress)
        _check_pairs(self.pairs, names_of(instances))
        self.scorer.check_positions(self.pairs, names_of(instances))
        wordings: dict[str, int] = {}
        self.groups = [wordings.setdefault(i.instruction, len(wordings)) for i in instances]
        self.teacher: Teacher | None = None
        # Added to the loss where it is set.
        self.penalty: QuadraticPenalty | None = None
        self._logged: list[tuple[Tensor, int, Tensor, int]] = []

    def prepare_teacher(self) -> Teacher:
        """The pre-pass of the model as it is now; an equal one in ``output_dir`` is used again."""
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        return make_teacher(folder / TEACHER_FILE, self.scorer, self.pairs, progress=self.progress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Make the teacher (unless ``lam`` is 0), then train as ``transformers.Trainer.train`` does."""
        if self.penalty is not None and self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed hides the gradients that a penalty adds to; train it with DDP or FSDP instead")
        if self.args.lam > 0:
            self.teacher = self.prepare_teacher()
        self.train_dataset = list(self._examples())  # type: ignore[assignment]
        with tree_mode(self.accelerator.unwrap_model(self.model)):
            return super().train(*args, **kwargs)

    def _examples(self) -> Iterator[TrainingExample]:
        for i, (pair, group) in enumerate(zip(self.pairs, self.groups)):
            if self.teacher is None:
                yield TrainingExample(pair, group)
            else:
                beta = self.args.fixed_temperature or temperature(float(self.teacher.gain[i]))
                yield TrainingExample(pair, group, beta, int(self.teacher.offsets[i]))

    def _get_train_sampler(self, train_dataset: Any = None) -> GroupedSampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedSampler(self.groups, batch, self.args.seed)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        items = torch.stack([batch["n_items"].to(device) for batch in batch_samples]).sum()
        return self.accelerator.gather(items).sum() if self.args.world_size > 1 else items  # type: ignore[union-attr]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass for each forest of the micro-batch; the sum of their losses."""
        losses = [
            super(KPIGTrainer, self).training_step(model, {"forest": forest}, num_items_in_batch)
            for forest in inputs["forests"]
        ]
        if self.penalty is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.penalty.add_gradient(1.0 if scaler is None else scaler.get_scale())
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one forest, divided by ``num_items_in_batch`` response tokens."""
        forest: Forest = inputs["forest"].to(self.args.device)
        n = float(num_items_in_batch or len(forest.target))

        def loss(hidden: Tensor, head: OutputHead) -> KPIGLoss:
            return self._forest_loss(hidden, head, forest, n)

        out = run_tree(model, forest.tree, loss)
        self._logged.append((out.log_probs.sum(), len(out.log_probs), out.jsd.sum(), len(out.jsd)))
        # Wrappers for several processes average gradients over them; the loss is a sum.
        scaled = out.loss * self.args.world_size
        return (scaled, {"log_probs": out.log_probs, "jsd": out.jsd}) if return_outputs else scaled

    def _forest_loss(self, hidden: Tensor, head: OutputHead, forest: Forest, n: float) -> KPIGLoss:
        masked = hidden.index_select(0, forest.masked_rows)
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        old_hidden = masked.detach()
        if self.teacher is not None:
            old_hidden = self.teacher.hidden(forest.teacher_rows).to(hidden.device)
            weight = weight if self.teacher.weight is None else self.teacher.weight.to(weight.device)
            bias = bias if self.teacher.bias is None else self.teacher.bias.to(weight.device)
        return linear_kpig_loss(
            hidden.index_select(0, forest.rows),
            forest.target,
            masked,
            old_hidden,
            forest.temperature,
            head.weight,
            weight,
            ce_scale=1 / n,
            jsd_scale=self.args.lam / n,
            bias=head.bias,
            ref_bias=bias,
            **head.transform,
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the mean cross-entropy (nats) and divergence (bits) a response token since the last log."""
        if self._logged and "loss" in logs:
            log_probs, tokens, jsd, masked = (float(sum(column)) for column in zip(*self._logged))
            logs["cross_entropy"] = -log_probs / max(tokens, 1)
            if masked:
                logs["jsd"] = jsd / masked
            self._logged.clear()
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate: 6 operations a parameter and laid-out token."""
        tokens = sum(len(forest.tree) for forest in inputs["forests"])
        return 6 * tokens * sum(p.numel() for p in self.model.parameters())  # type: ignore[union-attr]


def _check(args: KPIGConfig, given: Mapping[str, Any]) -> None:
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process would copy the model, which a token tree cannot follow; "
            "start one process for each with accelerate launch, or set CUDA_VISIBLE_DEVICES to one"
        )
    if given.get("eval_dataset") is not None:
        raise ValueError("KPIGTrainer takes no eval_dataset; score answers with kpig_fast.evaluation.evaluate instead")


def _check_pairs(pairs: Sequence[EncodedPair], names: Sequence[str]) -> None:
    if not pairs:
        raise ValueError("train_dataset is empty; give at least one instance")
    for pair, name in zip(pairs, names):
        if not pair.response_ids:
            raise ValueError(f"{name} has an empty response; drop it or keep the end-of-sequence token")
