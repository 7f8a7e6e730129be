"""A run's policy as a plain transformers folder: complete or absent, checked from its own files."""

import gc
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo_kit.config.recall import recall_config
from dpo_kit.config.settings import Model
from dpo_kit.errors import ConfigError, ModelError
from dpo_kit.model.load import end_as_trained, load_weights
from dpo_kit.model.origin import find_start
from dpo_kit.run.directory import FACTS, RunDirectory
from dpo_kit.run.files import hash_weights, read_json, texts, write_json, write_text
from dpo_kit.run.history import last_step, latest, read_metrics
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.run.report.card import card_text
from dpo_kit.trainer.resume.whole_or_absent import SAVING, put_in_place

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")
NOISE = 1e-4  # of the largest logit: what rounding in float32 makes of sums in another order
SAMPLES = 16
TEXTS = texts(__file__)
Text = tuple[list[int], int]  # token ids, and the place of the first one that counts
FAR = 0.02  # nats a token: more than rounding costs a model of some billion parameters, to 4 bits even


@dataclass(frozen=True)
class Distance:
    """How far two models are apart on texts: logits, relative to the largest; KL in nats per token; greedy tokens."""

    logits: float
    kl: float
    greedy: float  # share of positions with the same most probable token


def export_run(
    run: RunDirectory, out: Path, dtype: str = "auto", base: str = "original", step: int | None = None
) -> dict[str, Any]:
    """Write `out` and return its export.json; one that is there already, and is the same, is left as it is.

    `base` is what a QLoRA adapter is merged into: the original weights, or the "dequantised" ones it was trained on.
    With a `step` the policy is what the run kept after so many steps, not its last one.
    ConfigError where the run has not ended well or `out` holds something else; ModelError where the folder would not
    be the policy that the run left.
    """
    manifest, result = run.read_finished()
    if step is not None:
        run = run.at(step)
        then = latest([row for row in read_metrics(run.metrics) if row["step"] == step])
        then = {key: then[key] for key in result["final"] if key in then}
        result |= {"final": then, "steps": step, "findings": []}  # those are of its end
    model = Model(**recall_config(manifest)["model"])
    quiet_libraries()
    start = find_start(model).base  # of an adapter; what training left decides what auto is
    if dtype == "auto":
        left, revision = (run.model, None) if model.tuning == "full" else (start.path, start.revision)
        dtype = str(AutoConfig.from_pretrained(left, revision=revision or "main").dtype or torch.float32)
        dtype = dtype.removeprefix("torch.")
    is_qlora = model.tuning == "qlora"
    asked = {"config_hash": manifest["config_hash"], "dtype": dtype, "base": base if is_qlora else None, "step": step}
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        earlier = read_json(out / FACTS) if (out / FACTS).exists() else {}
        if {name: earlier.get(name) for name in asked} != asked:
            raise ConfigError(f"out={out} holds something else: choose another folder, or delete that one")
        log.info("%s is there already", out)
        return earlier
    recorded = manifest["model"].get("adapter", {}).get("base_sha256") or manifest["model"]["sha256"]
    if model.tuning != "full" and recorded and hash_weights(start.path) != recorded:
        raise ModelError(
            f"{start.path} does not hold the weights that the adapter was trained on (sha256 {recorded[:12]}… then): "
            "bring them back, or train again on what is there now"
        )
    with complete_or_absent(out) as aside:
        distance, checked = _write(run, model, dtype, base, aside)
        how = TEXTS["how"][base if is_qlora else model.tuning]
        facts = {**asked, "how": how, "checked": checked, **asdict(distance)}
        evaluated = run.evaluation_of(step) / "result.json"
        judged = read_json(evaluated) if evaluated.exists() else None
        write_text(aside / "README.md", card_text(result, manifest, judged, facts))
        write_json(aside / FACTS, facts)
    return facts


@contextmanager
def complete_or_absent(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, which takes its place at the end of the block; gone where that fails."""
    aside = out.with_name(f"{SAVING}-{out.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        put_in_place(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def push(out: Path, repository: str, *, private: bool) -> str:
    """Upload `out` to `repository` on the hub, made where it is not there; its address. ConfigError where refused."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=out, commit_message="Export of dpo_kit")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"push={repository}: the hub refuses it ({reason}); run `hf auth login`; the folder is {out}"
        ) from error
    return str(made)


