"""What several tests share: no hub, no wandb server, one thread per test process, small runs on the embedded model."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run side by side
os.environ.pop("WANDB_API_KEY", None)

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults_table import pytest_collection_modifyitems, pytest_configure, pytest_terminal_summary  # noqa: F401

os.environ["DPO_KIT_CACHE"] = tempfile.mkdtemp()  # what the user has cached plays no part
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m dpo_kit …` in an empty folder, as a user would."""

    def run(
        *overrides: str, env: dict[str, str] | None = None, timeout: float = 280
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dpo_kit", *overrides],
            cwd=tmp_path,
            env=os.environ | {"WANDB_MODE": "offline"} | (env or {}),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
