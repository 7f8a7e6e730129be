"""The real command line with a task that takes no time: `python -m tests.fake_sweep …` as `python -m dpo_kit …`.

What a job does is said by FAKE, "<beta>=<deed> …"; a job without a deed writes its result and returns its beta. The
deeds happen once: FAKE_ONCE names a folder in which each leaves a mark.
"""

import os
import signal
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

from dpo_kit.cli import main as cli
from dpo_kit.config.compose import CONF
from dpo_kit.run.files import write_json
from dpo_kit.sweep.launch import job


def task(cfg):
    directory = Path(HydraConfig.get().runtime.output_dir)
    with (directory / "starts").open("a") as file:
        given = [os.environ.get(name, "-") for name in ("CUDA_VISIBLE_DEVICES", "RANK", "WANDB_RUN_GROUP", "MARK")]
        file.write(" ".join([str(os.getpid()), str(time.time()), *given]) + "\n")
    print("a line on stdout")
    deeds = dict(word.split("=") for word in os.environ.get("FAKE", "").split())
    deed = deeds.get(f"{cfg.beta:g}")
    mark = Path(os.environ["FAKE_ONCE"]) / f"{cfg.beta:g}" if "FAKE_ONCE" in os.environ else None
    if deed and not (mark and mark.exists()):
        if mark:
            mark.touch()
        DEEDS[deed]()
    write_json(directory / "result.json", {"status": "done", "final": {"probe/accuracy": cfg.beta}})
    return cfg.beta


def fail():
    raise ValueError("this beta fails\nfor a reason")


def hang():
    time.sleep(120)


def ignore_and_hang():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(120)


DEEDS = {
    "fail": fail,
    "exit": lambda: sys.exit(3),
    "leave": lambda: sys.exit(0),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": hang,
    "ignore": ignore_and_hang,
    "wait": lambda: time.sleep(1),
}


def main():
    from tests import fake_sweep  # not __main__: a job must find the task by its name

    job.PRELOAD = ["dpo_kit.cli.main"]
    cli.run = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(fake_sweep.task)
    if not any(word.startswith("hydra/launcher=") for word in sys.argv):  # only ours has it
        sys.argv.append("hydra.launcher.grace_seconds=2")
    cli.main()


if __name__ == "__main__":
    main()