def _write(run: RunDirectory, model: Model, dtype: str, base: str, aside: Path) -> tuple[Distance, str]:
    """Write the export into `aside`; how far it is from the policy, also in words (QLoRA: also from that in 4 bit)."""
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    for how_loaded in ("is_local", "local_files_only"):  # transformers would save these, true on this machine only
        tokenizer.init_kwargs.pop(how_loaded, None)
    texts = read_texts(run, tokenizer)
    policy, before = merge(model, run, texts, base)
    policy.config.use_cache = True  # which training had turned off
    end_as_trained(policy, tokenizer)
    if policy.generation_config.pad_token_id is None:
        policy.generation_config.pad_token_id = tokenizer.pad_token_id
    with torch.no_grad():
        for tensor in policy.state_dict().values():  # it goes on computing in float32, with what `dtype` can hold
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(getattr(torch, dtype)))
    rounded = text_logits(policy, texts)
    try:
        policy.to(getattr(torch, dtype)).save_pretrained(aside)
    except ValueError as error:  # transformers refuses to write a generation config that contradicts itself
        raise ModelError(f"the base's generation config cannot be saved: {error}") from error
    tokenizer.save_pretrained(aside)
    del policy
    gc.collect()
    if faults := find_faults(aside):
        raise ModelError(f"the export would not be served right: {'; '.join(faults)}")
    if not tokenizer.chat_template:
        log.warning("the tokenizer has no chat template: servers can complete text with this model, but not chat")
    plain = AutoModelForCausalLM.from_pretrained(aside, dtype="auto").eval()  # as anybody loads it, without dpo_kit
    distance = compare(before, text_logits(plain, texts))
    refuse_other("writing the export", compare(rounded, text_logits(plain.float(), texts)))
    if not distance.kl <= FAR:
        log.warning(
            "rounding to %s moves the policy by %.2g nats a token: dtype=float32 is exact, at twice the size",
            *(dtype, distance.kl),
        )
    checked = (
        f"KL {distance.kl:.1e} nats a token, the same most probable token at {distance.greedy:.1%} of positions, "
        f"logits within {distance.logits:.1e} of the largest"
    )
    if model.tuning != "qlora":
        return distance, checked
    trained = PeftModel.from_pretrained(load_weights(find_start(model).base), run.model).eval()  # type: ignore[arg-type]
    kl = compare(text_logits(trained, texts), before).kl
    if kl > FAR:
        log.warning(
            "the export is %.2f nats a token from the policy that was trained and measured in 4 bit, since the "
            "base is not rounded any more: measure it again, or take base=dequantised",
            kl,
        )
    return distance, f"{checked}; against the policy as trained in 4 bit, KL {kl:.1e} nats a token"


def find_faults(folder: Path) -> list[str]:
    """Why a server (vLLM, TGI, transformers) would refuse `folder` or would not end its answers; [] if right."""
    names = ("config.json", "generation_config.json", "tokenizer_config.json")
    if missing := [name for name in names if not (folder / name).exists()]:
        return [f"{name} is missing" for name in missing]
    config, generation = read_json(folder / "config.json"), read_json(folder / "generation_config.json")
    text = config.get("text_config") or config
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype")
    checks = {
        "config.json names no architectures": not config.get("architectures"),
        f"config.json has dtype {dtype}, not one of {', '.join(DTYPES)}": dtype not in DTYPES,
        "config.json asks for code of a repository (auto_map)": "auto_map" in config,
        "config.json asks for quantisation (quantization_config) of weights that have none": "quantization_config"
        in config,
        "there are no weights in safetensors": not any(folder.glob("*.safetensors")),
    }
    eos, ends = AutoTokenizer.from_pretrained(folder).eos_token_id, generation.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    for end in ends:
        outside = end is not None and not 0 <= end < text["vocab_size"]
        checks[f"eos_token_id {end} lies outside the vocabulary"] = outside
    run_on = f"generation_config.json does not end at the tokenizer's EOS (id {eos}): answers would run on"
    checks[run_on] = eos is not None and eos not in ends
    return [fault for fault, holds in checks.items() if holds]


