"""What a new LoRA is put on: modules that the model has, and that training reaches. Loaded for such adapters alone."""

import logging
import re
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.model.bypassed import bypassed, short_names
from dpo_kit.model.scoring import uses_fused_head

log = logging.getLogger(__name__)


def fit_targets(adapter: LoraConfig, policy: PreTrainedModel, trainer: type) -> None:
    """Leave out of all-linear what an adapter would not reach. ConfigError for names of modules that the policy lacks,
    and for named ones that `trainer` would never train; a warning for one of two embeddings that the policy ties.
    """
    head = next((name for name, module in policy.named_modules() if module is policy.get_output_embeddings()), None)
    if head and _is_target(head, adapter.target_modules) and uses_fused_head(trainer):
        raise ConfigError(
            f"model.lora.target_modules puts an adapter on {head}, but {trainer.__name__} works out log-probabilities "
            f"from the head's own weights, so that it would never be trained: take {head} out, or train the whole "
            f"head, model.lora.modules_to_save=[{head}]"
        )
    past = bypassed(policy)
    if adapter.target_modules == "all-linear" and past and not isinstance(adapter.exclude_modules, str):
        adapter.exclude_modules = sorted(short_names(past) | set(adapter.exclude_modules or ()))
    elif named := [name for name in past if _is_target(name, adapter.target_modules)]:
        raise ConfigError(
            f"model.lora.target_modules puts an adapter on {named[0]}, whose weights this model also reads past the "
            "module, so that the adapter would not be trained there: take it out; all-linear leaves it out by itself"
        )
    modules, touched = dict(policy.named_modules()), set()
    for key in ("target_modules", "modules_to_save"):
        # a string is a pattern or all-linear, which PEFT itself refuses where it fits nothing
        names = [] if isinstance(given := getattr(adapter, key), str) else sorted(given or [])
        touched |= {"lm_head", "embed_tokens"} & {*names}
        for wanted in names:
            if not any(_is_target(name, [wanted]) for name in modules):
                own = sorted({name.rpartition(".")[2] for name, each in modules.items() if [*each.parameters(False)]})
                meant = did_you_mean(wanted, own, f": it has {', '.join(own)}", count=2)
                raise ConfigError(f"model.lora.{key}: this model has no module {wanted}{meant}")
    if touched and policy.config.get_text_config().tie_word_embeddings and not adapter.ensure_weight_tying:
        log.warning(
            "model.lora puts an adapter on %s, one of two embeddings that this model ties: they will differ after "
            "training, and the exported model holds both; +model.lora.ensure_weight_tying=true keeps them one",
            " and ".join(sorted(touched)),
        )


def _is_target(name: str, targets: Any) -> bool:
    """Whether PEFT means the module `name` by `targets`: ends of names, or a pattern of whole ones."""
    if isinstance(targets, str):
        return targets != "all-linear" and bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets or ())
