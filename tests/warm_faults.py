"""Imported once by the server from which tests/faults.py forks: everything that a run needs."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["OMP_NUM_THREADS"] = "1"

import dpo_kit.sweep.launch.warm  # noqa: F401
import tests.faults  # noqa: F401
