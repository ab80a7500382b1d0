"""What ``kpig train`` would do, without doing it: its data, its steps, what the token tree saves, memory and time.

No weights are loaded and nothing is written. Every optimizer batch of one epoch is laid out as training lays it out;
which earlier instances are replayed only the trained model could tell, so as many are drawn at random.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil
from typing import Any, cast

import torch
from torch.utils.benchmark import Timer
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from kpig_fast.data.base_model import resolve_model
from kpig_fast.data.encoding import EncodedPair, PromptEncoder
from kpig_fast.data.lengths import check_collection_lengths
from kpig_fast.data.schema import Instance
from kpig_fast.method.replay import make_plan
from kpig_fast.processes import rank
from kpig_fast.scorer import KeyPartScorer
from kpig_fast.training.batches import BalancedBatches, Forest, ForestCollator, TrainingExample
from kpig_fast.training.budget import compute_dtype, training_setup, tree_budget
from kpig_fast.training.config import KPIGConfig
from kpig_fast.training.data import load_data
from kpig_fast.training.forecast import Forecast, StepSize, TreeSize
from kpig_fast.training.placement import with_adapter
from kpig_fast.training.planning import Planner, make_steps, training_arguments
from kpig_fast.training.run_config import RunConfig
from kpig_fast.training.sizing import ModelShape, Setup, flops_per_step, forward_flops, memory
from kpig_fast.training.strategies.chance import nothing
from kpig_fast.tree.model import position_limit

# More rows make a product no faster, only longer.
_TIMED_ROWS = {"cpu": 512, "cuda": 8192}


def dry_run(config: RunConfig, *, progress: bool = True) -> Forecast:
    """Check what ``kpig train`` checks before it loads weights, and measure what it would train.

    Raises:
        ValueError: the config or the data is wrong.
        FileNotFoundError: a file is absent.
    """
    # These join the processes of the launch.
    args = training_arguments(config, config.output_dir, 0)
    progress = progress and rank() == 0
    source = resolve_model(config.model)
    tokenizer = AutoTokenizer.from_pretrained(source)
    encoder = PromptEncoder(
        tokenizer, template=args.template, mask_text=args.mask_text, end_of_sequence=args.end_of_sequence
    )
    collection, report = load_data(config.data, progress=progress)
    steps = make_steps(collection, config)
    model = _without_weights(config)
    limit = position_limit(model)
    if limit is not None:
        collection = check_collection_lengths(
            collection, encoder, limit, report, strict=config.data.strict, progress=progress
        )
    shape = ModelShape.of(model.config)
    # Nothing is scored, so that the planner does without its scorer, which would need the weights.
    planner = Planner(config, collection, steps, cast(KeyPartScorer, None), tokenizer, progress)
    lay_out = partial(_step_size, encoder=encoder, args=args, max_tokens=tree_budget(model, args))
    bar = tqdm(_trained(planner), desc="laying out", total=len(steps), unit="step", disable=not progress)
    sizes = tuple(lay_out(tasks, own, again) for tasks, (own, again) in zip(steps, bar))
    largest = max(tree for size in sizes for tree in size.trees)
    setup = training_setup(shape, model, args, tokens=largest.tokens, rows=largest.complete_rows + largest.masked_rows)
    return Forecast(
        data=str(report),
        strategy=config.strategy,
        distils=setup.distils,
        steps=sizes,
        memory=memory(shape, setup),
        flops=sum(_flops(shape, setup, size) for size in sizes),
        flops_per_second=args.world_size * _product_rate(shape, args.device, compute_dtype(model, args)),
        device=_device_name(args.device),
    )


def _without_weights(config: RunConfig) -> Any:
    """The model that would be trained, its adapter included, on the meta device."""
    model_config = AutoConfig.from_pretrained(resolve_model(config.model))
    dtype = (model_config.dtype or torch.float32) if config.dtype == "auto" else config.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
        return with_adapter(model, config)


def _trained(planner: Planner) -> Iterator[tuple[list[Instance], list[Instance]]]:
    """The instances of every step: of its own tasks, and as many earlier ones as it would replay, at random."""
    settings, chance = planner.config.replay, random.Random(planner.config.seed)
    earlier: dict[str, list[Instance]] = {}
    for step in range(len(planner.steps)):
        nothing_drawn = make_plan([], [], step=step, seed=0, alpha=1.0, n_replay_tasks=0, n_per_task=0, model_hash="")
        own = planner.instances(step, nothing_drawn)
        replays = [] if planner.strategy.plan is nothing else list(earlier.values())
        chosen = chance.sample(replays, min(settings.tasks, len(replays)))
        yield own, [one for of_task in chosen for one in chance.sample(of_task, min(settings.instances, len(of_task)))]
        for instance in own:
            earlier.setdefault(instance.task, []).append(instance)


def _step_size(
    tasks: Sequence[str],
    own: list[Instance],
    again: list[Instance],
    *,
    encoder: PromptEncoder,
    args: KPIGConfig,
    max_tokens: int,
) -> StepSize:
    pairs = encoder.encode_all([*own, *again])
    lengths = [len(pair.complete_ids) + len(pair.response_ids) for pair in pairs]
    masked = sum(len(pair.masked_ids) + len(pair.response_ids) for pair in pairs) if args.lam > 0 else 0
    updates = ceil(len(pairs) / (args.train_batch_size * args.gradient_accumulation_steps * args.world_size))
    epochs = args.max_steps / updates if args.max_steps > 0 else args.num_train_epochs
    return StepSize(
        tasks=tuple(tasks),
        lengths=tuple(lengths[: len(own)]),
        replayed=tuple(lengths[len(own) :]),
        apart=sum(lengths) + masked,
        trees=tuple(_trees(pairs, args, max_tokens)),
        updates=ceil(epochs * updates),
        epochs=epochs,
    )


def _trees(pairs: Sequence[EncodedPair], args: KPIGConfig, max_tokens: int) -> Iterator[TreeSize]:
    """The token trees of an epoch, of all processes."""
    collate = ForestCollator(max_tokens, masked=args.lam > 0)
    for process in range(args.world_size):
        batches = BalancedBatches(
            pairs,
            micro_batch=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            processes=args.world_size,
            rank=process,
            seed=args.seed,
            masked=args.lam > 0,
        )
        for batch in batches:
            yield from map(_tree_size, collate([TrainingExample(pairs[i]) for i in batch])["forests"])


def _tree_size(forest: Forest) -> TreeSize:
    depth = float(forest.tree.position_ids.float().mean()) + 1
    return TreeSize(len(forest.tree), len(forest.rows), len(forest.masked_rows), depth)


def _flops(shape: ModelShape, setup: Setup, size: StepSize) -> float:
    """Operations of one step: its pre-pass, and all epochs."""
    how = {"trained": setup.trained, "gradient_checkpointing": setup.gradient_checkpointing}
    trees = size.trees
    epoch = sum(flops_per_step(shape, t.tokens, t.complete_rows, t.masked_rows, depth=t.depth, **how) for t in trees)
    rows = [t.complete_rows + t.masked_rows for t in trees]
    prepass = sum(forward_flops(shape, t.tokens, n, t.depth) for t, n in zip(trees, rows)) if setup.distils else 0.0
    return size.epochs * epoch + prepass


def _product_rate(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the feed-forward network's product, timed for a second."""
    hidden = torch.randn(_TIMED_ROWS[device.type], shape.hidden, device=device, dtype=dtype)
    weight = torch.randn(shape.hidden, shape.intermediate, device=device, dtype=dtype)
    timer = Timer("hidden @ weight", globals={"hidden": hidden, "weight": weight}, num_threads=torch.get_num_threads())
    return 2 * hidden.numel() * shape.intermediate / timer.blocked_autorange(min_run_time=1).median


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"
