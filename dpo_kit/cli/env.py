"""`python -m dpo_kit env`: what a bug report needs to say about the machine, as Markdown to paste."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

from dpo_kit.config.command_line import parse, run_tool
from dpo_kit.config.compose import PACKAGE
from dpo_kit.config.places import refuse_no_file
from dpo_kit.run.files import cache_folder, write_json
from dpo_kit.run.redact import REDACTED, is_secret_key, redact_text
from dpo_kit.run.report.markdown import code, inline, table

USAGE = """\
usage: python -m dpo_kit env [out=FILE]

Prints what a bug report needs: versions, machine, precision, extras, cache, and the environment variables that matter,
as Markdown to paste. Secrets are hidden, the home folder is ~.

  out=FILE   write the same as JSON too
"""
MATTER = re.compile(
    r"(DPO_KIT|HF|HUGGINGFACE|TRANSFORMERS|TRL|TOKENIZERS|ACCELERATE|WANDB|HYDRA|CUDA|NVIDIA|NCCL|TORCH|PYTORCH|OMP|MKL"
    r"|SLURM|RAY|XDG|PYTHON|LD)_?\w*|\w*(TOKEN|API_KEY)"
)
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the arguments are refused."""
    return run_tool("env", USAGE, arguments, report)


def report(arguments: Sequence[str]) -> None:
    """Print the block, and write what `arguments` name. Raises ConfigError."""
    values = parse(arguments, ("out",))
    if out := values.get("out"):
        refuse_no_file("out", out)
    found = describe()
    sys.stdout.write(to_markdown(found) + "\n")
    if out:
        write_json(Path(out), found)


def describe() -> dict[str, Any]:
    """Everything by name, plain JSON values; secrets hidden. What cannot be found out is left out, never raised."""
    packages, extras = describe_packages()
    cache = cache_folder("")
    return {
        "dpo_kit": {"version": _version("dpo-kit"), "commit": _commit()},
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
        "processor": describe_processor(),
        "packages": packages,
        "extras": extras,
        "devices": describe_devices(),
        "cache": {"folder": _hide(str(cache)), "gib": round(_size(cache) / GIB, 2)},
        "environment": describe_environment(os.environ),
    }


def describe_packages() -> tuple[dict[str, str], dict[str, bool]]:
    """{package: version} of all that dpo-kit names and that is installed, and whether each of its extras is whole."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    extras: dict[str, bool] = {}
    for text in _needs():
        need = Requirement(text)
        installed = _version(need.name)
        if installed:
            found[need.name] = installed
        for extra in re.findall(r"extra == ['\"]([\w-]+)['\"]", str(need.marker or "")):
            extras[extra] = extras.get(extra, True) and installed is not None
    return found, extras


def _needs() -> list[str]:
    try:
        return requires("dpo-kit") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of a checkout, with +changes where files differ; None for an installed wheel."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    words = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    return _said(words)


def _said(words: Sequence[str]) -> str | None:
    """The output of a program; None where it is not there, fails or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_processor() -> dict[str, Any]:
    """Name, cores, the instructions that decide on bf16, memory in GiB."""
    import psutil

    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = set((re.search(r"^flags\s*: (.*)$", text, re.M) or ["", ""])[1].split())
    memory = psutil.virtual_memory()
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": [feature for feature in FEATURES if feature in flags],
        "memory_gib": round(memory.total / GIB, 1),
        "free_gib": round(memory.available / GIB, 1),
    }


def describe_devices() -> dict[str, Any]:
    """What torch sees and what training would take; where torch cannot be imported, why."""
    driver = _said(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    found: dict[str, Any] = {"nvidia_smi": driver.splitlines() if driver else []}
    try:
        import torch

        from dpo_kit.model.hardware import WIDE, training_precision

        count = torch.cuda.device_count()
        return found | {
            "torch_cuda": torch.version.cuda,
            "gpus": [torch.cuda.get_device_name(number) for number in range(count)],
            "precision": training_precision(WIDE),
        }
    except Exception as error:  # a broken torch is a reason to ask for help
        return found | {"torch": f"cannot be imported: {type(error).__name__}: {redact_text(str(error))}"}


def describe_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what dpo_kit does; of those named like a secret only that they are set."""
    return {
        name: REDACTED if is_secret_key(name) else _hide(value)
        for name, value in sorted(variables.items())
        if MATTER.fullmatch(name)
    }


def _hide(text: str) -> str:
    return redact_text(text).replace(str(Path.home()), "~")


def _size(folder: Path) -> int:
    """Bytes of all files under `folder`; what a running job takes away meanwhile does not count."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found = Path(place, name).lstat()
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def to_markdown(found: Mapping[str, Any]) -> str:
    """The block to paste."""
    return "### Environment of dpo_kit\n\n" + table(("", ""), _rows(found), left=2)


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    own, processor, devices = found["dpo_kit"], found["processor"], found["devices"]
    commit = f", commit {code(own['commit'])}" if own["commit"] else ""
    yield "dpo_kit", (own["version"] or "not installed") + commit
    yield "Python", inline(found["python"])
    yield "system", inline(found["system"])
    yield "processor", inline(f"{processor['name']}, {processor['cores']} cores, {' '.join(processor['features'])}")
    yield "memory", f"{processor['memory_gib']} GiB, {processor['free_gib']} free"
    yield "GPUs", inline("; ".join(devices["nvidia_smi"] or devices.get("gpus") or ["none"]))
    if "torch" in devices:
        yield "torch", inline(devices["torch"])
    else:
        yield "precision", f"{devices['precision']} (CUDA of torch: {devices['torch_cuda'] or 'none'})"
    yield "packages", inline(", ".join(f"{name} {number}" for name, number in found["packages"].items()))
    yield "extras", ", ".join(f"{name}{'' if whole else ' (not whole)'}" for name, whole in found["extras"].items())
    yield "cache", f"{code(found['cache']['folder'])}, {found['cache']['gib']} GiB"
    for name, value in found["environment"].items():
        yield code(name), code(value) if value else "(empty)"


if __name__ == "__main__":
    sys.exit(main())
