"""The model card: what a finished model is, in words and numbers, for whoever finds it later. No secrets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.run.files import write_text
from dpo_kit.run.redact import redact, redact_command

DIRECTION = {
    "closer": "a higher beta keeps the policy closer to the reference",
    "stronger": "a higher beta strengthens the preference term",
}
SHOWN_ARGUMENTS = ("learning_rate", "num_train_epochs", "max_steps", "max_length", "loss_type", "lr_scheduler_type")


def write_card(run_dir: str | Path, result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Write `run_dir`/model/README.md from what result.json and manifest.json hold, redacted; return its text."""
    text = card_text(result, manifest)
    write_text(Path(run_dir) / "model" / "README.md", text)
    return text


def card_text(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    judged: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown, redacted. `judged`: evaluation/result.json; `export`: export.json, of merged weights."""
    result, manifest = redact(dict(result)), redact(dict(manifest))
    judged, export = redact(dict(judged or {})), redact(dict(export or {}))
    config, weights = manifest["config"], manifest.get("model", {})
    method, data, arguments = config["method"], config.get("data", {}), config.get("trl", {})
    facts: dict[str, Any] = {
        "library_name": "peft" if result["tuning"] != "full" and not export else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo_kit", "trl", "preference-tuning", result["method"]],
    }
    if result["model"].count("/") == 1 and not Path(result["model"]).exists():  # a hub id, no local folder
        facts["base_model"] = result["model"]
    parts = [
        f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---",
        f"# {method['name']} of {result['model']}, beta {result['beta']:g}",
        f"{method['title']} ({method['paper']}): `{method['equation']}`",
        f"beta = {result['beta']:g}: {method['beta']['meaning']}; {DIRECTION[method['beta']['higher']]}.",
    ]
    if result["final"]:
        from dpo_kit.run.report.results import measured

        parts += measured(result)
    if judged.get("win_rate") is not None:
        from dpo_kit.run.report.numbers import value_text

        parts.append(f"Win rate against the reference, ties counting half: {value_text(judged, 'win_rate')}.")
    if findings := result.get("findings"):
        noticed = "\n".join(f"- {finding['symptom']} {finding['meaning']}" for finding in findings)
        parts.append(f"## To know\n\n{noticed}")
    lines = [f"- {name}: `{data[name]}`" for name in ("train", "eval") if data.get(name)]
    for name, split in manifest.get("data", {}).items():
        lines.append(f"- {name}: {split['rows']} rows, sha256 `{str(split['sha256'])[:16]}`")
    parts.append("## Data\n\n" + "\n".join(lines))
    shown = ", ".join(f"{name} {arguments[name]}" for name in SHOWN_ARGUMENTS if arguments.get(name) is not None)
    trained = f"{result['tuning']} tuning, {result['steps']} steps, seed {result['seed']}; {shown}."
    if lora := weights.get("adapter"):
        options = f"r {lora['r']}, alpha {lora['lora_alpha']}"
        trained += f" Goes on from the LoRA ({options}) on `{lora['base']}`; reference: {lora['reference']}."
    command = redact_command(manifest.get("command") or "")
    parts += ["## Training", trained, f"```\n{command}\n```" if command else ""]
    if export:
        checked = f"Checked on fixed prompts: {export['checked']}."
        parts.append(f"## Export\n\n{export['how']} Weights in {export['dtype']}. {checked}")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    parts.append(f"## Versions\n\n{versions}.")
    if start := weights.get("sha256") or weights.get("revision"):
        parts.append(f"Started from weights `{start}`.")
    return "\n\n".join(filter(None, parts)) + "\n"
