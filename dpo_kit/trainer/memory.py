"""How much memory a run takes, from the model's config alone: its modules are built without weights (fake tensors).

Activations are counted, not looked up in a formula: a forward pass of fake tensors, laid out as the run's batches and
under its autocast, tells every tensor that is kept for the backward pass.
"""

import logging
import random
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import get_class
from peft import PeftConfig, get_peft_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import disable_dropout_in_model

from dpo_kit.config.settings import Callbacks, Model, Settings
from dpo_kit.data.other_rows import with_answer_lengths
from dpo_kit.errors import ConfigError
from dpo_kit.model.adapter import build_adapter, fit_targets, refuse_uncopied
from dpo_kit.model.batches import bare, mlp_width
from dpo_kit.model.hardware import ROOM, free_memory, has_accelerator, weight_dtype
from dpo_kit.model.load import read_config
from dpo_kit.model.origin import find_start
from dpo_kit.model.predicted import TILE_BYTES
from dpo_kit.model.sampling import DRAWN_AT_ONCE, cache_width
from dpo_kit.model.scoring import TOKENS_PER_BATCH, uses_fused_head
from dpo_kit.model.tokens import Truncation
from dpo_kit.trainer.prefix import WORTH, Layout, attend_row_by_row, in_autocast_dtype
from dpo_kit.trainer.speed import HEAD_TOKENS, SHARING

log = logging.getLogger(__name__)
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # of what cannot be counted we say so
Rows = Sequence[dict[str, Any]]
Shape = tuple[tuple[int, int], ...]  # of each row of a batch: tokens shared with an earlier row, tokens of its own
FAKE = FakeTensorMode()  # tensors have shape, dtype and device, as on a CPU, but no memory
FUSED = "dpo_kit_counted"  # of our attention with a fused kernel in every case, among transformers' own
LIBRARIES = 79_000_000  # bytes that what training imports takes of a CPU's memory (with a model of 2 MB, x86-64)
PRIMITIVES = 64_000_000  # of code that oneDNN keeps for products in bf16 (ONEDNN_PRIMITIVE_CACHE_CAPACITY=0: none)
FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: nf4 with doubly quantised scales
OPTIMIZER_BYTES = {"adafactor": 0.1, "sgd": 0.0, "lion": 4.0, "8bit": 2.0, "paged": 0.0}  # a trained fp32 weight
HEAD_VOCABULARY, HEAD_COPIES = 32768, 3  # of the tiles of TRL's fused LM head
TILES = 8  # of fp32 logits that a KL over the vocabulary holds at once: both models', their logarithms, their terms
LOGITS_COPIES = 3.5  # logits, their log-softmax for two losses, and their gradient, where logits are built whole


@dataclass(frozen=True)
class Memory:
    """Bytes by what they are for, and the peaks of a training step and of measuring."""

    parameters: int
    reference: int  # a second model that stays beside the policy
    gradients: int
    optimizer: int
    passes: int  # at the highest moment of a forward and a backward pass, with gradients
    activations: int
    copies: int  # in half precision, of the weights, where checkpointing drops them after the forward pass
    recomputed: int  # one layer's activations, where checkpointing computes them again
    logits: int
    measuring: int  # key-value cache, logits and a reloaded reference, while the probe is at work
    libraries: int  # code, in the memory of a CPU

    @property
    def lasting(self) -> int:
        return self.libraries + self.parameters + self.reference + self.optimizer

    def peak(self, accumulates: bool) -> int:
        """Bytes at the highest moment. Gradients take the place of activations, layer by layer, in the backward pass;
        where they are accumulated over several batches they stay beside them.
        """
        forward = self.activations + max(self.copies + self.logits, self.recomputed)
        kept = self.gradients if accumulates else 0
        return self.lasting + max(forward + kept, self.passes, self.measuring)


