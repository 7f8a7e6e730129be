"""A run in plain TRL: a short script beside the run's TRL arguments and the token ids of its rows."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from dpo_kit.config.identity import recall_settings
from dpo_kit.config.settings import Model, Settings
from dpo_kit.data.prepare import Prepared
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.export.folder import complete_or_absent, finished
from dpo_kit.model.load import load_tokenizer, read_template
from dpo_kit.model.origin import base_of, has_tokenizer, read_adapter
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import digest, read_json, write_json, write_text
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.trainer.given_tokens import GivenTokens
from dpo_kit.trainer.manifest import contents, keep_date
from dpo_kit.training import build_dataset, held_out_rows, read_data

log = logging.getLogger(__name__)
NAME = "reproduce.py"
ON_A_CPU = [
    "for module in model.modules():  # bitsandbytes-foundation/bitsandbytes#1804",
    '    if hasattr(module, "support_avx512bf16_for_cpu"):',
    "        module.support_avx512bf16_for_cpu = False",
]
SCRIPT = '''\
"""{title}, as dpo_kit {versions[dpo-kit]} ran it, in plain TRL {versions[trl]}.

{start}
"""

import json
from pathlib import Path
from typing import Any

{imports}

Base = {trainer}


{given}

HERE = Path(__file__).parent
config = json.loads((HERE / "trl_config.json").read_text())
config |= {{"output_dir": str(HERE / "output"), "report_to": "none"}}
{model}
trainer = GivenTokens(
    model=model,
    args={config}(**config),
    train_dataset=load_from_disk(str(HERE / "train")),
    eval_dataset=load_from_disk(str(HERE / "eval")),
    processing_class=tokenizer,{more}
)
trainer.train()
trainer.save_model(str(HERE / "model"))
'''


def write_reproduction(run: RunDirectory, out: Path) -> Path:
    """Write `out` with script, arguments and rows, complete or not at all; the script's path.

    ConfigError where the run has not ended well or drew its answers itself, or `out` is there already; DataError where
    the rows that its sources give now are not those that it trained on.
    """
    manifest, result = finished(run)
    if manifest["config"]["method"]["rows"] == "prompts":
        raise ConfigError(
            f"mode=script repeats a run on its prepared rows, but {run.root} drew its answers and had them judged "
            "while it trained: its command in manifest.json repeats it, seeded; mode=model exports its policy"
        )
    if out.exists():
        raise ConfigError(f"{out} is there already: delete it, or name another folder with out=DIR")
    quiet_libraries()
    settings = recall_settings(manifest)
    data = prepare_again(settings, run)
    rows = {"train": data.train, "eval": held_out_rows(data, settings)}
    with complete_or_absent(out) as aside:
        for name, part in rows.items():
            build_dataset(part, settings.method.rows).save_to_disk(str(aside / name))
        write_json(aside / "trl_config.json", read_json(run.trl_config) | {"hub_token": None, "push_to_hub": False})
        write_text(aside / NAME, build_script(settings, manifest, result))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    log.info("%s: %d rows to train on, %d held out, %.1f MB", out, len(rows["train"]), len(rows["eval"]), size)
    _say_what_differs(settings)
    return out / NAME


def prepare_again(settings: Settings, run: RunDirectory) -> Prepared:
    """The run's rows from their sources; DataError where their fingerprints are not those of its manifest."""
    tokenizer, manifest = load_tokenizer(settings.model), read_json(run.manifest)
    keep_date(run, tokenizer)
    data = read_data(settings, tokenizer)
    for name, rows in (("train", data.train), ("select", data.select)):
        if digest(contents(rows)) != manifest["data"][name]["sha256"]:
            raise DataError(
                f"data.train={settings.data.train} gives other {name} rows now than the run was made of "
                f"({len(rows)}, then {manifest['data'][name]['rows']}): bring its files back to what they were"
            )
    return data


