"""dpo_kit's launcher for Hydra. Hydra imports this on every start, so nothing heavy may be imported here."""

from hydra_plugins.dpo_kit_launcher.launcher import ProcessLauncher

__all__ = ["ProcessLauncher"]
