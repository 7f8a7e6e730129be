"""What TRL's config classes accept, as plain data: the `trl` block is composed and checked without importing TRL; also
what peft's adapter, the quantisation and transformers' schedules take.

The file trl_schema.json beside this module holds the pinned libraries' fields. Under others of the allowed range the
installed ones are read once (derive_schema.py) and kept in the user's cache, so that their own fields count.
"""

import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dpo_kit.run.files import cache_folder, read_json, write_text

PINNED_FILE = Path(__file__).with_name("trl_schema.json")
Schema = dict[str, Any]


@cache
def load_schema() -> Schema:
    """The installed TRL's config classes: `{"versions": …, "classes": {name: {"path": …, "fields": {field: …}}}}`, and
    {field: …} of "lora", "quantization" and each of "schedules".

    A field has `type` (a Python annotation of builtins), `default`, and `choices` where TRL states or tests them.
    """
    pinned, versions = read_json(PINNED_FILE), installed_versions()
    if pinned["versions"] == versions:
        return pinned
    file = cache_folder("trl_schema") / ("-".join(versions.values()) + ".json")
    if not file.exists():
        from dpo_kit.config.derive_schema import derive_schema

        write_text(file, json.dumps(derive_schema()))
    return read_json(file)


def installed_versions() -> dict[str, str]:
    """The versions that decide which fields exist."""
    return {name: version(name) for name in ("trl", "transformers", "peft")}
