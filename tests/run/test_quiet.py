"""What stands on the terminal: what its reader can act on."""

import subprocess
import sys

from tests.conftest import ROOT


def test_the_terminal_of_a_sweep_shows_our_lines_and_errors_but_no_warnings_of_libraries():
    code = (
        "import logging.config, yaml\n"
        "logging.config.dictConfig(yaml.safe_load(open('conf/hydra/hydra_logging/dpo_kit.yaml')))\n"
        "logging.getLogger('dpo_kit.sweep').info('ours')\n"
        "logging.getLogger('hydra_plugins.launcher').info('launched')\n"
        "logging.getLogger('py.warnings').warning('FutureWarning')\n"
        "logging.getLogger('transformers').error('broken')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.split() == ["ours", "launched", "broken"]
