"""``KPIGTrainer``: transformers' Trainer on token trees with the refined objective (He et al., ACL 2025, Eq. 4-5)."""

import copy
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, Trainer

from kpig_fast.data.encoding import EncodedPair
from kpig_fast.data.instances import as_instance
from kpig_fast.data.schema import Instance
from kpig_fast.method.objective import temperature
from kpig_fast.ops.linear_kpig_loss import KPIGLoss, linear_kpig_loss
from kpig_fast.processes import gather, share
from kpig_fast.scorer import KeyPartScorer, names_of
from kpig_fast.teacher import Teacher, make_teacher
from kpig_fast.training.batches import (
    BalancedBatches,
    Forest,
    ForestCollator,
    ShuffleByEpoch,
    TrainingExample,
    filler_forest,
)
from kpig_fast.training.budget import tree_budget
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.penalty import QuadraticPenalty
from kpig_fast.training.placement import release_engine, shard
from kpig_fast.training.tally import Tally
from kpig_fast.tree.model import OutputHead, run_tree, tree_mode

TEACHER_FOLDER = "teacher"


def make_scorer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: KPIGConfig) -> KeyPartScorer:
    """The scorer that measures what training with ``args`` needs."""
    return KeyPartScorer(
        model,
        tokenizer,
        alpha=args.alpha,
        tail_tol=args.tail_tol,
        max_tokens=tree_budget(model, args),
        template=args.template,
        mask_text=args.mask_text,
        end_of_sequence=args.end_of_sequence,
    )


def run_prepass(
    args: KPIGConfig,
    scorer: KeyPartScorer,
    pairs: Sequence[EncodedPair],
    *,
    planned: Sequence[EncodedPair] = (),
    progress: bool = False,
) -> Teacher:
    """The pre-pass into ``args.output_dir``, as ``make_teacher`` describes it."""
    folder = Path(str(args.output_dir)) / TEACHER_FOLDER
    dtype = None if args.teacher_dtype is None else getattr(torch, args.teacher_dtype)
    return make_teacher(folder, scorer, pairs, planned=planned, dtype=dtype, progress=progress)


