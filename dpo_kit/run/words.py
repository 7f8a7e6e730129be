"""Words of a command line: as people type them, as Hydra reads them, as ours are printed to be pasted."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from dpo_kit.errors import ConfigError

PLAIN = re.compile(r"[A-Za-z0-9_./:+-]*")  # a value that Hydra reads as it stands
KEY = re.compile(r"[+~]{0,2}[A-Za-z_][\w./@:-]*")
HOME = re.compile(r"(?<![^=\[{,:\s'\"])~(?=/)")  # a home folder at the start of a value or of an item of a list


def readable(words: Sequence[str]) -> list[str]:
    """Overrides as Hydra can read them: quoted where they must be, ~/ the home folder. ConfigError for other words."""
    read = []
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            from dpo_kit.run.other_tools import refuse_dashes

            refuse_dashes([word], [word])
        if not KEY.fullmatch(key) or not (equals or key.startswith("~")):
            raise ConfigError(f"overrides are key=value, got {word!r}")
        value = with_home(value)
        if not PLAIN.fullmatch(value):
            try:
                OverridesParser.create().parse_override(f"{key}{equals}{value}")
            except HydraException:
                equals, value = "=", quote(value)
        read.append(f"{key}{equals}{value}")
    return read


def with_home(text: str) -> str:
    """`text` with ~/ at its start, or at that of an item of a list, as the home folder."""
    return HOME.sub(str(Path.home()), text) if "~" in text else text


def quote(text: str) -> str:
    """`text` as one value in Hydra's grammar."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text) + "'"


def override(key: str, value: Any) -> str:
    """`key=value` as Hydra reads it, quoted where it must be."""
    return f"{key}={value}" if PLAIN.fullmatch(str(value)) or value == "…" else f"{key}={quote(str(value))}"


def command(*words: str, tool: str = "") -> str:
    """What to paste into a shell: `python -m dpo_kit [tool]` with overrides that Hydra can read."""
    return shlex.join(["python", "-m", "dpo_kit", *([tool] if tool else []), *words])


TRAINS = ("model", "method", "trl", "beta", "seed", "speed", "allow_beta", "allow_learning_rate")


def training(words: Sequence[str], file: str | Path | None = None) -> str:
    """The command that trains with what of `words`, of a tool, concerns training; on the rows of `file`, if any."""
    by_word = {word: word.lstrip("+~").partition("=")[0] for word in words}
    kept = [word for word, key in by_word.items() if key.split(".")[0] in TRAINS]
    if file is None:
        return command(*kept, *(word for word, key in by_word.items() if key.split(".")[0] == "data"))
    rows = ("data.gold",) if "data.columns" in by_word.values() else ("data.gold", "data.eval")  # it has our names
    return command(*kept, *(w for w, key in by_word.items() if key in rows), "data=jsonl", override("data.train", file))


def again(typed: str | None, method: str | None, *flags: str, **changed: str) -> str:
    """The command `typed` (None where nothing was typed: that `method`) with the `changed` keys, and without those of
    Hydra. With `-m` among the `flags` what started several processes starts each job of the sweep.
    """
    typed_words = shlex.split(typed or command(f"method={method}"))
    start = typed_words.index("dpo_kit") + 1
    head, words = typed_words[:start], typed_words[start:]
    if "-m" in flags and head[0] != "python":
        listed = ",".join(map(quote, head[:-2]))
        head, flags = ["python", "-m", "dpo_kit"], (*flags, f"hydra.launcher.command=[{listed}]")
    words = [word for word in words if word not in ("-m", "--multirun") and word.partition("=")[0] not in changed]
    kept = [word for word in words if not word.lstrip("+").startswith(("hydra.run.", "hydra.sweep.", "hydra.job."))]
    if "beta" in changed:
        kept = [word for word in kept if not word.startswith("beta-sweep=")]
    return shlex.join([*head, *flags, *kept, *(f"{key}={value}" for key, value in changed.items())])


def longer(trl: Mapping[str, Any]) -> dict[str, str]:
    """The override, as key and value, that makes a run with the TRL arguments `trl` twice as long."""
    steps, epochs = trl.get("max_steps") or 0, trl.get("num_train_epochs") or 1
    return {"trl.max_steps": f"{2 * steps:g}"} if steps > 0 else {"trl.num_train_epochs": f"{2 * epochs:g}"}
