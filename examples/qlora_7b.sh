#!/bin/bash
# A 7B model on one GPU of 24 GB: LoRA on a base in 4 bits, from looking to a folder that vLLM serves.
#
#   bash examples/qlora_7b.sh data.train=pairs.jsonl                            # not run: needs a GPU
#   bash examples/qlora_7b.sh data.train=pairs.jsonl model.path=path/to/model   # not run: needs a GPU
#
# What the plan says of Qwen2.5-7B and of the embedded pairs (short ones: longer answers need more), without a GPU:
#
#   weights, GB                       7.89 ± 0.05
#   optimizer, GB                     0.32 ± 0.02
#   at most in forward and backward pass, GB   0.23 ± 0.04
#   peak, GB                          10.20 ± 0.10
#
# What differs from full tuning: no reference is loaded (it is the policy with its adapter off), the learning rate is
# LoRA's (5e-6, set by method=dpo), and the export merges the adapter into the published weights and says by how many
# nats a token that changes the answers; export with base=dequantised to keep the policy that was measured.
set -euo pipefail
recipe=(
  model=local model.path=Qwen/Qwen2.5-7B-Instruct model.tuning=qlora data=jsonl
  trl.max_length=1024 trl.per_device_train_batch_size=2 trl.gradient_accumulation_steps=8
  speed.checkpointing=true
)
python -m dpo_kit plan "${recipe[@]}" "$@"
python -m dpo_kit "${recipe[@]}" dry_run=true "$@"
python -m dpo_kit "${recipe[@]}" hydra.run.dir=outputs/qlora-7b "$@"
python -m dpo_kit evaluate run=outputs/qlora-7b 'parts=[preferences]'
python -m dpo_kit export run=outputs/qlora-7b dtype=bfloat16