class KPIGTrainer(Trainer):
    """Trains one time step: cross-entropy on the complete instances, divergence on the masked ones.

    The model that it is given is M_{t-1}: ``train`` first runs it once over the instances (gains and masked hidden
    states, kept in ``output_dir``), then trains it on. With ``lam = 0`` it is plain fine-tuning on a token tree.

    Args:
        model: a Hugging Face causal language model, PEFT adapters included.
        args: a ``KPIGConfig``.
        train_dataset: instances, or rows in any form that ``as_instance`` takes.
        processing_class: the model's tokenizer.
        eval_dataset: instances whose loss ``evaluate`` measures, as often as ``args.eval_strategy`` says.
        planned: instances that have gone through ``run_prepass`` with these arguments, such as to choose among them;
            those that are trained, too, do not go through another.
        progress: show bars of the pre-pass; default: unless ``args.disable_tqdm``.
        kwargs: everything else that ``transformers.Trainer`` takes, but its ``data_collator``.

    Raises:
        UnsupportedModelError: the model does not give the same result on a token tree.
        ValueError: a row is no instance, a key part does not occur, a response is empty, or an instance is longer than
            the model's positions; an argument asks for what this trainer does not do.
    """

    args: KPIGConfig
    data_collator: ForestCollator

    def __init__(
        self,
        model: nn.Module,
        args: KPIGConfig,
        train_dataset: Sequence[Instance | Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        *,
        eval_dataset: Sequence[Instance | Mapping[str, Any]] | None = None,
        planned: Sequence[Instance] = (),
        progress: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,  # type: ignore[arg-type]
            args=args,
            eval_dataset=eval_dataset,  # type: ignore[arg-type]
            processing_class=processing_class,
            **kwargs,
        )
        # The loss is divided by the response tokens of the whole optimizer batch here, not by the Trainer.
        self.model_accepts_loss_kwargs = True
        self.model = self.model_wrapped = shard(self)
        if self.is_fsdp_enabled:
            # Whole gradients, kept from one micro-batch to the next, are what FSDP is to save.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
        self.scorer = make_scorer(self.model, processing_class, args)
        self.data_collator = ForestCollator(self.scorer.max_tokens, masked=args.lam > 0)
        self.progress = not args.disable_tqdm if progress is None else progress
        instances = [as_instance(row) for row in train_dataset]
        self.pairs = self._encode(instances)
        self.planned = self.scorer.encoder.encode_all(planned, progress=self.progress)
        self.eval_pairs = self._encode([as_instance(row) for row in eval_dataset]) if eval_dataset is not None else []
        self.teacher: Teacher | None = None
        # How long making it took, wall time.
        self.prepass_seconds = 0.0
        # Added to the loss where it is set.
        self.penalty: QuadraticPenalty | None = None
        self.add_callback(ShuffleByEpoch())
        if args.early_stop_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stop_patience))
        # The micro-batches since the last optimizer step.
        self._taken: list[dict[str, Any]] = []
        self._tally = Tally()

    def _encode(self, instances: Sequence[Instance]) -> list[EncodedPair]:
        pairs = self.scorer.encoder.encode_all(instances, progress=self.progress)
        _check_pairs(pairs, names_of(instances))
        self.scorer.check_positions(pairs, names_of(instances))
        return pairs

    def prepare_teacher(self) -> Teacher:
        """The pre-pass of the model as it is now; parts of an equal one in ``output_dir`` are used again."""
        # DeepSpeed's engine may hold other numbers than those that were planned with.
        planned = [] if self.is_deepspeed_enabled else self.planned
        return run_prepass(self.args, self.scorer, self.pairs, planned=planned, progress=self.progress)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Make the teacher (unless ``lam`` is 0), then train as ``transformers.Trainer.train`` does."""
        if self.penalty is not None and self.is_deepspeed_enabled:
            raise ValueError("DeepSpeed hides the gradients that a penalty adds to; train it with DDP or FSDP instead")
        if self.is_deepspeed_enabled:
            # An engine of an earlier call is released and trains no more.
            self.model_wrapped = shard(self)
        started = time.perf_counter()
        if self.args.lam > 0:
            self.teacher = self.prepare_teacher()
        self.train_dataset = list(self._examples())  # type: ignore[assignment]
        self.prepass_seconds = time.perf_counter() - started
        self._tally.start()
        with tree_mode(self.accelerator.unwrap_model(self.model)):  # type: ignore[arg-type]
            result = super().train(*args, **kwargs)
        if self.is_deepspeed_enabled:
            release_engine(self.model_wrapped)
        return result

    def _examples(self) -> Iterator[TrainingExample]:
        for i, pair in enumerate(self.pairs):
            if self.teacher is None:
                yield TrainingExample(pair)
            else:
                beta = self.args.fixed_temperature or temperature(float(self.teacher.gain[i]))
                yield TrainingExample(pair, beta, int(self.teacher.starts[i]))

    def get_train_dataloader(self) -> DataLoader:
        """This process' micro-batches. Accelerate would cut them once more, so it does not see them."""
        batches = BalancedBatches(
            self.pairs,
            micro_batch=self.args.train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            processes=self.args.world_size,
            rank=self.args.process_index,
            seed=self.args.seed,
            masked=self.args.lam > 0,
        )
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Response tokens of the optimizer batch; every process gets as many forests as the one with the most."""
        items = torch.stack([batch["n_items"] for batch in batch_samples]).sum().to(device)
        if self.args.world_size == 1:
            return items
        counts = torch.tensor([len(batch["forests"]) for batch in batch_samples], device=device)
        everyones: Tensor = self.accelerator.gather(torch.cat([items[None], counts])[None])  # type: ignore[assignment]
        for batch, count in zip(batch_samples, everyones[:, 1:].amax(0).tolist()):
            batch["forests"] += [filler_forest()] * (count - len(batch["forests"]))
        return everyones[:, 0].sum()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One forward and backward pass for each forest of the micro-batch; the sum of their losses.

        When memory runs out, in whichever process, the budget of a tree is halved in all of them and the micro-batches
        since the last optimizer step are taken again, so that the result is the same. Where the processes hold pieces
        of the model (FSDP, DeepSpeed) it is an error that names the fix: they cannot leave a pass that others are in.
        """
        self._taken.append(inputs)
        loss = self._try(model, [inputs], num_items_in_batch)
        while loss is None:
            self._halve(model)
            loss = self._try(model, self._taken, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self._whole_in_each:
                # With nothing of its own to add, it exchanges what all have added.
                super().training_step(model, {"forest": filler_forest()}, num_items_in_batch)
            if self.penalty is not None:
                scaler = self.accelerator.scaler
                self.penalty.add_gradient(1.0 if scaler is None else scaler.get_scale())
            self._taken.clear()
            self._tally.settle()
        return loss

    @property
    def _whole_in_each(self) -> bool:
        """Several processes, each with the whole model (DDP)."""
        return self.args.world_size > 1 and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def _try(self, model: nn.Module, batches: list[dict[str, Any]], n_items: Tensor | int | None) -> Tensor | None:
        """Add the gradients of ``batches``; the loss of the last, or None if memory ran out in one of the processes."""
        try:
            loss = [self._accumulate(model, inputs, n_items) for inputs in batches][-1]
        except torch.OutOfMemoryError as error:
            if self.args.world_size > 1 and not self._whole_in_each:
                raise torch.OutOfMemoryError(
                    f"{error} Out of memory with trees of {self.data_collator.max_tokens} tokens: set "
                    f"training.max_tokens to {self.data_collator.max_tokens // 2} and start again; the run goes on "
                    "from its newest checkpoint"
                ) from error
            loss = None
        return loss if not self._whole_in_each or all(gather([loss is not None])) else None

    def _accumulate(self, model: nn.Module, inputs: dict[str, Any], n_items: Tensor | int | None) -> Tensor:
        """Add a micro-batch's gradients. Pieces of a model are exchanged behind its last forest, if not before."""
        if inputs["max_tokens"] > self.data_collator.max_tokens:
            # It was laid out before the budget was halved.
            inputs = self.data_collator(inputs["examples"])
        forests, losses = inputs["forests"], []
        for i, forest in enumerate(forests, start=1):
            last = i == len(forests) and not self._whole_in_each
            with nullcontext() if last else self._not_exchanged(model):
                losses.append(super().training_step(model, {"forest": forest}, n_items))
        self._tally.add_batch(int(inputs["n_instances"]), int(inputs["n_tokens"]))
        return torch.stack(losses).sum()

    @contextmanager
    def _not_exchanged(self, model: nn.Module) -> Iterator[None]:
        """Another forest follows. FSDP exchanges even so: whole gradients have no room."""
        exchanged = self.accelerator.sync_gradients
        waits = self.args.world_size > 1 and exchanged and not self.is_fsdp_enabled
        # This alone is what DeepSpeed goes by.
        self.accelerator.gradient_state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model) if waits and not self.is_deepspeed_enabled else nullcontext():
                yield
        finally:
            self.accelerator.gradient_state._set_sync_gradients(exchanged)

    def _halve(self, model: nn.Module) -> None:
        """Halve the budget of a tree, and forget what was added since the last optimizer step."""
        if self.data_collator.max_tokens == 1:
            raise torch.OutOfMemoryError("out of memory with a single instance; shorten it or use a smaller model")
        self.data_collator.max_tokens //= 2
        warnings.warn(f"out of memory: trees have {self.data_collator.max_tokens} tokens from now on", stacklevel=2)
        model.zero_grad()
        self._tally.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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
        self._tally.add_forest(out.log_probs, out.jsd)
        # Wrappers for several processes average gradients over them; the loss is a sum.
        scaled = out.loss * self.args.world_size
        return (scaled, {"log_probs": out.log_probs, "jsd": out.jsd}) if return_outputs else scaled

    def _forest_loss(self, hidden: Tensor, head: OutputHead, forest: Forest, n: float) -> KPIGLoss:
        masked = hidden.index_select(0, forest.masked_rows)
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        old_hidden = masked.detach()
        if self.teacher is not None:
            old_hidden = self.teacher.hidden(forest.teacher_rows).to(masked)
            # Moved once: a head is large.
            self.teacher = self.teacher.to(weight)
            weight = weight if self.teacher.weight is None else self.teacher.weight
            bias = bias if self.teacher.bias is None else self.teacher.bias
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
        """Adds, since the last log: mean cross-entropy (nats) and divergence (bits) a response token, and throughput.

        ``tokens_per_second`` counts prompt and response tokens of the complete instances, as plain fine-tuning would.
        """
        if "loss" in logs:
            logs |= self._tally.take()
        super().log(logs, *args, **kwargs)

    def evaluate(  # type: ignore[override]
        self,
        eval_dataset: Sequence[Instance | Mapping[str, Any]] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """``eval_loss``: mean cross-entropy (nats) a response token of complete instances; logged, as the Trainer does.

        Args:
            eval_dataset: other instances than the trainer was given.
            ignore_keys: of no use here.
            metric_key_prefix: what stands for ``eval``.
        """
        pairs = self.eval_pairs if eval_dataset is None else self._encode([as_instance(row) for row in eval_dataset])
        scorer = copy.copy(self.scorer)
        scorer.scored_length = None
        complete = [EncodedPair(pair.complete_ids, pair.complete_ids, pair.response_ids) for pair in share(pairs)]
        log_probs = gather(scorer.score_pairs(complete).complete)
        metrics = {f"{metric_key_prefix}_loss": -float(torch.cat(log_probs).double().mean())}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate: 6 operations a parameter and laid-out token."""
        tokens = sum(len(forest.tree) for forest in inputs["forests"])
        return 6 * tokens * sum(getattr(p, "ds_numel", p.numel()) for p in self.scorer.model.parameters())


def _check_pairs(pairs: Sequence[EncodedPair], names: Sequence[str]) -> None:
    if not pairs:
        raise ValueError("train_dataset is empty; give at least one instance")
    for pair, name in zip(pairs, names):
        if not pair.response_ids:
            raise ValueError(f"{name} has an empty response; drop it or keep the end-of-sequence token")