def build_script(settings: Settings, manifest: dict[str, Any], result: dict[str, Any]) -> str:
    """The text of the script."""
    model, machine = settings.model, manifest["machine"]
    processes = machine["world_size"]
    (trainer_module, trainer), (config_module, config) = (
        path.rsplit(".", 1) for path in (settings.method.trainer, settings.method.config)
    )
    wanted = {"datasets": {"load_from_disk"}, "transformers": {"AutoModelForCausalLM", "AutoTokenizer"}}
    wanted.setdefault(trainer_module, set()).add(trainer)
    wanted.setdefault(config_module, set()).add(config)
    if model.tuning != "full":
        wanted["peft"] = {"PeftModel" if read_adapter(model) else "LoraConfig"}
    if model.tuning == "qlora":
        wanted["transformers"].add("BitsAndBytesConfig")
    imports = [f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(wanted.items())]
    start = f"python {NAME}" if processes == 1 else f"accelerate launch --num_processes {processes} {NAME}"
    return SCRIPT.format(
        title=f"{result['method']} of {model.path}, beta {result['beta']:g}, seed {result['seed']}",
        versions=manifest["versions"],
        start=f"Start it with: {start}",
        imports="\n".join(["import torch", *imports] if model.tuning == "qlora" else imports),
        model="\n".join([*_model_lines(model, machine), *_tokenizer_lines(model)]),
        trainer=trainer,
        given=inspect.getsource(GivenTokens),
        config=config,
        more="".join(f"\n    {line}," for line in _trainer_lines(settings, machine)),
    )


def _model_lines(model: Model, machine: dict[str, Any]) -> list[str]:
    """Base (quantised for QLoRA) and, where training went on with one, adapter."""
    base = base_of(model)
    options = _arguments(base.path, **_code(base), **_numbers(base, machine))
    lines = [f"model = AutoModelForCausalLM.from_pretrained({options})"]
    if base.tuning == "qlora":
        lines = [
            f"quantization = BitsAndBytesConfig({_arguments(**base.quantization)})",
            f"model = AutoModelForCausalLM.from_pretrained({options}, "
            'device_map={"": 0 if torch.cuda.is_available() else "cpu"}, quantization_config=quantization)',
            *(ON_A_CPU if machine["device"] == "cpu" else []),
        ]
    if read_adapter(model) is None:
        return lines
    options = _arguments(model.path, revision=model.revision, is_trainable=True)
    return [*lines, f"model = PeftModel.from_pretrained(model, {options})  # TRL keeps a copy of it as the reference"]


def _tokenizer_lines(model: Model) -> list[str]:
    holder = model if has_tokenizer(model.path, model.revision) else base_of(model)
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({_arguments(holder.path, **_code(holder))})"]
    lines.append("tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token")
    template = holder.chat_template and read_template(holder.chat_template)
    return [*lines, *([f"tokenizer.chat_template = {template!r}"] if template else [])]


def _trainer_lines(settings: Settings, machine: dict[str, Any]) -> list[str]:
    model, lines = settings.model, []
    if model.tuning != "full" and read_adapter(model) is None:
        lines.append(f"peft_config=LoraConfig({_arguments(**(model.lora | {'task_type': 'CAUSAL_LM'}))})")
    if model.reference and settings.method.reference:
        reference = _arguments(model.reference, **_numbers(model, machine))
        lines.append(f"ref_model=AutoModelForCausalLM.from_pretrained({reference})")
    return lines


def _code(model: Model) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code or None}


def _numbers(model: Model, machine: dict[str, Any]) -> dict[str, Any]:
    return {"dtype": machine["dtype"], "attn_implementation": model.attn_implementation}


def _arguments(*first: str, **options: Any) -> str:
    """The inside of a call's brackets; what is None is left to the called one."""
    named = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return ", ".join([*map(repr, first), *named])


def _say_what_differs(settings: Settings) -> None:
    """Where the script's numbers cannot be those of the run beyond rounding."""
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
