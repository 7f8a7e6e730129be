"""A run in plain TRL: a short script beside the run's TRL arguments and the token ids of its rows."""

import inspect
import logging
from pathlib import Path
from typing import Any

from dpo_kit.config.recall import recall_settings
from dpo_kit.config.settings import Settings
from dpo_kit.config.tools import refuse_existing
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.export.folder import complete_or_absent
from dpo_kit.model.load import is_plain, load_tokenizer, read_config, read_template
from dpo_kit.model.origin import ADAPTER, find_start, has_tokenizer, quantised_by
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import digest, read_json, write_json, write_text
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.trainer.manifest import contents, keep_date
from dpo_kit.trainer.rows import GivenTokens, build_dataset, held_out_rows, read_data

log = logging.getLogger(__name__)
NAME = "reproduce.py"
QUIET = "for each in filter(None, (trainer.model, getattr(trainer, 'ref_model', None))):\n    switch_off_noise(each)\n"
ON_A_CPU = [
    "for module in model.modules():  # bitsandbytes-foundation/bitsandbytes#1804",
    '    if hasattr(module, "support_avx512bf16_for_cpu"):',
    "        module.support_avx512bf16_for_cpu = False",
]
SCRIPT = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")


def write_reproduction(run: RunDirectory, out: Path) -> Path:
    """Write `out` with script, arguments and rows, complete or not at all; the script's path. ConfigError where the run
    has not ended well or drew its answers itself, or `out` is there already; DataError where the rows that its sources
    give now are not those that it trained on.
    """
    manifest, result = run.read_finished()
    if manifest["config"]["method"]["rows"] == "prompts":
        raise ConfigError(
            f"mode=script repeats a run on its prepared rows, but {run.root} drew its answers and had them judged "
            "while it trained: its command in manifest.json repeats it, seeded; mode=model exports its policy"
        )
    refuse_existing("out", out)
    quiet_libraries()
    settings = recall_settings(manifest)
    tokenizer = load_tokenizer(settings.model)
    keep_date(run, tokenizer)
    data = read_data(settings, tokenizer)
    for name, part in (("train", data.train), ("select", data.select)):
        if digest(contents(part)) != manifest["data"][name]["sha256"]:
            raise DataError(
                f"data.train={settings.data.train} gives other {name} rows now than the run was made of "
                f"({len(part)}, then {manifest['data'][name]['rows']}): bring its files back to what they were"
            )
    rows = {"train": data.train, "eval": held_out_rows(data, settings)}
    with complete_or_absent(out) as aside:
        for name, part in rows.items():
            build_dataset(part, settings.method.rows).save_to_disk(str(aside / name))
        write_json(aside / "trl_config.json", read_json(run.trl_config) | {"hub_token": None, "push_to_hub": False})
        write_text(aside / NAME, build_script(settings, run, manifest, result))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    log.info("%s: %d rows to train on, %d held out, %.1f MB", out, len(rows["train"]), len(rows["eval"]), size)
    drops = not settings.trl["disable_dropout"] and settings.model.tuning != "full"
    if drops and settings.model.lora.get("lora_dropout") and settings.speed.share_prefix:
        log.warning(
            "which values LoRA's dropout drops depends on how a batch is laid out: the script's losses scatter around "
            "those of the run; runs with trl.disable_dropout=true or speed.share_prefix=false are repeated exactly"
        )
    if extra := [callback["_target_"] for callback in settings.callbacks.extra]:
        log.warning(
            "the run's own callbacks are not in the script (%s): add those that change training", ", ".join(extra)
        )
    return out / NAME


