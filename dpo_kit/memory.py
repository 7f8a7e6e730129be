"""How much memory a run takes, from the model's config alone: its modules are built without weights (meta device).

Activations are counted, not looked up in a formula: a forward pass on the meta device, laid out as the run's batches,
tells every tensor that is kept for the backward pass.
"""

from __future__ import annotations

import functools
import inspect
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import disable_dropout_in_model

from dpo_kit.arguments import import_class
from dpo_kit.errors import ModelError
from dpo_kit.hardware import has_accelerator, weight_dtype
from dpo_kit.model import build_adapter
from dpo_kit.prefix import WORTH, Layout, attend, attend_in_blocks, pays_in_blocks
from dpo_kit.scoring import LOGITS_BYTES, TOKENS_PER_BATCH
from dpo_kit.settings import Callbacks, Model, Settings
from dpo_kit.speed import HEAD_TOKENS

log = logging.getLogger(__name__)
Rows = Sequence[dict[str, Any]]
Shape = tuple[tuple[int, int], ...]  # of each row of a batch: tokens shared with an earlier row, tokens of its own
NAME = "dpo_kit_counted"  # of our attention, among transformers' own
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: nf4 with doubly quantised scales
OPTIMIZER_BYTES = {"adafactor": 0.1, "sgd": 0.0, "lion": 4.0, "8bit": 2.0, "paged": 0.0}  # a trained fp32 weight
HEAD_VOCABULARY, HEAD_COPIES = 32768, 3  # of the tiles of TRL's fused LM head
LOGITS_COPIES = 3.5  # logits, their log-softmax for two losses, and their gradient, where logits are built whole
DRAWN_AT_ONCE = 64
ROOM = 0.8  # of the free memory: estimates are up to a fifth too low


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for, and the peaks of a training step and of measuring."""

    parameters: int
    reference: int  # a second model that stays beside the policy
    gradients: int
    optimizer: int
    activations: int
    recomputed: int  # one layer's activations, where checkpointing computes them again
    logits: int
    measuring: int  # key-value cache, logits and a reloaded reference, while the probe is at work

    @property
    def lasting(self) -> int:
        return self.parameters + self.reference + self.optimizer

    def peak(self, accumulates: bool) -> int:
        """Bytes at the highest moment. Gradients take the place of activations, layer by layer, in the backward pass;
        where they are accumulated over several batches they stay beside them.
        """
        forward = self.activations + max(self.logits, self.recomputed) + (self.gradients if accumulates else 0)
        return self.lasting + max(forward, self.gradients + self.recomputed, self.measuring)


def estimate(settings: Settings, args: Any, rows: Rows, *, loads_reference: bool, shares: bool) -> Memory:
    """Memory of one process that trains on `rows` with the TRL arguments `args`.

    `loads_reference`: a reference model stays beside the policy. `shares`: each token is computed once.
    """
    model = build_meta(settings.model, args)
    weights = list(model.parameters())
    trained = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    parameters = sum(_bytes(name, p, settings.model, model) for name, p in model.named_parameters())
    shape = worst_batch(rows, args.per_device_train_batch_size, shares, args)
    answered = sum(own for _, own in shape)
    vocabulary = model.config.get_text_config().vocab_size
    fused = "fused_lm_head" in inspect.getsource(import_class(settings.method.trainer))
    padded = len(shape) * max(sum(row) for row in shape)
    cast = _cast_weights(weights, args)
    kept, recomputed = count_activations(model, shape, args.gradient_checkpointing)
    return Memory(
        parameters=parameters,
        reference=parameters if loads_reference else 0,
        gradients=trained,
        optimizer=int(trained / 4 * optimizer_bytes(args.optim)),
        activations=kept + cast,
        recomputed=recomputed and recomputed + cast,  # autocast makes its copies anew
        logits=_head(model, answered, vocabulary) if fused else int(LOGITS_COPIES * 4 * padded * vocabulary),
        measuring=_measuring(settings.callbacks, model, parameters, settings.model.tuning == "full", rows),
    )


def fits(settings: Settings, args: Any, rows: Rows, *, loads_reference: bool) -> bool:
    """Whether a run with the TRL arguments `args` is expected to find room in the memory that is free now."""
    shares = settings.speed.share_prefix is not False
    try:
        needed = estimate(settings, args, rows, loads_reference=loads_reference, shares=shares)
    except Exception as error:  # whatever an architecture raises that cannot be run without weights
        log.info("memory cannot be estimated for this model (%s)", type(error).__name__)
        return True
    return needed.peak(args.gradient_accumulation_steps > 1) <= ROOM * free_memory()


def free_memory() -> int:
    """Bytes that are free on the accelerator, or on this machine where there is none."""
    return torch.cuda.mem_get_info()[0] if has_accelerator() else psutil.virtual_memory().available


def read_config(model: Model) -> Any:
    """The model's config alone. ModelError where there is none."""
    try:
        return AutoConfig.from_pretrained(model.path, revision=model.revision or "main")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path={model.path} cannot be planned with: {str(error).splitlines()[0]} Name a "
            "folder or hub id with a config.json"
        ) from error


