"""`python -m dpo_kit env`: what a bug report needs to say about the machine, as Markdown to paste."""

import contextlib
import os
import platform
import re
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution, requires
from pathlib import Path
from typing import Any

from dpo_kit.config.compose import PACKAGE
from dpo_kit.config.tools import parse, refuse_no_file, run_tool, usage
from dpo_kit.run.files import cache_folder, write_json
from dpo_kit.run.redact import REDACTED, is_secret_key, redact_text
from dpo_kit.run.report.markdown import code, inline, table

MATTER = re.compile(
    r"(DPO_KIT|HF|HUGGINGFACE|TRANSFORMERS|TRL|TOKENIZERS|ACCELERATE|WANDB|HYDRA|CUDA|NVIDIA|NCCL|TORCH|PYTORCH|OMP|MKL"
    r"|SLURM|RAY|XDG|PYTHON|LD)_?\w*|\w*(TOKEN|API_KEY)"
)
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
GIB = 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 where the arguments are refused."""
    return run_tool("env", usage(__file__), arguments, report)


def report(arguments: Sequence[str]) -> None:
    """Print the block, and write what `arguments` name. Raises ConfigError."""
    values = parse(arguments, ("out",))
    if out := values.get("out"):
        refuse_no_file("out", out)
    facts = describe()
    sys.stdout.write(to_markdown(facts) + "\n")
    if out:
        write_json(Path(out), facts)


def describe() -> dict[str, Any]:
    """Everything by name, plain JSON values; secrets hidden. What cannot be found out is left out, never raised."""
    packages, extras = describe_packages()
    cache, checkout, commit = cache_folder(""), PACKAGE.parent, None
    if (checkout / ".git").exists():  # with +changes where files differ
        commit = _output(["git", "-C", str(checkout), "describe", "--always", "--dirty=+changes", "--abbrev=12"])
    return {
        "dpo_kit": {"version": _version("dpo-kit"), "commit": commit},
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

    packages: dict[str, str] = {}
    extras: dict[str, bool] = {}
    try:
        needed = requires("dpo-kit") or []
    except PackageNotFoundError:  # a checkout that is not installed
        needed = []
    for need in map(Requirement, needed):
        if installed := _version(need.name):
            packages[need.name] = installed
        for extra in re.findall(r"extra == ['\"]([\w-]+)['\"]", str(need.marker or "")):
            extras[extra] = extras.get(extra, True) and installed is not None
    return packages, extras


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _output(words: Sequence[str]) -> str | None:
    """The output of a program; None where it is not there, fails or hangs."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe_processor() -> dict[str, Any]:
    """Name, cores, the instructions that decide on bf16, memory in GiB."""
    import psutil

    cpuinfo, memory = Path("/proc/cpuinfo"), psutil.virtual_memory()
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    name, flags = (re.search(rf"^{key}\s*: (.*)$", text, re.M) for key in ("model name", "flags"))
    return {
        "name": name[1] if name else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "features": [feature for feature in FEATURES if flags and feature in flags[1].split()],
        "memory_gib": round(memory.total / GIB, 1),
        "free_gib": round(memory.available / GIB, 1),
    }


def describe_devices() -> dict[str, Any]:
    """What torch sees and what training would take; where torch cannot be imported, why."""
    driver = _output(["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"])
    devices: dict[str, Any] = {"nvidia_smi": driver.splitlines() if driver else []}
    try:
        import torch

        from dpo_kit.model.hardware import WIDE, training_precision

        gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return devices | {"torch_cuda": torch.version.cuda, "gpus": gpus, "precision": training_precision(WIDE)}
    except Exception as error:  # a broken torch is a reason to ask for help
        return devices | {"torch": f"cannot be imported: {type(error).__name__}: {redact_text(str(error))}"}


def describe_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change what dpo_kit does; of those named like a secret only that they are set."""
    told = ((name, value) for name, value in sorted(variables.items()) if MATTER.fullmatch(name))
    return {name: REDACTED if is_secret_key(name) else _hide(value) for name, value in told}


def _hide(text: str) -> str:
    return redact_text(text).replace(str(Path.home()), "~")


def _size(folder: Path) -> int:
    """Bytes of all files under `folder`; what a running job takes away meanwhile does not count."""
    total = 0
    for path in (Path(place, name) for place, _, names in os.walk(folder) for name in names):
        with contextlib.suppress(OSError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def to_markdown(facts: Mapping[str, Any]) -> str:
    """The block to paste."""
    ours, of, devices, cache = (facts[name] for name in ("dpo_kit", "processor", "devices", "cache"))
    commit = f", commit {code(ours['commit'])}" if ours["commit"] else ""
    if "torch" in devices:
        torch = ("torch", inline(devices["torch"]))
    else:
        torch = ("precision", f"{devices['precision']} (CUDA of torch: {devices['torch_cuda'] or 'none'})")
    rows = [
        ("dpo_kit", (ours["version"] or "not installed") + commit),
        ("Python", inline(facts["python"])),
        ("system", inline(facts["system"])),
        ("processor", inline(f"{of['name']}, {of['cores']} cores, {' '.join(of['features'])}")),
        ("memory", f"{of['memory_gib']} GiB, {of['free_gib']} free"),
        ("GPUs", inline("; ".join(devices["nvidia_smi"] or devices.get("gpus") or ["none"]))),
        torch,
        ("packages", inline(", ".join(f"{name} {number}" for name, number in facts["packages"].items()))),
        ("extras", ", ".join(f"{name}{'' if whole else ' (not whole)'}" for name, whole in facts["extras"].items())),
        ("cache", f"{code(cache['folder'])}, {cache['gib']} GiB"),
    ]
    rows += [(code(name), code(value) if value else "(empty)") for name, value in facts["environment"].items()]
    return "### Environment of dpo_kit\n\n" + table(("", ""), rows, left=2)


if __name__ == "__main__":
    sys.exit(main())
