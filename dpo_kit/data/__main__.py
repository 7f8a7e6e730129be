"""`python -m dpo_kit data mode=check|curate|convert|build`: preference data, before anything is trained on them."""

from __future__ import annotations

import gc
import sys
import textwrap
from collections.abc import Sequence

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.compose import CONF, check, compose_unchecked
from dpo_kit.config.explain import describe_fault, explain, unknown_key
from dpo_kit.config.help import keys_of
from dpo_kit.config.places import refuse_unwritable
from dpo_kit.config.settings import Settings
from dpo_kit.config.tools import refuse_foreign, run_tool
from dpo_kit.data.build.plan import check_plan
from dpo_kit.data.curate.options import Convert, Curate, Tool
from dpo_kit.errors import ConfigError
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.words import refuse_dashes

USAGE = """\
usage: python -m dpo_kit data [mode=check|curate|convert|build] [group=option | key=value] …

  data=jsonl data.train=FILE   what to look at: the same keys as for training (data.eval, data.columns, …)
  data.form=NAME               what the rows are, where their columns do not say it
  data.benchmark=FILE          prompts that must not be trained on
  data.reference_margin=true   ask the untrained reference which answer it prefers
  model=… trl.max_length=…     whose tokenizer counts, and where it cuts
  method=kto                   what the rows are to train
  out=DIR                      where to write (default: a time stamp under outputs/)

  mode=check                   data_report.json, data_report.png, dropped_rows.jsonl
  mode=curate                  curated.jsonl, rejects.jsonl, manifest.json, a report before and after
  mode=convert                 converted.jsonl, rejects.jsonl, manifest.json
  mode=build                   pairs from prompts, models and a judge (build.limit=100 judge=llm judge.model=…)

keys with their defaults (curate.min_agreement=0.8):
"""
OWN = ("mode", "out", "curate", "convert")
ONLY_IN = {
    "curate": "curate",
    "convert": "convert",
    "build": "build",
    "judge": "build",
}  # keys by their first part: mode
KNOWN = [
    f"{group}.{field.alias or name}"
    for group, options in (("curate", Curate), ("convert", Convert))
    for name, field in options.model_fields.items()
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 failed, or 2 where the arguments or the data are refused."""
    text = (CONF / "tool" / "data.yaml").read_text(encoding="utf-8")  # its keys are explained there
    keys = textwrap.indent(text[text.index("curate:") :], "  ")
    keys += keys_of("build", "default") + keys_of("judge", "llm", "reward_model", "gold", "human")
    return run_tool("data", USAGE + keys, arguments, work)


def work(arguments: Sequence[str]) -> None:
    """Do what `arguments` (Hydra overrides) ask for. Raises ConfigError, DataError, ModelError."""
    cfg = compose_tool(arguments)
    if cfg.out:
        refuse_foreign("out", str(cfg.out))
    else:
        refuse_unwritable("out", "outputs")
    if cfg.mode == "build":
        check_plan(cfg)  # before what builds is imported, which takes seconds
        refuse_idle_words(arguments, cfg.mode)
        from dpo_kit.data.build.pairs import build_pairs, show_build

        show_build(build_pairs(cfg), arguments)
        return
    settings, tool = check_tool(cfg)
    refuse_idle_words(arguments, tool.mode)
    tool.words = tuple(arguments)
    from dpo_kit.data.curate.modes import MODES

    gc.set_threshold(200_000)  # rows are plain data without cycles, and looking through 100,000 of them costs seconds
    MODES[tool.mode](settings, tool)


def refuse_idle_words(arguments: Sequence[str], mode: str) -> None:
    """ConfigError for words that another mode would obey."""
    for word in arguments:
        needed = ONLY_IN.get(word.lstrip("+~").partition("=")[0].partition(".")[0], mode)
        if needed != mode:
            raise ConfigError(f"{word} does nothing with mode={mode}: take mode={needed}, or leave it out")


def compose_tool(arguments: Sequence[str]) -> DictConfig:
    """The config of a run with the tool's own keys beside it. Raises ConfigError."""
    refuse_dashes(arguments, arguments)
    for word in arguments:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"arguments are key=value, got {word}; did you mean data=jsonl data.train={word}?")
        if key.startswith(("curate.", "convert.")) and key not in KNOWN:
            raise ConfigError(unknown_key(key, KNOWN))
    return compose_unchecked(["+tool=data", *arguments])


def check_tool(cfg: DictConfig) -> tuple[Settings, Tool]:
    """The config of the run and the tool's own options, both checked. Raises ConfigError."""
    of_a_run = [str(key) for key in cfg if key not in (*OWN, "build", "judge")]
    settings = check(OmegaConf.masked_copy(cfg, of_a_run), trains=False)
    refuse_unusable(settings)
    try:
        return settings, Tool(**OmegaConf.to_container(OmegaConf.masked_copy(cfg, list(OWN)), resolve=True))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise explain(error) from error
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(describe_fault(fault, KNOWN) for fault in error.errors())) from error


if __name__ == "__main__":
    sys.exit(main())
