#!/usr/bin/env bash
# RS-Net, R-Net, R-Net with the extra MRI and S-Net on 48 phantom subjects at 2 mm, and the swap of all four sequences.
#
#   experiments/rsnet/run.sh [FOLDER]    (default: experiments/rsnet/output; about an hour on two cores)
#
# Stopped at any moment, the same command goes on where it was. Two trainings run side by side on a core each, which is
# quicker than one after the other on two.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/rsnet/output}")
mkdir -p "$folder/logs"
export MRGEN_COHORTS=$folder/cohorts MRGEN_STORES=$folder/stores folder
export common="data.phantom.subjects=48 data.phantom.spacing=2 data.split.val=0.1 tracking=csv"

python -m mrgen.prepare data.phantom.subjects=48 data.phantom.spacing=2 > "$folder/logs/prepare.log"

# Networks of 8 filters see 15 or 20 passes over the training set and not 240 epochs with 32 filters: the learning rate
# is higher and falls sooner, and so do the class weights (the laboratory's sibling network: × 0.95 an epoch).
export segmenter="model.net.filters=8 trainer.max_epochs=20 model.lr=2e-3 model.lr_step=5 model.lr_gamma=0.5
model.class_weight_decay=0.75"
export synthesizer="model.filters=8 trainer.max_epochs=15 model.lr=4e-3 model.lr_step=5 model.lr_gamma=0.5
model.class_weight_decay=0.5"

train() {
    local preset=$1 target=$2 settings=$synthesizer run=$folder/runs/$1-$2
    if [ "$preset" = snet ]; then settings=$segmenter; fi
    if grep -qs '"finished"' "$run/status.json"; then return; fi
    if [ -f "$run/checkpoints/last.ckpt" ]; then
        set -- "resume=$run"
    else
        rm -rf "$run"
        set -- "experiment=rsnet/$preset" "target=$target" $settings $common "hydra.run.dir='$run'"
    fi
    python -m mrgen.train "$@" >> "$folder/logs/${run##*/}.log" 2>&1
}
export -f train

{
    echo snet all
    for target in t1ce flair t1 t2; do
        for preset in rsnet rnet rnet_with_mri; do echo "$preset" "$target"; done
    done
} | OMP_NUM_THREADS=1 xargs -P 2 -L 1 bash -c 'train "$@"' train

runs=()
for target in t1 t2 t1ce flair; do
    for preset in rsnet rnet rnet_with_mri; do runs+=("'$folder/runs/$preset-$target'"); done
done
python -m mrgen.evaluate experiment=rsnet/swap "segmenter='$folder/runs/snet-all'" \
    "runs=[$(IFS=,; echo "${runs[*]}")]" "hydra.run.dir='$folder/swap'" | tee "$folder/logs/swap.log"
