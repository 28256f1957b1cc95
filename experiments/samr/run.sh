#!/usr/bin/env bash
# SAMR, its four ablations and three baselines on 40 phantom patients with APTw at 3.5 mm (24 train, 16 test), a synthetic
# cohort of each, and a U-Net for every row of Table 2.
#
#   experiments/samr/run.sh [FOLDER]    (default: experiments/samr/output; about an hour on two cores)
#
# Stopped at any moment, the same command goes on where it was. Two trainings run side by side on a core each.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/samr/output}")
mkdir -p "$folder/logs"
export MRGEN_COHORTS=$folder/cohorts MRGEN_STORES=$folder/stores folder
cohort="data.phantom.subjects=40 data.phantom.spacing=3.5"

python -m mrgen.prepare data=phantom_apt $cohort > "$folder/logs/prepare.log"

# 64 × 64 slices, 3.5 mm apart, hold the whole brain.
export common="$cohort data.sampling.size=[64,64] data.sampling.step=1 data.split.test=0.4 tracking=csv"
# 1,500 steps of narrow networks and not 500 epochs. The generators have about as many parameters, 4.3 to 4.7 million, but
# for ablations that take some away.
export generator="trainer.max_epochs=15 data.steps_per_epoch=100 model.constant_epochs=8 model.decay_epochs=7
model.discriminator_filters=16 model.lr=5e-4"
export samr="model.filters=8 model.downs=3 model.unet_filters=16 model.unet_downs=4 model.match_output=false"
# 1,512 steps, whatever the number of slices; every segmenter twice.
export segmenter="trainer.max_epochs=28 model.constant_epochs=14 model.decay_epochs=14 model.lr=1e-3
model.net.filters=16 model.net.downs=4"

train() {
    local run=$1
    shift
    if grep -qs '"finished"' "$run/status.json"; then return; fi
    if [ -f "$run/checkpoints/last.ckpt" ]; then
        set -- "resume=$run"
    else
        rm -rf "$run"
        set -- "$@" $common "hydra.run.dir='$run'"
    fi
    python -m mrgen.train "$@" >> "$folder/logs/$(basename "$(dirname "$run")")-$(basename "$run").log" 2>&1
}

generator() {
    local model=$samr
    case $1 in
        pix2pix | shin) model="model.filters=36 model.downs=6" ;;
        pix2pixhd) model="model.filters=20 model.downs=3" ;;
    esac
    train "$folder/generators/$1" "experiment=samr/$1" $generator $model || return
    python -m mrgen.synthesize "checkpoint='$folder/generators/$1'" "output='$MRGEN_STORES/synthetic_$1'" \
        > "$folder/logs/synthesize-$1.log" 2>&1
}

segmenter() {
    local preset="experiment=samr/unet"
    if [ "$2" != real ]; then
        preset="experiment=samr/unet_mixed synthetic=$2 data.mix.fraction=$3 data.mix.equal_steps=true"
    fi
    train "$folder/segmenters/$1_$2${3:+-$3}" $preset "seed=$1" $segmenter
}
export -f train generator segmenter

export OMP_NUM_THREADS=1
baselines="shin pix2pixhd pix2pix"
ablations="no_stretch_out no_label_wise no_atlas no_shape"
for name in samr $ablations $baselines; do echo "$name"; done | xargs -P 2 -L 1 bash -c 'generator "$@"' generator
for seed in 0 1; do
    echo "$seed real"
    for name in samr $baselines; do echo "$seed $name 0.5"; done
    for name in samr $ablations $baselines; do echo "$seed $name 1.0"; done
done | xargs -P 2 -L 1 bash -c 'segmenter "$@"' segmenter
unset OMP_NUM_THREADS

python -m mrgen.evaluate experiment=samr/tables "sweep='$folder/segmenters'" "hydra.run.dir='$folder/tables'" \
    | tee "$folder/logs/tables.log"
runs=$(for name in samr $baselines $ablations; do printf "'%s'," "$folder/generators/$name"; done)
python -m mrgen.evaluate experiment=samr/samples "runs=[${runs%,}]" "hydra.run.dir='$folder/samples'" \
    | tee "$folder/logs/samples.log"