def build_script(settings: Settings, run: RunDirectory, manifest: dict[str, Any], result: dict[str, Any]) -> str:
    """The text of the script."""
    start = find_start(settings.model)
    model, base, adapter = start.model, start.base, start.adapter
    machine, is_qlora = manifest["machine"], settings.model.tuning == "qlora"
    config = read_config(model)
    numbers = {"dtype": machine["dtype"], "attn_implementation": model.attn_implementation}
    wanted = {"datasets": {"load_from_disk"}, "transformers": {"AutoModelForCausalLM", "AutoTokenizer"}}
    for path in (settings.method.trainer, settings.method.config):
        module, _, name = path.rpartition(".")
        wanted.setdefault(module, set()).add(name)
    lines, more = [], []  # of the model and its tokenizer; arguments of the trainer

    loads = _arguments(base.path, revision=base.revision, trust_remote_code=base.trust_remote_code or None, **numbers)
    if is_qlora:
        from dpo_kit.model.adapter import kept_whole

        whole = {} if is_plain(config) else {"llm_int8_skip_modules": kept_whole(config)}
        wanted["transformers"].add("BitsAndBytesConfig")
        lines.append(f"quantization = BitsAndBytesConfig({_arguments(**whole | base.quantization)})")
        loads += ', device_map={"": 0 if torch.cuda.is_available() else "cpu"}, quantization_config=quantization'
    elif quantised_by(base.path, base.revision) == "mxfp4":
        wanted["transformers"].add("Mxfp4Config")
        loads += ", quantization_config=Mxfp4Config(dequantize=True)"
    lines.append(f"model = AutoModelForCausalLM.from_pretrained({loads})")
    lines += ON_A_CPU if is_qlora and machine["device"] == "cpu" else []
    given, quiet = [inspect.getsource(GivenTokens)], ""
    if not is_plain(config):
        from dpo_kit.trainer.families import aliases, switch_off_noise

        if names := aliases(config.get_text_config()):
            lines.append("kind = type(model.config.get_text_config())")
            lines.append(f"kind.attribute_map = kind.attribute_map | {names!r}  # under which TRL looks for them")
        if settings.trl["disable_dropout"]:
            given.append(inspect.getsource(switch_off_noise))
            quiet = QUIET
    if adapter:
        wanted["peft"] = {"PeftModel"}
        loads = _arguments(model.path, revision=model.revision, is_trainable=True)
        lines.append(f"model = PeftModel.from_pretrained(model, {loads})  # TRL keeps a copy of it as the reference")
    elif model.tuning != "full":
        wanted["peft"] = {"LoraConfig"}
        fitted = {"exclude_modules": read_json(run.model / ADAPTER)["exclude_modules"], "task_type": "CAUSAL_LM"}
        more.append(f"peft_config=LoraConfig({_arguments(**model.lora | fitted)})")
    if model.reference and settings.method.reference:
        more.append(f"ref_model=AutoModelForCausalLM.from_pretrained({_arguments(model.reference, **numbers)})")

    holder = model if has_tokenizer(model.path, model.revision) else base
    loads = _arguments(holder.path, revision=holder.revision, trust_remote_code=holder.trust_remote_code or None)
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({loads})")
    lines.append("tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token")
    if template := holder.chat_template and read_template(holder.chat_template):
        lines.append(f"tokenizer.chat_template = {template!r}")

    imports = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(wanted.items())]
    processes = machine["world_size"]
    launch = "python" if processes == 1 else f"accelerate launch --num_processes {processes}"
    return SCRIPT.format(
        title=f"{result['method']} of {model.path}, beta {result['beta']:g}, seed {result['seed']}",
        versions=manifest["versions"],
        start=f"Start it with: {launch} {NAME}",
        imports="\n".join(["import torch", *imports] if is_qlora else imports),
        model="\n".join(lines),
        trainer=settings.method.trainer.rpartition(".")[2],
        given="\n\n".join(given),
        quiet=quiet,
        config=settings.method.config.rpartition(".")[2],
        more="".join(f"\n    {line}," for line in more),
    )


def _arguments(*first: str, **options: Any) -> str:
    """The inside of a call's brackets; what is None is left to the called one."""
    named = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return ", ".join([*map(repr, first), *named])
