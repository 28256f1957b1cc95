#!/usr/bin/env bash
# The clustering's 12 models, six Pix2Pix models and the baselines on 48 phantom subjects at 2 mm, judged by DeepMedic and S-Net.
#
#   experiments/t1_to_t2/run.sh [FOLDER]    (default: experiments/t1_to_t2/output; about an hour on two cores)
#
# Stopped at any moment, the same command goes on where it was. Two trainings run side by side on a core each.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/t1_to_t2/output}")
mkdir -p "$folder/logs"
export MRGEN_COHORTS=$folder/cohorts MRGEN_STORES=$folder/stores folder
export common="data.phantom.subjects=48 data.phantom.spacing=2 data.split.val=0.1 tracking=csv"

python -m mrgen.prepare data.phantom.subjects=48 data.phantom.spacing=2 > "$folder/logs/prepare.log"

# DeepMedic with a quarter of the feature maps, factors 2 and 3, 1,500 steps of 8 segments, and in so few steps a higher
# learning rate; S-Net as in experiments/rsnet.
export deepmedic="model.net.widths=[8,8,10,10,10,10,13,13] model.net.hidden=[64,64] model.net.factors=[2,3]
data.sampling.size=[73,73,73] data.batch_size=8 data.steps_per_epoch=100 trainer.max_epochs=15
model.lr_milestones=[7,9,11,13,14] model.lr=1e-3 model.eps=1e-4"
export snet="model.net.filters=8 trainer.max_epochs=20 model.lr=2e-3 model.lr_step=5 model.lr_gamma=0.5
model.class_weight_decay=0.75"
# Pix2Pix: crops of 64³ at 2 mm hold as much brain as 128³ at 1 mm; a quarter and an eighth of the width, fewer levels.
# With 31 training subjects the last epochs overfit, so that the validation subjects choose the epoch.
export pix2pix="monitor=val/loss data.sampling.size=[64,64,64] data.sampling.divisor=16 model.downs=4 model.discriminator_filters=16
model.discriminator_layers=2"
export unet="model.filters=16 model.lr=5e-4 trainer.max_epochs=120 model.constant_epochs=60 model.decay_epochs=60"
export resnet="model.filters=8 trainer.max_epochs=40 model.constant_epochs=20 model.decay_epochs=20"

train() {
    local place=$1 run=$folder/$1
    shift
    if grep -qs '"finished"' "$run/status.json"; then return; fi
    if [ -f "$run/checkpoints/last.ckpt" ]; then
        set -- "resume=$run"
    else
        rm -rf "$run"
        set -- "$@" $common "hydra.run.dir='$run'"
    fi
    python -m mrgen.train "$@" >> "$folder/logs/$(basename "$place").log" 2>&1
}
export -f train

{
    echo judges/deepmedic experiment=t1_to_t2/deepmedic $deepmedic
    for weights in "100 0" "500 500" "500 1000"; do
        set -- $weights
        for generator in resnet unet; do
            echo "runs/$generator-$1-$2" experiment=t1_to_t2/pix2pix $pix2pix "model.generator=$generator" \
                "model.l1_weight=$1" "model.tumour_weight=$2" ${!generator}
        done
    done
    echo judges/snet experiment=rsnet/snet $snet
    for macro in 3 4 5 6; do
        echo "runs/clustering-$macro" experiment=t1_to_t2/clustering "model.macro=$macro"
        for width in 5 10; do
            echo "runs/search$width-$macro" experiment=t1_to_t2/clustering_search "model.macro=$macro" "model.width=$width"
        done
    done
    echo runs/conditional_mean-5 experiment=t1_to_t2/conditional_mean
    for baseline in complementary random constant nothing; do
        echo "runs/$baseline" "experiment=t1_to_t2/$baseline"
    done
} | OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'train "$@"' train

# All 23 on the validation subjects: the best two of each family. They, the paper's rows and the baselines go to the judges.
# The table of all on the test subjects is for the record.
python -m mrgen.evaluate experiment=t1_to_t2/select "sweep='$folder/runs'" "hydra.run.dir='$folder/select'" \
    > "$folder/logs/select.log"
python -m mrgen.evaluate experiment=t1_to_t2/swap "sweep='$folder/runs'" "hydra.run.dir='$folder/images'" \
    > "$folder/logs/images.log"
named="clustering-3 search10-5 conditional_mean-5 complementary random constant nothing
resnet-100-0 resnet-500-500 unet-100-0 unet-500-1000"
judged=$({
    cat "$folder/select/selected.txt" 2> /dev/null || true
    for name in $named; do echo "$folder/runs/$name"; done
} | awk '!seen[$0]++' | sed "s/.*/'&'/" | paste -sd,)
export judged
judge() {
    python -m mrgen.evaluate experiment=t1_to_t2/swap "segmenter='$folder/judges/$1'" "runs=[$judged]" \
        "hydra.run.dir='$folder/swap-$1'" > "$folder/logs/swap-$1.log"
}
export -f judge
printf '%s\n' deepmedic snet | OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'judge "$@"' judge
