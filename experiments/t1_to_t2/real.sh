#!/usr/bin/env bash
# The same on real scans: a BraTS 2019 and a BraTS 2023 case as training and query in turn, and T1ce to FLAIR over four
# BraTS 2015 cases, leave-one-out.
#
#   MRGEN_SCANS=SCANS experiments/t1_to_t2/real.sh [FOLDER]    (default: experiments/t1_to_t2/output/real)
#
# SCANS holds the challenges' folders as they are shipped, with these cases.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/t1_to_t2/output/real}")
scans=$(realpath -m "${MRGEN_SCANS:?names no folder of scans}")
mkdir -p "$folder/logs"
export MRGEN_STORES=$folder/stores OMP_NUM_THREADS=2

python -m mrgen.prepare data=brats2019 "data.root='$scans/brats2019/MICCAI_BraTS_2019_Data_Training'"
python -m mrgen.prepare data=brats2023 "data.root='$scans/brats2023'"
python -m mrgen.prepare data=brats2015 "data.root='$scans/brats2015/BRATS2015_Training'" "data.modalities=[t1ce,flair]"

methods="clustering conditional_mean complementary random constant nothing"
pix2pix="data.sampling.size=[64,64,64] data.sampling.divisor=16 model.downs=4 model.filters=16 model.lr=5e-4
model.discriminator_filters=16 model.discriminator_layers=2 data.steps_per_epoch=40 trainer.max_epochs=10
model.constant_epochs=5 model.decay_epochs=5"
single="data.split.kind=explicit data.split.val=[] data.split.test=[] data.split.stratify=null data.labelled=false"

between() {  # trained on the case $2 of cohort $1, asked for the case of cohort $3
    local runs=() name=$1-to-$3
    for preset in $methods pix2pix; do
        local run=$folder/$name/$preset settings=
        runs+=("'$run'")
        if grep -qs '"finished"' "$run/status.json"; then continue; fi
        rm -rf "$run"
        if [ "$preset" = pix2pix ]; then settings=$pix2pix; fi
        python -m mrgen.train "experiment=t1_to_t2/$preset" "data=$1" "data.split.train=['$2']" $single $settings \
            data.root=unused tracking=csv "hydra.run.dir='$run'" >> "$folder/logs/$name.log" 2>&1
    done
    python -m mrgen.evaluate experiment=t1_to_t2/swap "runs=[$(IFS=,; echo "${runs[*]}")]" subjects=all \
        "store='$folder/stores/$3'" "hydra.run.dir='$folder/$name/images'" > "$folder/logs/$name-images.log"
}
between brats2019 BraTS19_TCIA_FG6692_1 brats2023
between brats2023 BraTS-GLI-00001-000 brats2019

folds="data.split.kind=folds data.split.folds=4 data.split.val=0 data.split.stratify=null target=flair"
runs=()
for preset in $methods clustering_search pix2pix; do
    source=model.source=t1ce settings=
    if [ "$preset" = pix2pix ]; then source="model.sources=[t1ce]" settings=$pix2pix; fi
    if [ "$preset" = clustering_search ]; then settings=model.width=1; fi  # the nearest of three
    for fold in 0 1 2 3; do
        run=$folder/t1ce-to-flair/$preset-$fold
        runs+=("'$run'")
        if grep -qs '"finished"' "$run/status.json"; then continue; fi
        rm -rf "$run"
        python -m mrgen.train "experiment=t1_to_t2/$preset" data=brats2015 data.root=unused $folds $settings "$source" \
            "data.modalities=[t1ce,flair]" "data.split.fold=$fold" tracking=csv "hydra.run.dir='$run'" \
            >> "$folder/logs/t1ce-to-flair.log" 2>&1
    done
done
python -m mrgen.evaluate experiment=t1_to_t2/swap "runs=[$(IFS=,; echo "${runs[*]}")]" \
    "hydra.run.dir='$folder/t1ce-to-flair/images'" > "$folder/logs/t1ce-to-flair-images.log"
