#!/usr/bin/env bash
# Joint imputation, offline synthesis, Unimodal and the upper bound, 6 folds each, on 60 phantom subjects at 2 mm in the
# layout of WMH 2017.
#
#   experiments/joint_imputation/run.sh [FOLDER]    (default: experiments/joint_imputation/output; about an hour on two cores)
#
# Stopped at any moment, the same command goes on where it was. Two trainings run side by side on a core each.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/joint_imputation/output}")
mkdir -p "$folder/logs"
export MRGEN_COHORTS=$folder/cohorts MRGEN_STORES=$folder/stores folder
cohort="data.phantom.subjects=60 data.phantom.spacing=2"

python -m mrgen.prepare data=phantom_wmh $cohort > "$folder/logs/prepare.log"

# 100 × 100 slices at 2 mm hold as much as 200 × 200 at 1 mm. Networks of width 8 take 600 steps of 20 slices and not
# 200 epochs with width 64: the learning rate is higher, and the loss Li et al.'s soft Dice, because cross entropy, to
# which the few voxels in a thousand that are lesion count for little, found none in so few steps.
export common="$cohort data.sampling.size=[100,100] data.batch_size=20 data.steps_per_epoch=40 trainer.max_epochs=15
model.width=8 model.lr=5e-3 model.segmentation_loss=dice tracking=csv"

train() {
    local fold=$1 model=$2 run=$folder/runs/$3_$2
    if grep -qs '"finished"' "$run/status.json"; then return; fi
    if [ -f "$run/checkpoints/last.ckpt" ]; then
        set -- "resume=$run"
    else
        rm -rf "$run"
        set -- experiment=joint_imputation/cross_validation "fold=$fold" "model=$model" $common "hydra.run.dir='$run'"
    fi
    python -m mrgen.train "$@" >> "$folder/logs/$(basename "$run").log" 2>&1
}
export -f train

{
    job=0
    for fold in 0 1 2 3 4 5; do
        for model in unimodal offline joint upper_bound; do
            echo "$fold" "$model" "$job"
            job=$((job + 1))
        done
    done
} | OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'train "$@"' train

python -m mrgen.evaluate experiment=joint_imputation/tables "sweep='$folder/runs'" "hydra.run.dir='$folder/tables'" \
    | tee "$folder/logs/tables.log"
