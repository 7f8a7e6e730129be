"""`python -m dpo_kit export run=DIR`: a finished run for others to load, or to repeat in plain TRL."""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo_kit.config.places import locate
from dpo_kit.config.tools import Values, parse, refuse_existing, refuse_foreign, run_tool, usage
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import FACTS, RunDirectory
from dpo_kit.run.quiet import quiet_imports

CHOICES = {
    "mode": ("model", "script"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "base": ("original", "dequantised"),
    "private": ("true", "false"),
}
ONLY_MODEL = ("dtype", "base", "push", "private", "step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 done, 1 failed, 2 refused."""
    return run_tool("export", usage(__file__), arguments, export)


def export(arguments: Sequence[str]) -> None:
    """Do what `arguments` ask for and say where it is. Raises ConfigError, DataError, ModelError."""
    values = parse_words(arguments)
    run, step = RunDirectory(locate("run", values["run"])), int(values["step"]) if "step" in values else None
    export_to = run.export if step is None else run.export.with_name(f"{run.export.name}-step-{step}")
    out = Path(values.get("out") or (export_to if values["mode"] == "model" else run.reproduction))
    if values["mode"] == "script":
        refuse_existing("out", out)
    elif not (out / FACTS).exists():  # else an earlier export, perhaps this very one
        refuse_foreign("out", out)
    run.read_finished()
    everyone, ours = logging.getLogger(), logging.getLogger("dpo_kit")
    silence, terminal, level = logging.NullHandler(), logging.StreamHandler(), ours.level
    everyone.addHandler(silence)  # libraries and their warnings say nothing
    ours.addHandler(terminal)
    ours.setLevel(logging.INFO)
    quiet_imports()
    try:
        if values["mode"] == "script":
            from dpo_kit.export.script import write_reproduction

            script = write_reproduction(run, out)
            sys.stdout.write(f"{script.read_text(encoding='utf-8')}\nnext: python {shlex.quote(str(script))}\n")
            return
        from dpo_kit.export.folder import export_run, push

        facts = export_run(run, out, values["dtype"], values["base"], step)
        sys.stdout.write(f"{out}: {facts['dtype']}. {facts['how']}\nchecked: {facts['checked']}\n")
        if "push" in values:
            sys.stdout.write(f"on the hub: {push(out, values['push'], private=values['private'] == 'true')}\n")
        name = shlex.quote(str(out))
        sys.stdout.write(f"next: transformers chat {name}, or vllm serve {name}\n")
    finally:
        everyone.removeHandler(silence)
        ours.removeHandler(terminal)
        ours.setLevel(level)


def parse_words(arguments: Sequence[str]) -> Values:
    """{key: value} of the command line, defaults filled in. Raises ConfigError."""
    keys = ("run", "out", "push", "step", *CHOICES)
    given = parse(arguments, keys, needed="run", meaning="DIR, a finished run")
    values = {key: choices[0] for key, choices in CHOICES.items()} | given
    for key, choices in CHOICES.items():
        if values[key] not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {values[key]}")
    if values["mode"] == "script" and (extra := [key for key in ONLY_MODEL if key in given]):
        raise ConfigError(f"{', '.join(extra)} belongs to mode=model, not to mode=script")
    if "step" in values and not values["step"].isdecimal():
        raise ConfigError(f"step must be a number of steps, got {values['step']}")
    if "push" in values and values["push"].count("/") != 1:
        raise ConfigError(f"push must be org/name, got {values['push']}")
    return values


if __name__ == "__main__":
    sys.exit(main())