def build_meta(model: Model, args: Any) -> Any:
    """The policy without weights, with its adapter, ready for a training step. ModelError where it has no config."""
    config = read_config(model)
    half = (args.bf16 or args.fp16) and model.tuning != "full"  # of fp32 weights, autocast leaves most of it in fp32
    dtype = torch.bfloat16 if half else weight_dtype(model.dtype, model.tuning)
    with torch.device("meta"):
        bare: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if adapter := build_adapter(model):
            from peft import get_peft_model

            policy: Any = get_peft_model(bare, adapter)
        else:
            policy = bare
    if args.gradient_checkpointing:
        bare.activation_checkpointing_enable({"use_reentrant": False})
        if adapter:
            bare.enable_input_require_grads()
    bare.set_attn_implementation(NAME)
    if args.disable_dropout:
        disable_dropout_in_model(policy)
    return policy.train()


def count_activations(model: Any, shape: Shape, checkpointing: bool) -> tuple[int, int]:
    """Bytes that a forward pass over a batch of `shape` keeps for the backward pass, and those of one layer where
    layers are computed again there, else 0.
    """
    kept = _kept_by(model, shape)
    if not checkpointing:
        return kept, 0
    _bare(model).activation_checkpointing_disable()
    return kept, _kept_by(model, shape) // model.config.get_text_config().num_hidden_layers


