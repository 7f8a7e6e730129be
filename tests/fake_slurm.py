"""SLURM's commands on one machine, as far as submitit calls them: `install(folder)`, then `folder` first in PATH.

sbatch starts the tasks of an array one after the other in the background, srun runs a command with its output
redirected, sacct says that everything is running. What sbatch was asked for is kept in `folder`/submitted.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

JOB = "17"


def install(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("sbatch", "srun", "sacct"):
        script = folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        script.chmod(0o755)


def sbatch(file: str) -> None:
    text = Path(file).read_text()
    (Path(os.environ["PATH"].split(":")[0]) / "submitted").write_text(text)
    subprocess.Popen([sys.executable, __file__, "array", file], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sys.stdout.write(f"Submitted batch job {JOB}\n")


def array(file: str) -> None:
    text = Path(file).read_text()
    output = re.search(r"--output='?([^'\n]+)", text)[1].replace("%A", JOB)
    last = int(re.search(r"--array=0-(\d+)", text)[1])
    kept = Path(output.replace("%a", "0")).with_name("batch.sh")  # submitit moves its file away
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(text)
    for task in range(last + 1):
        own = {"SLURM_JOB_ID": f"{int(JOB) + 1 + task}", "SLURM_ARRAY_JOB_ID": JOB, "SLURM_ARRAY_TASK_ID": str(task)}
        subprocess.run(["bash", str(kept)], env=os.environ | own, check=False)


def srun(*arguments: str) -> None:
    assert arguments[0] == "--unbuffered" and arguments[1] == "--output" and arguments[3] == "--error", arguments
    names = {"%A": JOB, "%a": os.environ["SLURM_ARRAY_TASK_ID"], "%j": os.environ["SLURM_JOB_ID"], "%t": "0"}
    out, err = (re.sub("%[Aajt]", lambda found: names[found[0]], arguments[place]) for place in (2, 4))
    with open(out, "a") as stdout, open(err, "a") as stderr:  # noqa: PTH123 (as Popen wants them)
        sys.exit(subprocess.run(arguments[5:], stdout=stdout, stderr=stderr, check=False).returncode)


def sacct(*_: str) -> None:
    sys.stdout.write("JobID|State|NodeList\n")
    sys.stdout.writelines(f"{JOB}_{task}|RUNNING|here\n" for task in range(9))


if __name__ == "__main__":
    {"sbatch": sbatch, "array": array, "srun": srun, "sacct": sacct}[sys.argv[1]](*sys.argv[2:])