def estimate(model: Any, settings: Settings, args: Any, rows: Rows, *, loads_reference: bool, shares: bool) -> Memory:
    """Memory of one process that trains `model` (weightless) on `rows` with the TRL arguments `args`.

    `loads_reference`: a reference model stays beside the policy. `shares`: each token is computed once.
    """
    rows = with_answer_lengths(rows, getattr(args, "max_new_tokens", None))
    weights = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() * p.element_size() for p in weights)
    parameters = weight_bytes(model, settings.model)
    shape = worst_batch(rows, args.per_device_train_batch_size, shares, args)
    vocabulary = model.config.get_text_config().vocab_size
    logits = int(LOGITS_COPIES * 4 * len(shape) * max(sum(row) for row in shape) * vocabulary)
    if uses_fused_head(get_class(settings.method.trainer)):  # tiles, and the gradient of a head that is trained
        at_once = min(sum(own for _, own in shape), TOKEN_CHUNK_SIZE if has_accelerator() else HEAD_TOKENS)
        head = model.get_output_embeddings().weight
        logits = HEAD_COPIES * 4 * at_once * min(vocabulary, HEAD_VOCABULARY) + 4 * head.numel() * head.requires_grad
    copies = 0
    if args.gradient_checkpointing and _autocast_dtype(args):  # autocast keeps them for the length of a forward pass
        copies = sum(2 * p.numel() for p in weights if p.dim() == 2 and p.dtype == torch.float32)
    try:
        passes, (kept, recomputed) = peak_of_passes(model, shape, args), count_activations(model, shape, args)
    except Exception as error:  # whatever an architecture raises that cannot run without weights, or not in a flat row
        log.info("activations cannot be counted for this model (%s)", type(error).__name__)
        passes = kept = recomputed = 0
    return Memory(
        parameters=parameters,
        reference=parameters if loads_reference else 0,
        gradients=trained,
        optimizer=int(trained / 4 * optimizer_bytes(args.optim)),
        passes=passes,
        activations=kept,
        copies=copies,
        recomputed=recomputed,
        logits=logits,
        measuring=_measuring(settings.callbacks, model, parameters, settings.model.tuning == "full", rows),
        libraries=0 if has_accelerator() else LIBRARIES + (PRIMITIVES if args.bf16 else 0),
    )


def fits(settings: Settings, args: Any, rows: Rows, *, loads_reference: bool) -> bool:
    """Whether a run with the TRL arguments `args` is expected to find room in the memory that is free now, counted."""
    try:
        needed = estimate_by_layers(settings, args, rows, loads_reference=loads_reference)
    except Exception as error:  # whatever an architecture raises that cannot be run without weights
        log.info("memory cannot be estimated for this model (%s)", type(error).__name__)
        return True
    return needed.peak(args.gradient_accumulation_steps > 1) <= ROOM * free_memory()


def estimate_by_layers(settings: Settings, args: Any, rows: Rows, *, loads_reference: bool) -> Memory:
    """`estimate`, drawn on from models of the first layer and of the first two: a whole one takes seconds to count."""

    def count(model: Any) -> Memory:
        shares = settings.speed.share_prefix is not False
        return estimate(model, settings, args, rows, loads_reference=loads_reference, shares=shares)

    whole = build_weightless(settings, args)
    layers = whole.config.get_text_config().num_hidden_layers
    try:
        one, two = (vars(count(build_weightless(settings, args, first))) for first in (1, 2))
    except Exception:  # an adapter, or a pattern in the config, that names layers by number
        return count(whole)
    drawn_on = Memory(**{name: one[name] + (layers - 1) * (two[name] - one[name]) for name in one})
    alike = drawn_on.parameters == weight_bytes(whole, settings.model)
    return drawn_on if alike else count(whole)


