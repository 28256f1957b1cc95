#!/usr/bin/env bash
# Every method on one bench: ten ways to make T2 from T1 on 48 phantom subjects at 2 mm under two judges, and the synthetic
# cohorts of five generators on 40 phantom cases at 3.5 mm in two mixes for one segmenter.
#
#   experiments/bench/run.sh [FOLDER]    (default: experiments/bench/output)
#
# Stopped at any moment, the same command goes on where it was. Two trainings run side by side on a core each. Settings are
# those that the papers' own experiments found for the phantom, fewer steps where said.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(realpath -m "${1:-experiments/bench/output}")
mkdir -p "$folder/logs"
export MRGEN_COHORTS=$folder/cohorts MRGEN_STORES=$folder/stores folder
volumes="data=phantom data.phantom.subjects=48 data.phantom.spacing=2"
cases="data=phantom_brats2015 data.phantom.subjects=40 data.phantom.spacing=3.5"

python -m mrgen.prepare $volumes > "$folder/logs/prepare-volumes.log"
python -m mrgen.prepare $cases > "$folder/logs/prepare-cases.log"

export volumes="$volumes data.split.val=0.1 tracking=csv"
export cases="$cases data.sampling.size=[64,64] data.split.test=0.4 tracking=csv"

# ----- judges and imputers, as in experiments/t1_to_t2, experiments/rsnet and experiments/joint_imputation -----------
export snet="experiment=rsnet/snet model.net.filters=8 trainer.max_epochs=20 model.lr=2e-3 model.lr_step=5
model.lr_gamma=0.5 model.class_weight_decay=0.75"
export deepmedic="experiment=t1_to_t2/deepmedic model.net.widths=[8,8,10,10,10,10,13,13] model.net.hidden=[64,64]
model.net.factors=[2,3] data.sampling.size=[73,73,73] data.batch_size=8 data.steps_per_epoch=100 trainer.max_epochs=10
model.lr_milestones=[5,6,7,8,9] model.lr=1e-3 model.eps=1e-4"
export rsnet="experiment=bench/rsnet model.filters=8 trainer.max_epochs=15 model.lr=4e-3 model.lr_step=5
model.lr_gamma=0.5 model.class_weight_decay=0.5"
export joint="experiment=bench/joint data.sampling.size=[100,100] data.batch_size=20 data.steps_per_epoch=40
trainer.max_epochs=15 model.width=8 model.lr=5e-3 model.segmentation_loss=dice"
pix2pix="experiment=t1_to_t2/pix2pix monitor=val/loss data.sampling.size=[64,64,64] data.sampling.divisor=16 model.downs=4
model.discriminator_filters=16 model.discriminator_layers=2"
export unet="$pix2pix model.generator=unet model.filters=16 model.lr=5e-4 trainer.max_epochs=90
model.constant_epochs=45 model.decay_epochs=45"
export resnet="$pix2pix model.generator=resnet model.filters=8 trainer.max_epochs=30 model.constant_epochs=15
model.decay_epochs=15"
export clustering="experiment=t1_to_t2/clustering" search="experiment=t1_to_t2/clustering_search"
export complementary="experiment=t1_to_t2/complementary" random="experiment=t1_to_t2/random"
export constant="experiment=t1_to_t2/constant" nothing="experiment=t1_to_t2/nothing"

