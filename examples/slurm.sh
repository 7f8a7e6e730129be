#!/bin/bash
# One long run under SLURM that is queued again when its time is up, or when its node is wanted for something else.
#
#   sbatch examples/slurm.sh model=llama3.1-8b model.tuning=lora data=jsonl data.train=pairs.jsonl  # not run: needs SLURM
#
# SLURM tells the job two minutes before the end; dpo_kit saves at the next step and ends with 143, and the job goes back
# into the queue. When it starts again, the same command goes on from the newest whole checkpoint. A run that failed is
# not queued again. Keep the folder that you submit from on a disk that all nodes share.
#
# A sweep needs no such file: the launcher asks for an array, a job each, and queues again those out of time.
#
#   python -m dpo_kit beta-sweep=standard hydra/launcher=slurm hydra.launcher.partition=gpu    # not run: needs SLURM
#
#SBATCH --job-name=dpo_kit
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -uo pipefail

python -m dpo_kit hydra.run.dir="outputs/slurm-$SLURM_JOB_ID" "$@" &
run=$!
trap 'kill -TERM $run' TERM
wait $run
status=$?
while kill -0 $run 2>/dev/null; do  # it was `wait` that the signal ended: the run still saves
  wait $run
  status=$?
done
if [ $status -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
