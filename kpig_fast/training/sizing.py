"""What training on token trees takes: memory of a process, operations and time of a step, from a model's config alone.

Derived from what autograd keeps of a layer with RMS norms, rotary positions, grouped-query attention and a gated
feed-forward network (Llama, Mistral, Qwen2); those of other families keep about as much. Not counted: what an
allocator cannot use and libraries take for themselves. ``python -m kpig_fast.training.sizing`` prints the plan of
docs/scaling.md.
"""

from bisect import bisect_right
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from kpig_fast.ops.head import CHUNK_ELEMENTS, ROW_BYTES, gpu_chunk_elements, round_up

# The rest is for what is not counted.
USABLE = 0.9


@dataclass(frozen=True)
class ModelShape:
    """What of a model sizes depend on.

    ``parameters`` counts a tied head once; ``head_parameters`` is V · D, tied or not. ``intermediate`` is the
    feed-forward width that one token passes: of a mixture of experts, that of the chosen ones together.
    """

    parameters: int
    head_parameters: int
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: PretrainedConfig) -> "ModelShape":
        """The shape of a causal language model, its parameters counted on the meta device."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head, text = model.get_output_embeddings().weight, config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in model.parameters()),
            head_parameters=head.numel(),
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            intermediate=_intermediate(text),
            heads=text.num_attention_heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=len(head),
            tied=head is model.get_input_embeddings().weight,
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Numbers of a token's queries, and of its keys (and values), in one layer."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> float:
        """Parameters of one layer; those beside layers and vocabulary are shared out."""
        return (self.parameters - self.head_parameters * (1 if self.tied else 2)) / self.layers


def _intermediate(text: PretrainedConfig) -> int:
    chosen = getattr(text, "num_experts_per_tok", None)
    if chosen:
        shared = getattr(text, "shared_expert_intermediate_size", None) or 0
        return chosen * (getattr(text, "moe_intermediate_size", None) or text.intermediate_size) + shared
    # Families differ in the name; GPT-2 leaves out its usual width.
    widths = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    return next((width for width in widths if width), 4 * text.hidden_size)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained.

    Args:
        max_tokens, response_rows: tokens of one tree; those of them that predict a response token, in both branches.
        processes: all of them, on all nodes.
        sharding: ``none`` (one process, or DDP), ``gradients`` (and optimizer state: ZeRO-2), ``full`` (FSDP2).
        trained: trained share of the parameters; below 1 these are float32 adapters beside a frozen model.
        weight_bytes: of a stored parameter; 2 for bf16 weights under adapters, and for DeepSpeed with bf16.
        compute_bytes: of a number in the layers' matrix products; 2 with ``bf16: true``.
        optimizer_bytes: of a trained parameter's state; 8 for AdamW, 12 for DeepSpeed with bf16.
        gradient_checkpointing: layers are computed again in the backward pass.
        distils: the loss has its divergence; a trained head then stands beside the old one.
        device_bytes: memory of the GPU, by which the head's chunks are cut; None for a CPU.
    """

    max_tokens: int
    response_rows: int
    processes: int = 1
    sharding: Literal["none", "gradients", "full"] = "none"
    trained: float = 1.0
    weight_bytes: int = 4
    compute_bytes: int = 4
    optimizer_bytes: int = 8
    gradient_checkpointing: bool = False
    distils: bool = True
    device_bytes: int | None = None

    @property
    def adapters(self) -> bool:
        """Adapters are trained, so that the model and its head are frozen."""
        return self.trained < 1

    @property
    def trained_bytes(self) -> int:
        """Bytes of a trained parameter, and of its gradient."""
        return 4 if self.adapters else self.weight_bytes

    @property
    def stream_bytes(self) -> int:
        """Bytes of a number between layers: those of weights as layers see them, which FSDP casts and autocast not."""
        return self.compute_bytes if self.sharding == "full" else self.weight_bytes

    @property
    def casts(self) -> bool:
        """Each matrix product makes a copy of its input: autocast beside float32 weights or adapters."""
        return self.compute_bytes < (self.trained_bytes if self.adapters else self.stream_bytes)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at its peak, by what they are for.

    ``activations`` are kept from the forward to the backward pass; ``head`` is what the former needs besides at its end
    (a chunk of logits, the head's gradient), ``backward`` what the latter needs for one layer.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    teacher: float
    head: float
    backward: float

    @property
    def total(self) -> float:
        """All of it at the peak."""
        kept = self.weights + self.gradients + self.optimizer + self.activations + self.teacher
        return kept + max(self.head, self.backward)


def memory(shape: ModelShape, setup: Setup) -> Memory:
    """What one process holds at work on a tree while the gradients of an earlier one are there."""
    # Autocast drops its copies of weights after the forward pass, unless the backward pass keeps them.
    copies = (setup.compute_bytes < setup.stream_bytes) * setup.compute_bytes * shape.layer_parameters * shape.layers
    kept, dropped = (0.0, copies) if setup.gradient_checkpointing else (copies, 0.0)
    holders = 1 if setup.sharding == "none" else setup.processes
    old_head = 0 if setup.adapters else setup.weight_bytes * shape.head_parameters
    return Memory(
        weights=_weights(shape, setup) + kept,
        gradients=_gradients(shape, setup),
        optimizer=setup.optimizer_bytes * setup.trained * shape.parameters / holders,
        activations=activation_bytes_per_token(shape, setup) * setup.max_tokens,
        teacher=setup.distils * (old_head + setup.stream_bytes * shape.hidden * setup.response_rows / 2),
        head=_head(shape, setup) + dropped,
        backward=_backward(shape, setup),
    )


def _weights(shape: ModelShape, setup: Setup) -> float:
    stored = shape.parameters * (setup.weight_bytes + (setup.trained_bytes * setup.trained if setup.adapters else 0))
    if setup.sharding != "full":
        return stored
    # Whole: the head, the layer at work, the next one, and the buffer that it arrives in.
    return stored / setup.processes + setup.compute_bytes * (shape.head_parameters + 3 * shape.layer_parameters)


def _gradients(shape: ModelShape, setup: Setup) -> float:
    stored = setup.trained_bytes * setup.trained * shape.parameters
    if setup.sharding == "none":
        # DDP's buckets are as large again.
        return stored * (1 if setup.processes == 1 else 2)
    # Those of one layer are whole: as computed, and as sent.
    return stored / setup.processes + 2 * setup.compute_bytes * setup.trained * shape.layer_parameters


def _layer(shape: ModelShape, setup: Setup) -> tuple[float, float, float]:
    """Bytes that one layer keeps of a token: for each of its two norms, its attention, its feed-forward network."""
    half, stream, hidden, (queries, keys) = setup.compute_bytes, setup.stream_bytes, shape.hidden, shape.widths
    # A frozen weight does not keep its factor, the normalised input.
    norm = (4 if setup.adapters else 4 + stream) * hidden
    for_attention, for_output, for_gates = (3, 1, 2) if setup.casts else (1, 0, 1)
    attention = half * (for_attention * hidden + for_output * queries)
    # Rotated queries and keys, values, the result, and each query's log-sum-exp.
    attention += 2 * stream * queries + (stream + half) * keys + 4 * shape.heads
    return norm, attention, half * (for_gates * hidden + 4 * shape.intermediate)


def activation_bytes_per_token(shape: ModelShape, setup: Setup) -> float:
    """Bytes that autograd keeps from the forward pass, divided by the tree's tokens."""
    norm, attention, feed_forward = _layer(shape, setup)
    rows, stream = setup.response_rows / setup.max_tokens, setup.stream_bytes * shape.hidden
    # Of the head, the gradient by its input, which is formed in the forward pass.
    ends = norm + rows * stream
    if setup.gradient_checkpointing:
        return shape.layers * stream + ends
    # The last feed-forward network sees only rows that are read; they are kept once more when put back into place.
    last = rows * (feed_forward + setup.compute_bytes * shape.hidden) - feed_forward
    return shape.layers * (2 * norm + attention + feed_forward) + last + ends


def _backward(shape: ModelShape, setup: Setup) -> float:
    norm, attention, feed_forward = _layer(shape, setup)
    # Gradients by both factors of the gated product, by the layer's input and output, and by one weight.
    token = 2 * setup.compute_bytes * shape.intermediate + 2 * setup.stream_bytes * shape.hidden
    token += 2 * norm + attention + feed_forward if setup.gradient_checkpointing else 0
    return token * setup.max_tokens + setup.compute_bytes * shape.hidden * shape.intermediate


def _head(shape: ModelShape, setup: Setup) -> float:
    factor = 4 if setup.device_bytes is None else setup.compute_bytes
    # Heads in another precision than that of the products are copied.
    size = factor * ((setup.stream_bytes != factor) + (setup.distils and setup.weight_bytes != factor))
    if not setup.adapters:
        # The gradient is summed in float32, then rounded.
        size += 4 if setup.compute_bytes == 4 else 4 + setup.compute_bytes
    hidden = setup.max_tokens * setup.stream_bytes * shape.hidden
    return size * shape.head_parameters + hidden + _chunk(shape.vocabulary, setup)


def _chunk(vocabulary: int, setup: Setup) -> int:
    """As ``ops.head.chunk_space`` for two sides, each with half of the response rows."""
    stride, elements = vocabulary, CHUNK_ELEMENTS
    if setup.device_bytes is not None:
        stride = round_up(vocabulary, ROW_BYTES // 4)
        elements = gpu_chunk_elements(setup.device_bytes // 4, 2 * stride)
    return 8 * stride * max(1, min(elements // (2 * stride), ceil(setup.response_rows / 2)))


def largest_tree(shape: ModelShape, setup: Setup, free_bytes: int) -> int:
    """Tokens of the largest tree that fits: a multiple of 256, and 256 even if that does not fit.

    Args:
        shape, setup: model and training; a larger tree has more response rows in the proportion that ``setup`` gives.
        free_bytes: memory for all that ``memory`` counts, of which a tenth stays free for what it does not.
    """
    rows = setup.response_rows / setup.max_tokens

    def total(tokens: int) -> float:
        return memory(shape, replace(setup, max_tokens=tokens, response_rows=ceil(rows * tokens))).total

    sizes = range(256, 2**22, 256)
    return sizes[max(bisect_right(sizes, USABLE * free_bytes, key=total) - 1, 0)]


def forward_flops(shape: ModelShape, tokens: int, rows: int, depth: float = 0.0) -> float:
    """Operations of all layers on ``tokens``, each attending to ``depth`` on average; ``rows`` of them are read."""
    feed_forward, (queries, keys) = 3 * shape.hidden * shape.intermediate, shape.widths
    layer = 2 * shape.hidden * (queries + keys) + feed_forward + 2 * queries * depth
    return 2.0 * (layer * tokens * shape.layers - feed_forward * (tokens - rows))


def flops_per_step(
    shape: ModelShape, tokens: int, complete_rows: int, masked_rows: int,
    *, depth: float = 0.0, trained: float = 1.0, gradient_checkpointing: bool = False,
) -> float:  # fmt: skip
    """Operations of one optimizer step, forward and backward; of one process where the numbers are its own.

    Args:
        tokens, complete_rows, masked_rows: of all its trees; rows are tokens that predict a response token.
        depth: how many tokens one attends to, on average.
        trained, gradient_checkpointing: as in ``Setup``.
    """
    forward, products = (forward_flops(shape, tokens, complete_rows + masked_rows, seen) for seen in (depth, 0.0))
    # Backward, attention has five products for two, since it forms its scores again.
    total = forward * (1 + gradient_checkpointing) + products + 2.5 * (forward - products)
    if trained < 1:
        adapters = (6 + 2 * gradient_checkpointing) * trained * shape.parameters * tokens
        return total + adapters + 2.0 * shape.head_parameters * (2 * complete_rows + 3 * masked_rows)
    # A layer is repeated up to the last tensor that it keeps: without its last product, but for the last layer.
    left_out = 2 * shape.hidden * shape.intermediate * tokens * (shape.layers - 1) * gradient_checkpointing
    return total + products - left_out + 2.0 * shape.head_parameters * (3 * complete_rows + 4 * masked_rows)


def step_seconds(
    shape: ModelShape, setup: Setup, tokens: int, complete_rows: int, masked_rows: int,
    *, flops_per_second: float, bytes_per_second: float = inf, depth: float = 0.0,
) -> float:  # fmt: skip
    """Time of an optimizer step if computing and exchanging go on side by side: that of the longer of them.

    Args:
        tokens, complete_rows, masked_rows, depth: of one process, as in ``flops_per_step``.
        flops_per_second, bytes_per_second: what one process achieves; what it receives when all exchange.
    """
    options = {"trained": setup.trained, "gradient_checkpointing": setup.gradient_checkpointing}
    flops = flops_per_step(shape, tokens, complete_rows, masked_rows, depth=depth, **options)
    trained = setup.trained * shape.parameters
    # Gradients, in a sum that all receive; from full sharding for each tree, and the weights for both of its passes.
    received = 2 * setup.trained_bytes * trained
    if setup.sharding == "full":
        received = ceil(tokens / setup.max_tokens) * setup.compute_bytes * (trained + 2 * shape.parameters)
    return max(flops / flops_per_second, received * (1 - 1 / setup.processes) / bytes_per_second)


def plan() -> str:
    """The table of docs/scaling.md as Markdown, which states what it assumes."""
    small, large = _llama(4096, 32, 14336, 32), _llama(8192, 80, 28672, 64)
    full = Setup(
        max_tokens=8192, response_rows=2880, processes=8, sharding="full", compute_bytes=2,
        gradient_checkpointing=True, device_bytes=80 * 10**9,
    )  # fmt: skip
    lora = replace(full, processes=1, sharding="none", weight_bytes=2, trained=41943040 / small.parameters)
    columns = [
        _column("8B, 8 GPUs, FSDP2", small, full),
        _column("8B, 1 GPU, LoRA", small, lora),
        _column("70B, 64 GPUs, FSDP2", large, replace(full, processes=64)),
    ]
    first, *rest = (f"| {name} | {' | '.join(column[name] for column in columns)} |" for name in columns[0])
    return "\n".join([first, "| --- " * (1 + len(columns)) + "|", *rest])


def _llama(hidden: int, layers: int, intermediate: int, heads: int) -> ModelShape:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256}
    return ModelShape.of(AutoConfig.for_model("llama", **sizes))


def _column(title: str, shape: ModelShape, setup: Setup) -> dict[str, str]:
    parts, gpu, instances = memory(shape, setup), setup.device_bytes or 0, 18 * setup.processes
    work = setup.max_tokens, setup.response_rows // 2, setup.response_rows // 2
    exchanging = step_seconds(shape, setup, *work, flops_per_second=inf, bytes_per_second=2e11)
    seconds = max(exchanging, step_seconds(shape, setup, *work, flops_per_second=4e14, depth=278))
    return {
        "one GPU of": title,
        **{f"{name}, GB": f"{size / 1e9:.1f}" for name, size in vars(parts).items()},
        "**peak, GB**": f"{parts.total / 1e9:.1f}",
        "largest tree, tokens": f"{largest_tree(shape, setup, gpu):,}",
        "without checkpointing": f"{largest_tree(shape, replace(setup, gradient_checkpointing=False), gpu):,}",
        "seconds a tree": f"{seconds:.2f}",
        "of them exchanging": f"{exchanging:.2f}",
        "instances a second, all GPUs": f"{instances / seconds:.0f}",
        "tokens a second, all GPUs": f"{instances * 400 / seconds:,.0f}",
    }


if __name__ == "__main__":
    print(plan())
