#!/usr/bin/env bash
#SBATCH --job-name=comptrust
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
# A sweep on Slurm:  SWEEP=my_sweep.yaml RESULTS=s3://bucket/my_sweep sbatch slurm.sh
# Every node runs this command once; Ray elects the first as head, waits for all, and runs the sweep there. Two minutes before the time
# limit Slurm sends TERM: the sweep stops, and the same job submitted again goes on where it stopped.
set -euo pipefail
: "${SWEEP:?set SWEEP to a YAML file or the name of a shipped sweep}"
: "${RESULTS:?set RESULTS to a folder that all nodes share, or s3://..., gs://...}"
PORT="${PORT:-6379}"
head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --kill-on-bad-exit=1 \
  ray symmetric-run --address "$head:$PORT" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
  comptrust run "$SWEEP" --results "$RESULTS" --address auto &
step=$!
trap 'kill -TERM "$step" 2>/dev/null || true; wait "$step"' TERM
wait "$step"
