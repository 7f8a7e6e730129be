"""What only some model families need, and why some are refused; loaded for those alone (see load.is_plain).

Whatever can be told is told from the model's config, before weights are loaded: a dry run finds it too. What is done
and refused for which family: docs/families.md, which examples/benchmark/families.py prints.
"""

import inspect
import itertools
import re
import sys
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.quantizers.auto import AutoHfQuantizer

from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.adapter import weightless
from dpo_kit.model.batches import measuring
from dpo_kit.model.head import AGREES, CAPS
from dpo_kit.model.scoring import trained_terms, uses_fused_head

ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}  # unless their config says that they are causal
ALIASES = {CAPS[0]: CAPS[1:], "num_experts": ("num_local_experts", "n_routed_experts")}
"""What TRL reads in a config, and other names under which families keep it."""


def fit_family(settings: Settings, config: Any, data: Prepared) -> None:
    """Make the family of `config` readable to TRL. ModelError for models that do not predict the next token from the
    text before it, and for weights that are published quantised where they are to be tuned themselves, or cannot be
    read; ConfigError for rows, or held-out prompts with drawn answers, that are longer than a table of positions.
    """
    model, kind, what = settings.model, config.model_type, None
    if config.is_encoder_decoder:
        what = "an encoder-decoder"
    elif kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not model.trust_remote_code:
        seeing = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        what = "a vision model whose text part cannot be had alone" if seeing else "no language model that generates"
    elif kind in ("xlnet", "cpmant") or (
        kind in ENCODERS and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False))
    ):
        what = "an encoder, in which a token sees those after it"
    if what:
        raise ModelError(
            f"model.path={model.path} is {what} (model_type {kind}), and preference tuning here takes decoders of "
            "text: name a causal language model"
        )
    if (given := getattr(config, "quantization_config", None)) is not None:
        method = given["quant_method"]
        if model.tuning == "full":
            raise ModelError(
                f"model.path={model.path} is published in a quantised form ({method}), whose weights cannot be tuned: "
                "take model.tuning=lora, or the original repository"
            )
        try:
            AutoHfQuantizer.from_config(given, pre_quantized=True).validate_environment(device_map=None)
        except Exception as error:  # ImportError for a package, RuntimeError for a device, and others
            raise ModelError(
                f"model.path={model.path} is quantised with {method}, which cannot be read here: "
                f"{str(error).strip().splitlines()[0]}. Install what is missing, or take the original repository with "
                "model.tuning=qlora"
            ) from error
    _add_aliases(config.get_text_config())
    _refuse_no_balance(settings, config)
    if (last := _positions(config)) is None:
        return
    answers = (max(row["tokens"].get(name, 0) for name in ("chosen", "rejected", "completion")) for row in data.train)
    longest = max(row["tokens"]["prompt"] + answer for row, answer in zip(data.train, answers, strict=True))
    trained = min(longest, settings.trl["max_length"] or longest)
    if trained > last:
        raise ConfigError(
            f"model.path={model.path} knows {last} positions, and rows to train on have up to {trained} tokens: say "
            f"trl.max_length={last}"
        )
    drawn = settings.callbacks.at_most("max_new_tokens")
    prompt = max((row["tokens"]["prompt"] for row in data.select), default=0)
    if settings.callbacks.kl_drift and prompt + drawn > last:
        raise ConfigError(
            f"model.path={model.path} knows {last} positions, and answers of callbacks.max_new_tokens={drawn} tokens "
            f"would be drawn after held-out prompts of up to {prompt}: say "
            + (f"callbacks.max_new_tokens={last - prompt}" if prompt < last else "callbacks.kl_drift=false")
        )


def _add_aliases(text: Any) -> None:
    """Let what TRL reads be found where this family's configs keep it; nothing of it is saved with the model."""
    type(text).attribute_map = type(text).attribute_map | aliases(text)


