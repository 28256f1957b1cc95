#!/usr/bin/env bash
# The same preset on real scans: FLAIR from T1ce and the whole tumour, on four BraTS 2015 cases with expert labels,
# leave-one-out.
#
#   MRGEN_SCANS=SCANS experiments/joint_imputation/real.sh [FOLDER]    (default: experiments/joint_imputation/output/real)
#
# SCANS holds the challenge's folder as it is shipped, with these cases.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/joint_imputation/output/real}")
scans=$(realpath -m "${MRGEN_SCANS:?names no folder of scans}")
mkdir -p "$folder/logs"
export MRGEN_STORES=$folder/stores folder

python -m mrgen.prepare data=brats2015 "data.root='$scans/brats2015/BRATS2015_Training'" "data.modalities=[t1ce,flair]" \
    > "$folder/logs/prepare.log"

# The cohort has no sites.
export common="data=brats2015 data.root=unused data.modalities=[t1ce,flair] model.source=t1ce
data.split.folds=4 data.split.stratify=null data.split.val=1
data.batch_size=4 data.steps_per_epoch=20 trainer.max_epochs=10 model.width=8 model.lr=5e-3
model.segmentation_loss=dice tracking=csv"

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
    for fold in 0 1 2 3; do
        for model in unimodal offline joint upper_bound; do
            echo "$fold" "$model" "$job"
            job=$((job + 1))
        done
    done
} | OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'train "$@"' train

python -m mrgen.evaluate experiment=joint_imputation/tables "sweep='$folder/runs'" "hydra.run.dir='$folder/tables'" \
    | tee "$folder/logs/tables.log"
