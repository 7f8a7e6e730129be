"""`python -m dpo_kit data mode=check|curate|convert|build`: preference data, before anything is trained on them."""

import gc
import sys
import textwrap
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from dpo_kit.config.compose import CONF, check, compose_unchecked, resolve, typed
from dpo_kit.config.explain import unknown_key
from dpo_kit.config.help import keys_of
from dpo_kit.config.places import refuse_unwritable
from dpo_kit.config.tools import refuse_foreign, run_tool, usage
from dpo_kit.data.options import Convert, Curate, Tool, check_plan
from dpo_kit.errors import ConfigError
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.other_tools import refuse_dashes

OWN = ("mode", "out", "curate", "convert")
ONLY_IN = {"curate": "curate", "convert": "convert", "build": "build", "judge": "build"}  # key by its first part: mode
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
    return run_tool("data", usage(__file__) + keys, arguments, work)


def work(arguments: Sequence[str]) -> None:
    """Do what `arguments` (Hydra overrides) ask for. Raises ConfigError, DataError, ModelError."""
    cfg = compose_tool(arguments)
    if cfg.out:
        refuse_foreign("out", str(cfg.out))
    else:
        refuse_unwritable("out", "outputs")
    builds = cfg.mode == "build"
    if builds:
        check_plan(cfg)  # before what builds is imported, which takes seconds
    else:
        of_a_run = [str(key) for key in cfg if key not in (*OWN, "build", "judge")]
        settings = check(OmegaConf.masked_copy(cfg, of_a_run), trains=False)
        refuse_unusable(settings)
        tool = typed(Tool, resolve(cfg, OWN), KNOWN)
        tool.words = tuple(arguments)
    for word in arguments:
        needed = ONLY_IN.get(word.lstrip("+~").partition("=")[0].partition(".")[0], cfg.mode)
        if needed != cfg.mode:
            raise ConfigError(f"{word} does nothing with mode={cfg.mode}: take mode={needed}, or leave it out")
    if builds:
        from dpo_kit.data.build.pairs import build_pairs, show_build

        show_build(build_pairs(cfg), arguments)
        return
    from dpo_kit.data.curate.modes import MODES

    gc.set_threshold(200_000)  # rows are plain data without cycles, and looking through 100,000 of them costs seconds
    MODES[tool.mode](settings, tool)


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


if __name__ == "__main__":
    sys.exit(main())