def aliases(text: Any) -> dict[str, str]:
    """What TRL reads of this config → the name under which the family keeps it."""
    known, given = vars(text), type(text).attribute_map
    owns = {
        name: [other for other in (given.get(name), *others) if other in known]
        for name, others in ALIASES.items()
        if name not in known
    }
    return {name: own[0] for name, own in owns.items() if own}


def _refuse_no_balance(settings: Settings, config: Any) -> None:
    """ConfigError where TRL would add an auxiliary loss of experts that it cannot work out for a model of `config`."""
    text = config.get_text_config()
    if "router_aux_loss_coef" not in settings.trl or not hasattr(text, "output_router_logits"):
        return
    asked, own = settings.trl["router_aux_loss_coef"], getattr(text, "router_aux_loss_coef", 0.0)
    weight = own if asked is None else asked
    if weight and not (hasattr(text, "num_experts") and hasattr(text, "num_experts_per_tok") and _is_balanced(config)):
        raise ConfigError(
            f"trl.router_aux_loss_coef={weight:g}{' (of the model)' if asked is None else ''}: TRL cannot work out "
            f"the auxiliary loss of the experts of a {text.model_type}: trl.router_aux_loss_coef=0 trains without"
        )


def _is_balanced(config: Any) -> bool:
    """Whether a model of `config` has routers whose logits it returns, and Mixtral's auxiliary loss, which is TRL's."""
    model = weightless(config)
    own = getattr(sys.modules[type(model).__module__], load_balancing_loss_func.__name__, load_balancing_loss_func)
    recorded = (
        (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", []) for module in model.modules()
    )
    listed = (each if isinstance(each, list) else [each] for each in recorded)
    kinds = tuple(getattr(recorder, "target_class", recorder) for recorder in itertools.chain(*listed))
    has_routers = not kinds or any(isinstance(module, kinds) for module in model.modules())
    theirs = inspect.signature(load_balancing_loss_func).parameters
    return has_routers and [*inspect.signature(own).parameters] == [*theirs]


def _positions(config: Any) -> int | None:
    """How many positions a model of this config has a table for; None where positions are worked out."""
    text = config.get_text_config()
    last = getattr(text, "max_position_embeddings", None)
    if last is None or getattr(text, "rope_parameters", None):
        return None
    model = weightless(config)
    tables = [*model.named_parameters(), *model.named_buffers()]
    known = [table.shape[0] for name, table in tables if re.search("pos|wpe", name) and table.ndim == 2]
    return last if any(last <= rows <= last + 8 for rows in known) else None  # OPT and others begin at 2


def fit_trainer(trainer: Any) -> None:
    """Switch off what drops and jitters where TRL is to and cannot; ModelError where its loss would read other
    log-probabilities than the model gives, or the model looks ahead.
    """
    model, reference = trainer.model, getattr(trainer, "ref_model", None)
    others = [] if reference is None else [reference]
    for each in [model, *others] if trainer.args.disable_dropout else ():
        switch_off_noise(each)
    kind, vocabulary = model.config.model_type, model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(2, vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
    ids[1, :7] = ids[0, :7]
    with measuring(trainer, *others):
        first, second = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
        near = AGREES.get(model.dtype, 2e-2) * first.abs().max()
        if (first[:7] - second[:7]).abs().max() > near:
            raise ModelError(f"in a {kind} a token sees those after it, so that it has no log-probabilities to tune")
        if not uses_fused_head(type(trainer)):
            return
        expected = first[:-1].log_softmax(-1)[torch.arange(7), ids[0, 1:]]
        row = (ids[0, :1].tolist(), ids[0, 1:].tolist())
        if (trained_terms(model, [row], 0)[0].float() - expected).abs().max() > near:
            raise ModelError(
                f"the logits of a {kind} are not its head on its last hidden states, of which {type(trainer).__name__} "
                "makes log-probabilities: its loss would be that of another model. Take method=orpo, cpo or simpo, "
                "which read the logits"
            )


def switch_off_noise(model: Any) -> None:
    """No dropout and no jitter that modules keep as plain numbers: TRL's disable_dropout passes over these."""
    for module in model.modules():
        for name, value in [*vars(module).items()]:
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