def build_weightless(settings: Settings, args: Any, layers: int | None = None) -> Any:
    """The policy without weights, ready for a training step; of its first `layers` alone where given. ModelError."""
    model, start = settings.model, find_start(settings.model)
    config = read_config(model)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    half = _autocast_dtype(args) if model.tuning == "qlora" else None  # 4-bit weights compute in half precision
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=half or weight_dtype(model.dtype, model.tuning))
        policy = plain
        adapter: Any = build_adapter(model)
        if start.adapter:
            adapter = PeftConfig.from_pretrained(model.path, revision=model.revision or "main")
            adapter.inference_mode = False  # which every saved adapter has
        if adapter:
            fit_targets(adapter, plain, get_class(settings.method.trainer))
            try:
                policy = get_peft_model(plain, adapter)
            except ValueError as error:
                raise ConfigError(f"model.lora: PEFT refuses it for this model: {error}") from error
            if start.adapter and model.reference is None and settings.method.rows != "prompts":
                if settings.method.reference:
                    refuse_uncopied(policy)
                policy.add_adapter("ref", adapter)
    if args.gradient_checkpointing:
        plain.activation_checkpointing_enable({"use_reentrant": False})
        if adapter:
            plain.enable_input_require_grads()
    if args.disable_dropout:
        disable_dropout_in_model(policy)
    fakes: dict[Tensor, Any] = {}  # of a CPU, which autocast knows, in place of those of the meta device
    with FAKE:
        for tensors in (each for module in policy.modules() for each in (module._parameters, module._buffers)):
            for name, tensor in tensors.items():
                if tensor is not None and tensor not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = isinstance(tensor, torch.nn.Parameter)
                    fakes[tensor] = torch.nn.Parameter(fake, tensor.requires_grad) if trained else fake
                tensors[name] = fakes.get(tensor)
    return policy.train()


def count_activations(model: Any, shape: Shape, args: Any) -> tuple[int, int]:
    """Bytes that a forward pass over a batch of `shape` keeps, and those of one layer that is computed again."""
    kept = _kept_by(model, shape, _autocast_dtype(args))
    if not args.gradient_checkpointing:
        return kept, 0
    bare(model).activation_checkpointing_disable()
    whole = _kept_by(model, shape, _autocast_dtype(args))
    return kept, whole // model.config.get_text_config().num_hidden_layers


def peak_of_passes(model: Any, shape: Shape, args: Any) -> int:
    """Bytes that live at once, at most, in forward and backward pass over a batch of `shape`, gradients included."""
    live = Live(model)
    with FAKE, live:
        states = _run(model, shape, _autocast_dtype(args))
        states.backward(torch.ones_like(states))
    for weight in model.parameters():
        weight.grad = None
    return live.peak