def read_texts(run: RunDirectory, tokenizer: Any) -> list[Text]:
    """What the policy answered at the end of `run`; else fixed prompts behind what the template gives all of them."""
    texts = []
    for row in last_step(read_metrics(run.samples))[:SAMPLES]:
        prompt = encode(tokenizer, row["prompt"])
        if answer := tokenizer(row["answer"], add_special_tokens=False)["input_ids"]:
            texts.append(([*prompt, *answer], len(prompt)))
    if texts:
        return texts
    prompts = [encode(tokenizer, prompt) for prompt in TEXTS["prompts"]]
    same = next(place for place, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1)
    return [(ids, max(1, same)) for ids in prompts]


def merge(model: Model, run: RunDirectory, texts: Sequence[Text], base: str) -> tuple[PreTrainedModel, Tensor]:
    """The policy of `run` in float32 without adapters, and its logits on `texts` before: (positions, vocabulary).
    ModelError where the base is not the one that training started from, or where merging changed the logits.
    """
    if model.tuning == "full":
        policy = load_weights(model.model_copy(update={"dtype": "float32"}), str(run.model))
        return policy, text_logits(policy, texts)
    start = find_start(model).base
    if base == "dequantised":  # with the rounding that its 4-bit form had in training
        weights = load_weights(start).dequantize(dtype=torch.float32)
    else:
        weights = load_weights(start.model_copy(update={"dtype": "float32", "tuning": "lora"}))
        if getattr(weights, "is_quantized", False):
            raise ModelError(
                f"model.path={start.path} is published in a quantised form, into which no adapter can be merged "
                "without rounding it away: name the original repository as model.path, or say base=dequantised"
            )
    head: Any = weights.get_output_embeddings()
    tied = head is not None and head.weight is weights.get_input_embeddings().weight
    if tied:  # merged into a shared matrix, an adapter on either would change both
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    adapted = PeftModel.from_pretrained(weights, run.model).eval()  # type: ignore[arg-type]
    before = text_logits(adapted, texts)
    merged = adapted.merge_and_unload(safe_merge=True)
    if tied:
        head, embedding = merged.get_output_embeddings(), merged.get_input_embeddings()
        alike = torch.equal(head.weight, embedding.weight)
        merged.config.get_text_config().tie_word_embeddings = merged.config.tie_word_embeddings = alike
        if alike:
            head.weight = embedding.weight
        else:
            merged._tied_weights_keys = merged.all_tied_weights_keys = {}
            log.warning("the adapter changed one of the tied embeddings: the export holds both, untied")
    refuse_other("merging the adapter", compare(before, text_logits(merged, texts)))
    return merged, before


@torch.no_grad()
def text_logits(model: Any, texts: Sequence[Text]) -> Tensor:
    """What `model` predicts for each token of `texts` that counts: logits, (tokens, vocabulary)."""
    parts = []
    for ids, start in texts:
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
        parts.append(logits[start - 1 : -1].float().cpu())
    return torch.cat(parts)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of `prompt` as a user's message, or as plain text where there is no chat template."""
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def compare(one: Tensor, other: Tensor) -> Distance:
    """How far `other` is from `one`: KL(one‖other), logits; shapes (positions, vocabulary) twice."""
    logp, logq = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return Distance(
        logits=float((one - other).abs().max() / one.abs().max()),
        kl=max(0.0, float((logp.exp() * (logp - logq)).sum(-1).mean())),
        greedy=float((one.argmax(-1) == other.argmax(-1)).float().mean()),
    )


def refuse_other(what: str, distance: Distance) -> None:
    """ModelError where `distance`, measured in float32, is more than rounding; not a number counts as more."""
    if not distance.logits <= NOISE:
        raise ModelError(
            f"{what} changed the policy: its logits differ by {distance.logits:.2g} of the largest one, where the "
            f"order of sums explains {NOISE:g}; nothing is exported"
        )
