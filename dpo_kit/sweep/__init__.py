"""Sweeps: one process per job, a record of them all, a table. Reads run directories, never reaches into a trainer."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def refresh(sweep_dir: Path) -> None:
    """What is drawn from a sweep directory, drawn anew after each finished job; a failure here never ends a sweep."""
    try:
        _write_summary(sweep_dir)
    except Exception:
        log.warning("the summary of %s could not be written", sweep_dir, exc_info=True)


def _write_summary(sweep_dir: Path) -> None:
    """The place of the summary's `write_summary(sweep_dir)`."""
