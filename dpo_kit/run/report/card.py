"""The model card: what a finished model is, in words and numbers, for whoever finds it later. No secrets."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo_kit.run.redact import redact, redact_command
from dpo_kit.run.report.markdown import table
from dpo_kit.run.report.picture import ceiling_line, interval_text, result_rows

DIRECTION = {
    "closer": "a higher beta keeps the policy closer to the reference",
    "stronger": "a higher beta strengthens the preference term",
}
SHOWN_ARGUMENTS = ("learning_rate", "num_train_epochs", "max_steps", "max_length", "loss_type", "lr_scheduler_type")


def write_card(run_dir: str | Path, result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    """Write `run_dir`/model/README.md and return its text.

    `result` and `manifest` are what result.json and manifest.json hold; both are redacted first.
    """
    text = card_text(result, manifest)
    path = Path(run_dir) / "model" / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def card_text(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    judged: Mapping[str, Any] | None = None,
    export: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown. `judged` is what evaluation/result.json holds, `export` what export.json holds: with it the
    card is that of a model without adapters. All are redacted first.
    """
    result, manifest = redact(dict(result) | {"merged": export is not None}), redact(dict(manifest))
    parts = [part(result, manifest) for part in (_front_matter, _headline, _measured, _findings, _data, _training)]
    parts += [_export(redact(dict(export))) if export else "", _versions(result, manifest)]
    parts.insert(3, _judged(redact(dict(judged or {}))))
    return "\n\n".join(filter(None, parts)) + "\n"


def _front_matter(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    plain = result["tuning"] == "full" or result.get("merged")
    facts: dict[str, Any] = {
        "library_name": "transformers" if plain else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["dpo_kit", "trl", "preference-tuning", result["method"]],
    }
    if result["model"].count("/") == 1 and not Path(result["model"]).exists():  # a hub id, no local folder
        facts["base_model"] = result["model"]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False).strip()}\n---"


def _headline(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    method = manifest["config"]["method"]
    meaning = f"{method['beta']['meaning']}; {DIRECTION[method['beta']['higher']]}"
    return (
        f"# {method['name']} of {result['model']}, beta {result['beta']:g}\n\n"
        f"{method['title']} ({method['paper']}): `{method['equation']}`\n\n"
        f"beta = {result['beta']:g}: {meaning}."
    )


def _measured(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    rows = table(("", "start", "end", "95 % interval"), result_rows(result))
    note = ceiling_line(result.get("final") or {}, result.get("ceiling"))
    about = "On held-out prompts, against the model that training started from."
    return "\n\n".join(filter(None, ("## Measured", about, rows, note and f"{note[0].upper()}{note[1:]}.")))


def _judged(judged: Mapping[str, Any]) -> str:
    if not isinstance(judged.get("win_rate"), int | float):
        return ""
    interval = interval_text(judged, "win_rate", ".3f")
    return f"Win rate against the reference, ties counting half: {judged['win_rate']:.3f} {interval}".rstrip() + "."


def _findings(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    found = [f"- {item['symptom']} {item['meaning']}" for item in result.get("findings") or []]
    return "## To know\n\n" + "\n".join(found) if found else ""


def _data(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    data = manifest["config"].get("data", {})
    sources = [f"- {name}: `{data[name]}`" for name in ("train", "eval") if data.get(name)]
    splits = [
        f"- {name}: {facts['rows']} rows, sha256 `{str(facts['sha256'])[:16]}`"
        for name, facts in manifest.get("data", {}).items()
    ]
    return "## Data\n\n" + "\n".join(sources + splits)


def _training(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    arguments = manifest["config"].get("trl", {})
    shown = ", ".join(f"{name} {arguments[name]}" for name in SHOWN_ARGUMENTS if arguments.get(name) is not None)
    facts = f"{result['tuning']} tuning, {result['steps']} steps, seed {result['seed']}; {shown}."
    if adapter := manifest.get("model", {}).get("adapter"):
        options = f"r {adapter['r']}, alpha {adapter['lora_alpha']}"
        facts += f" Goes on from the LoRA ({options}) on `{adapter['base']}`; reference: {adapter['reference']}."
    command = redact_command(manifest.get("command") or "")
    return "\n\n".join(filter(None, ("## Training", facts, command and f"```\n{command}\n```")))


def _export(export: Mapping[str, Any]) -> str:
    return f"## Export\n\n{export['how']} Weights in {export['dtype']}. Checked on fixed prompts: {export['checked']}."


def _versions(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.get("versions", {}).items())
    weights = manifest.get("model", {})
    start = weights.get("sha256") or weights.get("revision")
    return f"## Versions\n\n{versions}." + (f"\n\nStarted from weights `{start}`." if start else "")
