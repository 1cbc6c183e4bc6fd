#!/usr/bin/env bash
# The whole chain; run it again to go on where it stopped. NPROC ranks on this machine (default 8).
set -euo pipefail
configs=$(dirname "$0")
nproc=${NPROC:-8}
mixcpt preprocess "$configs/preprocess.yaml"
mixcpt train "$configs/stage1.yaml" --nproc "$nproc"
mixcpt select "$configs/select.yaml" --nproc "$nproc"
mixcpt align "$configs/sft.yaml" --nproc "$nproc"
mixcpt align "$configs/dpo.yaml" --nproc "$nproc"
mixcpt export runs/dpo --out work/aligned
# What was learned and forgotten since the base model, on stage 1's held-out text.
mixcpt eval runs/dpo --base models/base --mix work/stage1/mix.json --out work/evaluation
