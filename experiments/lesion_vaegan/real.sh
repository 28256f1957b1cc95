#!/usr/bin/env bash
# The lesion VAE-GAN on real scans: T1ce and FLAIR of four BraTS 2015 cases with expert labels, three to train on and one
# to test, 240 × 240, the paper's 50 slices of each.
#
#   MRGEN_SCANS=SCANS experiments/lesion_vaegan/real.sh [FOLDER]    (default: experiments/lesion_vaegan/output/real)
#
# SCANS holds the challenge's folder as it is shipped, with these cases.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/lesion_vaegan/output/real}")
scans=$(realpath -m "${MRGEN_SCANS:?names no folder of scans}")
mkdir -p "$folder/logs"
export MRGEN_STORES=$folder/stores folder
cohort="data=brats2015 data.modalities=[t1ce,flair] data.split.test=0.25 tracking=csv"

train() {
    local run=$1
    shift
    if grep -qs '"finished"' "$run/status.json"; then return; fi
    if [ -f "$run/checkpoints/last.ckpt" ]; then
        set -- "resume=$run"
    else
        rm -rf "$run"
        set -- "$@" "hydra.run.dir='$run'"
    fi
    python -m mrgen.train "$@" >> "$folder/logs/$(basename "$run").log" 2>&1
}

python -m mrgen.prepare data=brats2015 "data.root='$scans/brats2015/BRATS2015_Training'" "data.modalities=[t1ce,flair]" \
    > "$folder/logs/prepare.log"
# 200 steps of narrow networks: that data, stages and study fit each other is what this shows, and not what they can do.
train "$folder/stages/structure" experiment=lesion_vaegan/structure $cohort model.width=8 model.latent=64 model.deviation=0.1 \
    model.lr=5e-4 model.weights.map_adversarial_map=0.1 model.weights.map_adversarial_code=1 model.weights.normal_mean=1 \
    model.weights.normal_deviation=5 data.batch_size=4 data.steps_per_epoch=50 trainer.max_epochs=4
train "$folder/stages/generation" experiment=lesion_vaegan/generation $cohort model.width=8 model.discriminator_width=8 \
    model.lr=2e-3 model.label_share=0.5 model.weights.reconstruction=100 model.weights.cycle=40 model.weights.lesion2=0.5 \
    model.weights.g1_adversarial=0.3 model.weights.g1_category=1 model.weights.g2_adversarial=1 model.weights.g2_category=1 \
    model.weights.background_reconstructed=10 model.weights.background_translated=10 model.weights.background_synthetic=10 \
    data.batch_size=2 data.steps_per_epoch=50 trainer.max_epochs=4
python -m mrgen.synthesize "checkpoint='$folder/stages/generation'" "structure='$folder/stages/structure'" \
    "output='$MRGEN_STORES/synthetic_generation'" slices=50 selection.best=0.5 selection.outline_error=0.5 \
    | tee "$folder/logs/synthesize.log"
for row in 1 11; do
    train "$folder/rows/row-$row" experiment=lesion_vaegan/availability synthetic=generation "row=$row" $cohort \
        model.width=8 model.lr=4e-3 data.batch_size=4 trainer.max_epochs=3
done
python -m mrgen.evaluate experiment=lesion_vaegan/tables "sweep='$folder/rows'" \
    "evaluation.cohorts=['$MRGEN_STORES/synthetic_generation']" "hydra.run.dir='$folder/tables'" | tee "$folder/logs/tables.log"
