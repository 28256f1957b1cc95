#!/usr/bin/env bash
# The lesion VAE-GAN on 32 phantom cases of 26 patients in the layout of BraTS 2015 at 3.5 mm: both stages, a synthetic
# cohort, and segmentors for all 25 rows of Table 2.
#
#   experiments/lesion_vaegan/run.sh [FOLDER]    (default: experiments/lesion_vaegan/output; 171 minutes of
#   training on a core each, measured beside other work and with interruptions)
#
# Stopped at any moment, the same command goes on where it was. Two trainings run side by side on a core each.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/lesion_vaegan/output}")
mkdir -p "$folder/logs"
export MRGEN_COHORTS=$folder/cohorts MRGEN_STORES=$folder/stores folder
cohort="data.phantom.subjects=32 data.phantom.spacing=3.5"

python -m mrgen.prepare data=phantom_brats2015 $cohort > "$folder/logs/prepare.log"

# 64 × 64 slices hold the whole brain; the paper's 50 of 155 slices are 14 of 44.
export common="$cohort data.sampling.size=[64,64] data.split.test=0.5 tracking=csv"
# Narrow networks and 2,500 to 3,000 steps a stage, of 238 slices, where the paper has a million: hence learning rates.
export structure="model.width=8 model.latent=64 model.halvings=3 model.deviation=0.1 model.expand=2 model.lr=5e-4
model.weights.map_adversarial_map=0.1 model.weights.map_adversarial_code=1 model.weights.normal_mean=1
model.weights.normal_deviation=5 data.batch_size=8 data.steps_per_epoch=100 trainer.max_epochs=25"
# With the authors' weights, adversarial terms and categories are a hundred times the reconstruction, which so few steps
# do not learn then.
export generation="model.width=8 model.discriminator_width=8 model.expand=2 model.lr=2e-3 model.label_share=0.5
model.weights.reconstruction=100 model.weights.cycle=40 model.weights.lesion2=0.5
model.weights.g1_adversarial=0.3 model.weights.g1_category=1 model.weights.g2_adversarial=1
model.weights.g2_category=1 model.weights.background_reconstructed=10 model.weights.background_translated=10
model.weights.background_synthetic=10 data.batch_size=2 data.steps_per_epoch=100 trainer.max_epochs=30"
export segmentors="model.width=8 model.lr=4e-3 data.batch_size=4 trainer.max_epochs=17"

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
    python -m mrgen.train "$@" >> "$folder/logs/$(basename "$run").log" 2>&1
}

stage() {
    local settings=$structure
    if [ "$1" = generation ]; then settings=$generation; fi
    train "$folder/stages/$1" "experiment=lesion_vaegan/$1" $settings
}

row() {
    train "$folder/rows/row-$1_seed-$2" experiment=lesion_vaegan/availability synthetic=generation "row=$1" "seed=$2" \
        $segmentors
}
export -f train stage row

export OMP_NUM_THREADS=1
printf '%s\n' "stage generation" "stage structure" "row 1 0" | xargs -P 2 -L 1 bash -c '"$@"' bash
unset OMP_NUM_THREADS

# Three times as many slices as real ones, the best half of all that are made, as row 1 sees them: segmentors that were
# trained on real slices by themselves, and not those that taught the generator.
python -m mrgen.synthesize "checkpoint='$folder/stages/generation'" "structure='$folder/stages/structure'" \
    "segmentors='$folder/rows/row-1_seed-0'" "output='$MRGEN_STORES/synthetic_generation'" slices=714 selection.best=0.5 | tee "$folder/logs/synthesize.log"

export OMP_NUM_THREADS=1
for number in $(seq 2 25); do echo "$number 0"; done | xargs -P 2 -L 1 bash -c 'row "$@"' row
unset OMP_NUM_THREADS

python -m mrgen.evaluate experiment=lesion_vaegan/tables "sweep='$folder/rows'" \
    "evaluation.cohorts=['$MRGEN_STORES/synthetic_generation']" "hydra.run.dir='$folder/tables'" | tee "$folder/logs/tables.log"