def _bare(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _kept_by(model: Any, shape: Shape) -> int:
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    ids = torch.zeros(1, sum(own for _, own in shape), dtype=torch.long, device="meta")
    layout = Layout(ids=ids, positions=ids, source=ids[0], rows=shape)
    mask = torch.ones(1, 1, 1, 1, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _bare(model).base_model(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False, layout=layout)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As `prefix.attend_row` on this machine: every fused attention keeps query, key, value, output and one number a
    token, which the meta device's own would not; in blocks the scores are kept too."""
    if not has_accelerator() and pays_in_blocks(query, key):
        return attend_in_blocks(query, key, value, scale)
    square = query.shape[-2] == key.shape[-2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, square, scale=scale)[0]


AttentionInterface.register(NAME, functools.partial(attend, kernel=_attend))
AttentionMaskInterface.register(NAME, sdpa_mask)


def worst_batch(rows: Rows, size: int, shares: bool, args: Any) -> Shape:
    """The batch with the most tokens of an epoch: as shuffled, or the longest rows together where rows are grouped."""
    order = list(range(len(rows)))
    if getattr(args, "train_sampling_strategy", "random") != "random":
        order.sort(key=lambda index: -sum(rows[index]["tokens"].values()))
    else:
        random.Random(0).shuffle(order)
    batches = [[rows[index] for index in order[at : at + size]] for at in range(0, len(order), size)]
    shapes = [batch_shape([row["tokens"] for row in batch], shares, args.max_length) for batch in batches]
    return max(shapes, key=lambda shape: sum(own for _, own in shape))


def batch_shape(lengths: Sequence[dict[str, int]], shares: bool, max_length: int | None) -> Shape:
    """The rows of a batch, of which chosen and rejected share their prompt; padded to the longest where that costs
    little more, or where nothing is shared."""
    names = [name for name in lengths[0] if name not in ("prompt", "cut")]
    rows = [_cut(each["prompt"], each[name], max_length) for name in names for each in lengths]
    longest = max(prompt + answer for prompt, answer in rows)
    own = [(0, p + a) if index < len(lengths) else (p, a) for index, (p, a) in enumerate(rows)]
    if shares and sum(tokens for _, tokens in own) <= WORTH * longest * len(rows):
        return tuple(own)
    return tuple((0, longest) for _ in rows)


def optimizer_bytes(name: str) -> float:
    """Bytes that the optimizer keeps for each trained fp32 weight; Adam's two values unless its name says less."""
    return next((size for part, size in OPTIMIZER_BYTES.items() if part in str(name).lower()), 8.0)


def _cut(prompt: int, answer: int, max_length: int | None) -> tuple[int, int]:
    longest = max_length or prompt + answer
    return min(prompt, longest), min(answer, max(0, longest - prompt))


def _bytes(name: str, weight: Tensor, model: Model, policy: Any) -> int:
    """Of one weight as it is loaded: 4-bit where it is quantised."""
    outside = ("embed", "lm_head", "norm", "lora_")
    quantised = model.tuning == "qlora" and weight.dim() == 2 and not any(part in name for part in outside)
    size = 4 if weight.requires_grad else weight_dtype(model.dtype, model.tuning).itemsize
    return int(weight.numel() * (FOUR_BIT if quantised else size))


def _cast_weights(weights: Sequence[Tensor], args: Any) -> int:
    """The half-precision copies that autocast keeps of fp32 weights for the length of a forward pass."""
    if not (args.bf16 or args.fp16):
        return 0
    return sum(2 * p.numel() for p in weights if p.requires_grad and p.dim() == 2)


def _head(model: Any, tokens: int, vocabulary: int) -> int:
    """TRL's fused LM head: tiles of logits, and the gradient of a head that is trained."""
    at_once = TOKEN_CHUNK_SIZE if has_accelerator() else HEAD_TOKENS
    tile = 4 * min(tokens, at_once) * min(vocabulary, HEAD_VOCABULARY)
    head = model.get_output_embeddings().weight
    return HEAD_COPIES * tile + (4 * head.numel() if head.requires_grad else 0)


def _measuring(wanted: Callbacks, model: Any, parameters: int, reloads: bool, rows: Rows) -> int:
    """The probe: the largest of sampling (keys, values) and of scoring (logits of both models)."""
    if not (wanted.preference_margin or wanted.implicit_reward or wanted.kl_drift):
        return 0
    text = model.config.get_text_config()
    tokens = max(1, min(TOKENS_PER_BATCH, LOGITS_BYTES // (4 * text.vocab_size)))
    logits = 4 * tokens * text.vocab_size
    states = 4 * tokens * (4 * text.hidden_size + 2 * getattr(text, "intermediate_size", 4 * text.hidden_size))
    if not wanted.kl_drift:
        return logits + states
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    prompt = max(row["tokens"]["prompt"] for row in rows[:DRAWN_AT_ONCE])
    length = prompt + wanted.max_new_tokens
    drawn = min(DRAWN_AT_ONCE, wanted.prompts)
    cache = 2 * 4 * drawn * length * text.num_hidden_layers * heads * width
    return (parameters if reloads else 0) + max(cache, 2 * logits + states)
