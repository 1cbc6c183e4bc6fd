#!/bin/bash
# Preprocess on a SLURM cluster: an array of tasks tokenizes, one job then assembles and verifies.
#
#   launch/preprocess.sh preprocess.yaml [--array=1-32 and any other sbatch option]
#
# The result is the same bytes for any number of tasks. `out` must lie on a file system that all nodes see.
set -euo pipefail
config=${1:?usage: launch/preprocess.sh CONFIG [sbatch options]}
shift
script=$(dirname "$0")/preprocess.sbatch
tasks=$(sbatch --parsable "$@" "$script" "$config" tokenize)
tasks=${tasks%%;*}
last=$(sbatch --parsable "$@" --array=1-1 --dependency="afterok:$tasks" --kill-on-invalid-dep=yes \
    "$script" "$config" assemble)
echo "tokenize: job $tasks, assemble and verify: job ${last%%;*}"