class Live(TorchDispatchMode):
    """Inside the block, what lives of the memory that operations return, weights of `model` aside: bytes."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.known = {weight.untyped_storage()._cdata for weight in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return results

    def _forget(self, storage: int, size: int) -> None:
        self.known.discard(storage)
        self.now -= size


def _autocast_dtype(args: Any) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _kept_by(model: Any, shape: Shape, dtype: torch.dtype | None) -> int:
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept[storage] = tensor
        return tensor

    with FAKE, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run(model, shape, dtype)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _run(model: Any, shape: Shape, dtype: torch.dtype | None) -> Tensor:
    """The hidden states of a batch of `shape` under autocast to `dtype`, by the attention that it has in training."""
    plain = len(set(shape)) == 1  # rows of one length, none of which shares anything: as padded ones are computed
    bare(model).set_attn_implementation(FUSED if plain or has_accelerator() else SHARING)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        ids = torch.zeros(1, sum(own for _, own in shape), dtype=torch.long)
        layout = Layout(ids, ids, ids[0], shape, keys=None, query_ends=ids[0], key_ends=ids[0])
        mask = torch.ones(1, 1, 1, 1)  # 4-D: used as it is
        given = {"input_ids": ids, "position_ids": ids, "attention_mask": mask, "use_cache": False, "layout": layout}
        return bare(model).base_model(**given).last_hidden_state


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layout: Layout, **options: Any
) -> tuple[Tensor, None]:
    """Fused attention, which keeps query, key, value, output and one number a token wherever it runs."""

    def kernel(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        square = query.shape[-2] == key.shape[-2]
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, square, scale=scale)[0]

    queries, keys, values = (x.transpose(1, 2) for x in in_autocast_dtype(query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return attend_row_by_row(queries, keys, values, layout, 1.0, None, kernel), None


AttentionInterface.register(FUSED, _attend)
AttentionMaskInterface.register(FUSED, sdpa_mask)


def worst_batch(rows: Rows, size: int, shares: bool, args: Any) -> Shape:
    """The batch with the most tokens of an epoch: as shuffled, in their order, or the longest rows together."""
    order = list(range(len(rows)))
    if args.train_sampling_strategy == "group_by_length":
        order.sort(key=lambda index: -sum(rows[index]["tokens"].values()))
    elif args.train_sampling_strategy == "random":
        random.Random(0).shuffle(order)
    batches = [[rows[index] for index in order[at : at + size]] for at in range(0, len(order), size)]
    shapes = [batch_shape([row["tokens"] for row in batch], shares, args.max_length) for batch in batches]
    return max(shapes, key=lambda shape: sum(own for _, own in shape))


def batch_shape(lengths: Sequence[dict[str, int]], shares: bool, max_length: int | None) -> Shape:
    """The rows of a batch; padded to the longest where that costs little more, or where nothing is shared."""
    names, cut = [name for name in lengths[0] if name not in ("prompt", "cut")], Truncation(max_length).cut
    cuts = [cut(range(each["prompt"]), range(each[name])) for name in names for each in lengths]
    rows = [(len(prompt), len(answer)) for prompt, answer in cuts]
    longest = max(prompt + answer for prompt, answer in rows)
    own = [(0, p + a) if index < len(lengths) else (p, a) for index, (p, a) in enumerate(rows)]
    if shares and sum(tokens for _, tokens in own) <= WORTH * longest * len(rows):
        return tuple(own)
    return tuple((0, longest) for _ in rows)


def optimizer_bytes(name: str) -> float:
    """Bytes that the optimizer keeps for each trained fp32 weight; Adam's two values unless its name says less."""
    return next((size for part, size in OPTIMIZER_BYTES.items() if part in str(name).lower()), 8.0)


def weight_bytes(policy: Any, model: Model) -> int:
    """Of all weights as they are loaded: 4-bit where they are quantised."""
    total, outside = 0, ("embed", "lm_head", "norm", "lora_")
    for name, weight in policy.named_parameters():
        quantised = model.tuning == "qlora" and weight.dim() == 2 and not any(part in name for part in outside)
        size = 4 if weight.requires_grad else weight_dtype(model.dtype, model.tuning).itemsize
        total += int(weight.numel() * (FOUR_BIT if quantised else size))
    return total


def _measuring(wanted: Callbacks, model: Any, parameters: int, reloads: bool, rows: Rows) -> int:
    """The probe: the larger of sampling (keys, values) and of scoring (states of a layer, tiles of logits)."""
    if not (wanted.scores_rows or wanted.kl_drift):
        return 0
    text = model.config.get_text_config()
    tiles = TILES * TILE_BYTES["cuda" if has_accelerator() else "cpu"]
    scoring = tiles + 4 * TOKENS_PER_BATCH * (4 * text.hidden_size + 2 * mlp_width(text))
    if not wanted.kl_drift:
        return scoring
    prompt = max(row["tokens"]["prompt"] for row in rows[:DRAWN_AT_ONCE])
    length = prompt + wanted.at_most("max_new_tokens")
    drawn = min(DRAWN_AT_ONCE, wanted.at_most("prompts"))
    cache = 2 * 4 * drawn * length * text.num_hidden_layers * cache_width(text)
    return (parameters if reloads else 0) + max(cache, scoring)
