#!/bin/bash
# A sweep over a Ray cluster that is running: one task a job, one GPU each, on whatever node has one free.
#
#   bash examples/ray.sh model=llama3.1-8b data=jsonl data.train=pairs.jsonl    # not run: needs a cluster
#
# To start such a cluster: `ray start --head` on one node, `ray start --address=HEAD:6379` on the others. All nodes share
# the folder of the command and have the same Python environment, with the extra `ray`. A job whose process or node dies
# is started again up to three times, and goes on from its newest whole checkpoint; after a kill of the command itself
# the same line completes what is missing.
#
# Without a cluster, on this machine's CPUs (four runs of four steps, two minutes):
#
#   bash examples/ray.sh hydra.launcher.ray.init.address=null hydra.launcher.ray.remote.num_gpus=0 trl.max_steps=4
set -euo pipefail
python -m dpo_kit beta-sweep=standard hydra/launcher=ray \
  hydra.launcher.ray.init.address=auto hydra.launcher.ray.remote.num_gpus=1 "$@"
