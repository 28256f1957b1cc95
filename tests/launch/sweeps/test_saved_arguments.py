"""Of a sweep's folder those arguments are taken that say what is trained, and none that says what runs around it."""

from pathlib import Path

import pytest

from mrgen.errors import UserError
from mrgen.launch.sweeps.saved_arguments import check_arguments

WHERE = Path("sweep/multirun.yaml")


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "experiment=rsnet/rsnet,rsnet/rnet",
            "model.lr=tag(log,interval(1e-4,1e-2))",
            "seed=range(0,3)",
            "~callbacks",
        ),
        *(
            "trainer=[gpu,bf16]",
            "callbacks=[images,ema]",
            "data.root='/data/a b'",
            "row=choice(1,2)",
            "+name=x_${seed}",
        ),
        *("data.normalisation._target_=mrgen.data.normalisation.MinMax,mrgen.data.normalisation.ZScore", "trainer=[]"),
        *("hydra/launcher=slurm", "hydra.launcher.partition='gpu,long'", "hydra.launcher.timeout_min=60"),
        *("hydra/sweeper=search", "hydra.sweeper.n_trials=20", "hydra.sweeper.sampler.seed=3"),
        *("hydra.sweeper.params.seed='1,2'", "hydra.sweeper.params.model.lr='interval(0.1,0.9)'"),
    ],
)
def test_what_says_what_is_trained_is_taken(argument: str):
    check_arguments([argument], WHERE)


@pytest.mark.parametrize(
    "argument",
    [
        "hydra.launcher.setup=['touch victim']",
        "hydra.launcher.partition='gpu\ntouch victim'",
        "hydra.launcher.additional_parameters={wrap: x}",
        "+hydra.launcher.additional_parameters.prolog=x",
        "hydra.launcher._target_=os.system",
        "hydra.sweeper._target_=os.system",
        "hydra.sweeper.storage='sqlite:///victim'",
        "hydra.callbacks.x={_target_: os.system}",
        "+hydra.callbacks.x._target_=os.system",
        "hydra.searchpath=[file:///tmp]",
        "hydra.run.dir=/tmp",
        "hydra.output_subdir=/tmp",
        "hydra.job.env_set={LD_PRELOAD: x}",
        "hydra/callbacks=x",
        "hydra/launcher=../../x",
        "+hydra/x@hydra.callbacks=y",
        "hydra.launcher.partition=${oc.env:HOME}",
    ],
)
def test_what_runs_around_a_training_is_not_taken_from_a_folder(argument: str):
    with pytest.raises(UserError, match=r"multirun\.yaml: the sweep was started with .*say it again behind resume="):
        check_arguments([argument], WHERE)


@pytest.mark.parametrize(
    "argument",
    [
        *(
            "model._target_=os.system",
            "+callbacks.x={_target_: os.system, command: true}",
            "model._target_=a.B,os.system",
        ),
        *("+augmentation.transforms=[{_target_: torchio.Lambda}]", "data.normalisation={_target_: numpy.load}"),
        *("+callbacks.x='${oc.create:{_target_: os.system}}'", "name=${oc.env:SECRET}", "model='${${a}:b}'"),
        *("experiment=../../../evil", "model=/tmp/evil", "experiment=choice(rsnet/rsnet,../evil)", "+a=choice(1"),
        *("hydra.sweeper.params.model._target_='os.system'", "experiment=${oc.env:X}", "data@x=../y"),
    ],
)
def test_what_is_more_than_data_is_refused(argument: str):
    with pytest.raises(UserError, match=r"^sweep/multirun\.yaml: "):
        check_arguments([argument], WHERE)


@pytest.mark.parametrize(
    "argument",
    [
        *("+model@hydra.callbacks.jobs=nothing", "+hydra.sweeper.params.monitor=${y}", "++trust=[os]", "+resume=x"),
        *("hydra.sweeper.params.trust='[os]'", "hydra.sweeper.params.name='${a}${b}'"),
    ],
)
def test_what_is_put_elsewhere_or_read_once_more_is_refused(argument: str):
    """A package of Hydra's own, an argument of the jobs that would be joined from two, and what the user alone says."""
    with pytest.raises(UserError, match=r"^sweep/multirun\.yaml: found"):
        check_arguments([argument], WHERE)


def test_parameters_of_a_sweep_may_not_reach_hydra_either():
    with pytest.raises(UserError, match="decides what runs on this machine"):
        check_arguments(["hydra.sweeper.params.hydra.launcher.setup='[x]'"], WHERE)