# ----- generators and segmenters, as in experiments/samr and experiments/lesion_vaegan -------------------------------
generator="trainer.max_epochs=12 data.steps_per_epoch=100 model.constant_epochs=7 model.decay_epochs=5
model.discriminator_filters=16 model.lr=5e-4 data.sampling.step=1"
export samr="experiment=samr/samr $generator model.filters=8 model.downs=3 model.unet_filters=16 model.unet_downs=4
model.match_output=false"
export shin="experiment=samr/shin $generator model.filters=36 model.downs=6"
export labels="experiment=samr/pix2pix $generator model.filters=36 model.downs=6"
export pix2pixhd="experiment=samr/pix2pixhd $generator model.filters=20 model.downs=3"
export structure="experiment=lesion_vaegan/structure model.width=8 model.latent=64 model.halvings=3 model.deviation=0.1
model.expand=2 model.lr=5e-4 model.weights.map_adversarial_map=0.1 model.weights.map_adversarial_code=1
model.weights.normal_mean=1 model.weights.normal_deviation=5 data.batch_size=8 data.steps_per_epoch=100
trainer.max_epochs=20"
export generation="experiment=lesion_vaegan/generation name=lesion_vaegan model.width=8 model.discriminator_width=8
model.expand=2 model.lr=2e-3 model.label_share=0.5 model.weights.reconstruction=100 model.weights.cycle=40
model.weights.lesion2=0.5 model.weights.g1_adversarial=0.3 model.weights.g1_category=1 model.weights.g2_adversarial=1
model.weights.g2_category=1 model.weights.background_reconstructed=10 model.weights.background_translated=10
model.weights.background_synthetic=10 data.batch_size=2 data.steps_per_epoch=100 trainer.max_epochs=22"
export segmenter="data.sampling.step=1 trainer.max_epochs=36 model.constant_epochs=18 model.decay_epochs=18 model.lr=4e-3
model.net.filters=16 model.net.downs=4"

train() { # FOLDER COHORT SETTING...
    local run=$folder/$1 cohort=$2
    shift 2
    if grep -qs '"finished"' "$run/status.json"; then return; fi
    if [ -f "$run/checkpoints/last.ckpt" ]; then
        set -- "resume=$run"
    else
        rm -rf "$run"
        set -- "$@" ${!cohort} "hydra.run.dir='$run'"
    fi
    python -m mrgen.train "$@" >> "$folder/logs/$(basename "$run").log" 2>&1
}

method() { # NAME, of a judge or of an imputer
    train "runs/$1" volumes ${!1}
}

generator() { # NAME: of labels a cohort at once, of the lesion VAE-GAN after both of its stages
    local settings=$1
    if [ "$1" = pix2pix ]; then settings=labels; fi
    train "generators/$1" cases ${!settings} || return
    case $1 in structure | generation) ;; *) cohort "$1" ;; esac
}

cohort() { # NAME SETTING...: once for each real training slice
    local name=$1 run=$1
    shift
    if [ "$name" = lesion_vaegan ]; then run=generation; fi
    python -m mrgen.synthesize "checkpoint='$folder/generators/$run'" "output='$MRGEN_STORES/synthetic_$name'" "$@" \
        > "$folder/logs/synthesize-$name.log" 2>&1
}

segmenter() { # SEED NAME [FRACTION]; as many steps whatever the mix
    local preset="experiment=samr/unet"
    if [ "$2" != real ]; then
        preset="experiment=samr/unet_mixed synthetic=$2 data.mix.fraction=$3 data.mix.equal_steps=true"
    fi
    train "runs/$1_$2${3:+-$3}" cases $preset "seed=$1" $segmenter
}
export -f train method generator cohort segmenter

export OMP_NUM_THREADS=1
{
    echo method deepmedic
    for name in generation samr structure; do echo generator "$name"; done
    for name in unet resnet snet rsnet joint; do echo method "$name"; done
    for name in pix2pixhd shin pix2pix; do echo generator "$name"; done
    for name in clustering search complementary random constant nothing; do echo method "$name"; done
} | xargs -P 2 -L 1 bash -c '"$@"' bash

# As many slices as the 23 training cases have, the best half of all that are made, by the generator's own segmentors.
cohort lesion_vaegan "structure='$folder/generators/structure'" slices=828 selection.best=0.5

generators="samr shin pix2pixhd pix2pix lesion_vaegan"
for seed in 0 1; do
    echo "$seed real"
    for fraction in 1.0 0.5; do
        for name in $generators; do echo "$seed $name $fraction"; done
    done
done | xargs -P 2 -L 1 bash -c 'segmenter "$@"' segmenter
unset OMP_NUM_THREADS

python -m mrgen.evaluate experiment=bench "sweep='$folder/runs'" tracking=csv "hydra.run.dir='$folder/tables'" \
    | tee "$folder/logs/tables.log"
