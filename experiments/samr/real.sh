#!/usr/bin/env bash
# SAMR on real scans: T1ce and FLAIR of four BraTS 2015 cases with expert labels, three to train on and one to test.
#
#   MRGEN_SCANS=SCANS experiments/samr/real.sh [FOLDER]    (default: experiments/samr/output/real)
#
# SCANS holds the challenge's folder as it is shipped, with these cases.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/samr/output/real}")
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
train "$folder/generators/samr" experiment=samr/samr $cohort trainer.max_epochs=10 data.steps_per_epoch=20 data.batch_size=2 \
    model.constant_epochs=5 model.decay_epochs=5 model.discriminator_filters=16 model.unet_filters=16 model.lr=5e-4 \
    model.match_output=false
python -m mrgen.synthesize "checkpoint='$folder/generators/samr'" "output='$MRGEN_STORES/synthetic_samr'" \
    > "$folder/logs/synthesize.log"
segmenter="trainer.max_epochs=20 model.net.filters=16 model.constant_epochs=10 model.decay_epochs=10 model.lr=1e-3"
train "$folder/segmenters/real" experiment=samr/unet $cohort $segmenter
train "$folder/segmenters/samr-1.0" experiment=samr/unet_mixed synthetic=samr $cohort $segmenter data.mix.equal_steps=true
python -m mrgen.evaluate experiment=samr/tables "sweep='$folder/segmenters'" "hydra.run.dir='$folder/tables'" \
    | tee "$folder/logs/tables.log"
python -m mrgen.evaluate experiment=samr/samples "runs=['$folder/generators/samr']" "hydra.run.dir='$folder/samples'" \
    | tee "$folder/logs/samples.log"
