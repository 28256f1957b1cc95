"""The console scripts: quick to answer, and every mistake in a configuration is one sentence and exit code 1."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from mrgen.errors import UserError
from mrgen.launch import app
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.sweeps.resuming import resumed
from tests.launch.tools import TINY, Called, tiny_run

Script = Callable[..., Called]
HEAVY = "torch pytorch_lightning lightning torchio torchmetrics monai wandb nilearn nibabel SimpleITK scipy matplotlib"
PRESET = "experiment=rsnet/rsnet"


# ----- starting ----------------------------------------------------------------------------------------------------


def test_the_entry_points_import_nothing_heavy():
    code = "import sys, mrgen.train, mrgen.prepare, mrgen.evaluate; print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"mrgen", "hydra"} <= loaded
    assert not loaded & set(HEAVY.split())


@pytest.mark.parametrize("script", ["train", "prepare", "evaluate"])
def test_help_shows_the_groups_the_presets_and_examples(mrgen: Script, script: str, tmp_path: Path):
    called = mrgen(script, "--help")
    assert called.code == 0
    assert not list(tmp_path.iterdir())
    groups = dict(re.findall(r"^([\w/]+): (.+)$", called.out, flags=re.MULTILINE))
    if script == "prepare":
        assert {"phantom", "phantom_wmh", "brats2019", "wmh2017", "own"} <= set(groups["data"].split(", "))
    else:
        for folder in (path for path in (CONF_DIR / "experiment").iterdir() if path.is_dir()):
            assert groups[f"experiment/{folder.name}"] == ", ".join(sorted(f.stem for f in folder.glob("*.yaml")))
    examples = called.out.partition("== Examples ==")[2]
    assert len(re.findall(rf"^mrgen-{script} ", examples, flags=re.MULTILINE)) >= 2


def test_help_as_a_module_starts_in_one_and_a_half_seconds():
    """Of the processor, as the best of three: the clock would tell how busy the machine is."""
    import resource

    def spent() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return children.ru_utime + children.ru_stime

    seconds = []
    for _ in range(3):
        start = spent()
        done = subprocess.run([sys.executable, "-m", "mrgen.train", "--help"], capture_output=True, text=True)
        seconds.append(spent() - start)
        assert done.returncode == 0
        assert "experiment=rsnet/rsnet" in done.stdout
        if seconds[-1] < 1.5:
            break
    assert min(seconds) < 1.5


def test_a_composed_config_can_be_looked_at(mrgen: Script, tmp_path: Path):
    called = mrgen("train", "--cfg", "job", PRESET, "target=flair", "model.filters=4")
    assert called.code == 0
    assert "name: rsnet-${target}" in called.out
    assert "filters: 4" in called.out
    assert not (tmp_path / "runs").exists()


# ----- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "overrides", "said"),
    [
        ("train", [PRESET, "model.filter=4"], "valid keys: _target_, modalities, target, classes"),
        ("train", [PRESET, "trainer.max_epoch=4"], "valid keys: accelerator, devices"),
        ("train", [PRESET, "trget=t1"], "valid keys: .*seed, monitor, resume, trust, callbacks, trainer, launch, plan"),
        ("train", [PRESET, "+model.filter=4"], "mrgen.papers.rsnet.RSNet has no filter; valid keys: .*filters, levels"),
        (
            "train",
            ["experiment=rsnet/nope"],
            "presets: bench, .*joint_imputation/.*, rsnet/rnet, rsnet/rnet_with_mri, rsnet/rsnet",
        ),
        ("train", ["data=nope"], "Could not find 'data/nope'(.|\n)*phantom"),
        ("train", [PRESET, "target=t3"], "target is 't3'; expected one of t1, t1ce, t2, flair"),
        ("train", [PRESET, "target=t2", "model.extra_mri=t2"], "extra_mri is 't2'; expected nearest, null, or one of"),
        (
            "train",
            [PRESET, "model._target_=mrgen.papers.rsnet.Nope"],
            "_target_ 'mrgen.papers.rsnet.Nope' cannot be imp",
        ),
        ("train", [PRESET, "model._target_=nope.Nope"], "_target_ 'nope.Nope' cannot be imported"),
        ("train", [PRESET, "model.levels=1"], "UNet3d: levels is 1; expected 2 to 8"),
        ("train", [PRESET, "model.lr=${nope}"], "Interpolation key 'nope' not found"),
        ("train", [PRESET, "model.lr=[1"], r"no viable alternative at input '\[1'"),
        ("train", ["experiment=rsnet/swap"], "rsnet-swap is a preset of mrgen-evaluate"),
        ("train", ["data=own"], "data.layout is not set"),
        ("prepare", ["data=brats2019"], "data.root is not set; give the folder of the raw cohort"),
        ("prepare", ["data=own", "data.root=."], "data.layout is not set; give the cohort's table"),
        ("prepare", ["resume=somewhere"], "Could not override 'resume'"),
        ("evaluate", ["segmenter=x", "runs=[y]"], "choose a preset, such as experiment=rsnet/swap"),
        ("evaluate", [PRESET], "It is a preset of another command: mrgen-train trains, mrgen-evaluate judges"),
        (
            "train",
            ["experiment=rsnet/rsnt"],
            r"Could not find 'experiment/rsnet/rsnt'\nnearest: rsnet/rsnet, .*\npresets: ",
        ),
        (
            "train",
            ["callbacks=[imgs]"],
            r"'callbacks/imgs'\.\nnearest: images\noptions: early_stopping, ema, images, med",
        ),
        ("train", ["callbacks=null"], r"For none of a group's options write an empty list: callbacks=\[\]"),
        (
            "train",
            [PRESET, "callbacks.ema.decay=0.9"],
            r"^Could not override 'callbacks.ema.decay'.\nvalid keys: images\n.*: callbacks=\[images,ema\] adds it",
        ),
        ("train", [PRESET, "trainer.max_epochs=0"], "trainer.max_epochs is 0; expected a whole number from 1 on, or"),
        ("train", [PRESET, "trainer.max_epochs=null"], "no end, and a plan needs one"),
        ("evaluate", ["experiment=rsnet/swap", "segmenter=x"], "runs is empty; give the folders of the runs to judge"),
        (
            "evaluate",
            ["experiment=rsnet/swap", "runs=[x]"],
            "segmenter is not set; give the folder of its run: segmenter=RUN",
        ),
        ("evaluate", ["experiment=rsnet/swap", "segmenter=x", "runs=[x]"], "x: no such run folder or checkpoint"),
        (
            "evaluate",
            ["experiment=rsnet/swap", "evaluation.kind=swop"],
            "evaluation.kind is swop; expected cross_validation, swap",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(mrgen: Script, script: str, overrides: list[str], said: str):
    called = mrgen(script, *overrides, *(["plan=true"] if script == "train" else []))
    assert called.code == 1
    assert re.search(said, called.message), called.err


@pytest.mark.parametrize("sweep", [(), ("-m",)])
def test_a_place_that_cannot_be_written_to_is_named(
    mrgen: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: tuple[str, ...]
):
    def read_only(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    called = mrgen("train", *sweep, PRESET, "plan=false")
    assert called.code == 1
    assert re.search(r"runs/\S+: Read-only file system; this process must be able to read and write", called.message)


def test_a_yaml_file_that_is_none_is_named(mrgen: Script, tmp_path: Path):
    extra = tmp_path / "mine" / "experiment"
    extra.mkdir(parents=True)
    (extra / "broken.yaml").write_text("# @package _global_\nname: [x\n")
    called = mrgen("train", "--config-dir", str(tmp_path / "mine"), "experiment=broken", "plan=true")
    assert called.code == 1
    assert "broken.yaml" in called.message


def test_a_misspelt_key_in_a_users_own_preset_names_the_valid_ones(mrgen: Script, tmp_path: Path):
    extra = tmp_path / "mine" / "experiment"
    extra.mkdir(parents=True)
    (extra / "mine.yaml").write_text("# @package _global_\nname: mine\nmodel:\n  filtres: 4\n")
    called = mrgen("train", "--config-dir", str(tmp_path / "mine"), "experiment=mine", "plan=true")
    assert called.code == 1
    assert "RSNet has no filtres; valid keys: modalities, target, classes" in called.message


def test_a_missing_store_names_mrgen_prepare_and_the_run_can_be_resumed_once_it_is_there(
    mrgen: Script, tmp_path: Path, phantom_store: Path, last_words: list[Callable[[], None]], capsys
):
    store, run_dir = tmp_path / "later", tmp_path / "a run, 'quoted'=yes"
    quoted = str(run_dir).replace("'", r"\'")
    called = mrgen("train", PRESET, *TINY, "trainer.max_epochs=1", f"data.store={store}", f"hydra.run.dir='{quoted}'")
    assert called.code == 1
    assert f"{store}: found no cohort.json" in called.message
    assert "run mrgen-prepare with" in called.message
    assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    last_words[-1]()
    line = capsys.readouterr().err
    assert line.startswith("resume with: mrgen-train ")
    assert "no checkpoint yet: it starts over" in line

    import shlex

    arguments = shlex.split(line.partition("mrgen-train")[2].partition("(no checkpoint")[0])
    shutil.copytree(phantom_store, store)
    called = mrgen("train", *arguments)
    assert called.code == 0, called.err
    assert called.out.splitlines()[-1] == f"run: {run_dir}"
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"
    assert sorted(path.name for path in run_dir.iterdir() if not path.name.startswith(".")) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "split.json",
        "status.json",
    ]


def test_crops_that_the_network_cannot_take_are_refused(mrgen: Script, phantom_store: Path):
    called = mrgen("train", PRESET, *TINY, f"data.store={phantom_store}", "model.levels=5")
    assert called.code == 1
    assert "the network needs multiples of 16; set data.sampling.divisor=16" in called.message
    called = mrgen(
        "train", PRESET, *TINY, f"data.store={phantom_store}", "data/sampling=patch", "data.sampling.size=[16,20,16]"
    )
    assert called.code == 1
    assert "data.sampling.size is [16, 20, 16]; expected three multiples of 8" in called.message


def test_labels_that_the_layout_does_not_have_are_refused(mrgen: Script, phantom_store: Path):
    called = mrgen("train", PRESET, *TINY, f"data.store={phantom_store}", "data.labels=lobes", "plan=true")
    assert called.code == 1
    assert "BraTS 2019 has no labels 'lobes'; valid names are regions, native" in called.message


def test_sequences_that_the_store_does_not_hold_are_named(mrgen: Script, phantom_store: Path):
    called = mrgen("train", PRESET, *TINY, f"data.store={phantom_store}", "data.modalities=[t1,t2,apt]")
    assert called.code == 1
    assert "prepared with t1, t1ce, t2, flair, without apt" in called.message


def test_two_processes_never_share_a_folder(mrgen: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stand_in):
    """Two runs that start in one second differ by a token."""
    for token in ("aaaa", "bbbb"):
        monkeypatch.setattr(app, "TOKEN", token)
        assert mrgen("train", PRESET).code == 0
    folders = sorted((tmp_path / "runs" / "rsnet-t2").iterdir())
    assert [folder.name[-4:] for folder in sorted(folders, key=lambda f: f.name[-4:])] == ["aaaa", "bbbb"]


def test_every_job_of_a_sweep_has_a_folder_of_its_own(mrgen: Script, tmp_path: Path, stand_in):
    """And all of them one, by which the sweep can be judged. Sweeping presets as well: their names hold slashes."""
    called = mrgen("train", "-m", "experiment=rsnet/rsnet,rsnet/rnet", "target=t1,t2")
    assert called.code == 0, called.err
    folders = {
        path.parents[1].relative_to(tmp_path / "runs").as_posix() for path in tmp_path.rglob(".hydra/config.yaml")
    }
    names = ("rsnet-t1", "rsnet-t2", "rnet-t1", "rnet-t2")
    assert len(folders) == 4
    for number, name in enumerate(names):
        assert [f for f in folders if re.fullmatch(rf"sweep_[\d_-]+_\w{{4}}/{number}_{name}", f)], folders
    assert len({folder.partition("/")[0] for folder in folders}) == 1


def test_a_plan_leaves_no_folder_behind(mrgen: Script, tmp_path: Path):
    small = ("model.filters=2", "model.levels=2", "plan=true")
    called = mrgen("train", "-m", PRESET, "target=t1,t9", *small)
    assert called.code == 1
    assert called.out.count("plan of ") == 1
    assert "target is 't9'" in called.err
    assert mrgen("train", PRESET, *small).code == 0
    assert mrgen("train", PRESET, "plan=maybe").message.startswith("plan=maybe: expected true or false")
    assert not [*(tmp_path / "runs").rglob("*.*")]


def test_a_folder_of_which_nothing_came_is_removed_and_one_that_was_named_stays(
    mrgen: Script, tmp_path: Path, phantom_store: Path
):
    wrong = (PRESET, *TINY, f"data.store={phantom_store}", "trainer.accelerator=gpu")
    called = mrgen("train", *wrong)
    assert called.code == 1
    assert called.err.startswith("error: trainer.accelerator is gpu, and PyTorch found no GPU on this machine")
    assert mrgen("evaluate").message.startswith("nothing says what to judge")
    assert not [*(tmp_path / "runs").rglob("*.*")]
    assert mrgen("train", *wrong, f"hydra.run.dir={tmp_path}/named").code == 1
    assert (tmp_path / "named" / "status.json").is_file()


def test_a_folder_that_holds_another_run_is_left_as_it_is(mrgen: Script, tmp_path: Path, stand_in):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    called = mrgen("train", "experiment=rsnet/snet", f"hydra.run.dir={tmp_path}/run")
    assert f"{tmp_path}/run holds a finished or interrupted run; give another folder" in called.message
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoints"]


def test_a_folder_that_cannot_be_made_is_named(mrgen: Script, tmp_path: Path):
    (tmp_path / "file").touch()
    for where in ("hydra.run.dir=/dev/null/x", f"hydra.run.dir={tmp_path}/file"):
        called = mrgen("train", PRESET, where)
        assert re.search(r"(/dev/null|file).*: .*; set MRGEN_RUNS or hydra\.run\.dir to where", called.message)


# ----- resume ------------------------------------------------------------------------------------------------------


def test_resume_reads_the_runs_own_config(rsnet_run: Path):
    arguments = resumed(["trainer.max_epochs=7", f"resume={rsnet_run}"])
    config_dir = Path(arguments[1])
    assert arguments[:4] == ["--config-path", str(config_dir), "--config-name", "config"]
    assert config_dir.stat().st_mode & 0o077 == 0  # a copy that nobody else can change once it was checked
    saved = OmegaConf.load(config_dir / "config.yaml")
    assert saved == OmegaConf.merge(OmegaConf.load(rsnet_run / "config.yaml"), {"trust": []})
    assert f"hydra.run.dir='{rsnet_run}'" in arguments
    assert arguments[-1] == "trainer.max_epochs=7"


@pytest.mark.parametrize("nothing", [[], ["resume="], ["resume=null"], [PRESET]])
def test_without_a_folder_nothing_is_resumed(nothing: list[str]):
    assert resumed(nothing) == nothing


def test_a_message_ends_where_nobody_reads_on(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        app.fail("a" * 2000 + "b" * 30)
    assert capsys.readouterr().err == "error: " + "a" * 2000 + "… (30 more characters)\n"


def test_resuming_what_is_no_run_is_refused(mrgen: Script, tmp_path: Path):
    for folder in (tmp_path, tmp_path / "not there"):
        called = mrgen("train", f"resume={folder}")
        assert called.code == 1
        assert "no config.yaml or multirun.yaml there; expected the folder of a run or a sweep" in called.message


def test_a_resumed_run_keeps_its_groups(rsnet_run: Path):
    with pytest.raises(UserError, match=r"tracking=csv: a resumed run keeps its tracking; only what"):
        resumed([f"resume={rsnet_run}", "tracking=csv"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("hydra: {{callbacks: {{x: {{_target_: os.system, command: touch {victim}}}}}}}", "found the key hydra"),
        ("hydra: {{searchpath: ['file://{victim}']}}", "found the key hydra"),
        ("defaults: ['/{victim}']", "found the key defaults"),
        ("callbacks: {{x: {{_target_: os.system, command: touch {victim}}}}}", "asks for 'os.system'"),
        ("monitor: '${{oc.create:{{_target_:os.system,command:x}}}}'", "expected values"),
        ("monitor: '${{oc.env:HOME}}'", "expected values"),
        ("trainer: {{strategy: {{_target_: os.system, command: touch {victim}}}}}", "asks for 'os.system'"),
        ("data: {{normalisation: {{_target_: numpy.load, file: {victim}}}}}", "asks for 'numpy.load'"),
        ("model: {{_target_: mrgen.data.store.remove_subject, store: x, id: y}}", "asks for 'mrgen.data.store"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_resumed_folder_says_what_is_trained_and_runs_nothing(
    mrgen: Script, rsnet_run: Path, tmp_path: Path, change: str, said: str, hidden: bool
):
    """In the config that training resolved, and in Hydra's, of a run that had not come as far."""
    run_dir, victim = shutil.copytree(rsnet_run, tmp_path / "run"), tmp_path / "victim"
    config = run_dir / "config.yaml"
    changed = OmegaConf.merge(OmegaConf.load(config), {})
    content = OmegaConf.to_container(changed)
    for key, value in yaml.safe_load(change.format(victim=victim)).items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value  # type: ignore
    config.write_text(yaml.safe_dump(content))
    if hidden:
        (run_dir / ".hydra").mkdir(exist_ok=True)
        config.rename(run_dir / ".hydra" / "config.yaml")
        shutil.rmtree(run_dir / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    called = mrgen("train", f"resume={run_dir}", "trainer.max_epochs=2")
    assert called.code == 1
    assert said in called.message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["status.json", "metrics.csv", "checkpoints/resume.ckpt", "images", ".hydra"])
def test_a_link_in_a_resumed_folder_is_refused(mrgen: Script, rsnet_run: Path, tmp_path: Path, name: str):
    run_dir, victim = shutil.copytree(rsnet_run, tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious")
    shutil.rmtree(run_dir / name, ignore_errors=True)
    (run_dir / name).unlink(missing_ok=True)
    (run_dir / name).symlink_to(victim)
    called = mrgen("train", f"resume={run_dir}", "trainer.max_epochs=2")
    assert called.code == 1
    assert f"{run_dir / name}: found a link to {victim}, expected what mrgen-train wrote" in called.message
    assert victim.read_text() == "precious"


def test_a_target_of_ones_own_is_resumed_with_trust(mrgen: Script, rsnet_run: Path, tmp_path: Path):
    """As what ``callbacks`` may be of Lightning's. The folder itself cannot ask for trust."""
    run_dir = shutil.copytree(rsnet_run, tmp_path / "run")
    conf = OmegaConf.load(run_dir / "config.yaml")
    conf.callbacks = {"summary": {"_target_": "pytorch_lightning.callbacks.ModelSummary"}}
    conf.trust = ["pytorch_lightning.callbacks"]
    OmegaConf.save(conf, run_dir / "config.yaml")
    called = mrgen("train", f"resume={run_dir}", "trainer.max_epochs=1")
    assert "add trust=[pytorch_lightning.callbacks]: it is imported and called then" in called.message
    called = mrgen("train", f"resume={run_dir}", "trainer.max_epochs=1", "trust=[pytorch_lightning.callbacks]")
    assert called.code == 0, called.err


@pytest.mark.parametrize("written", ["'{}'", '"{}"', "{}"])
def test_a_quoted_folder_is_the_folder(rsnet_run: Path, written: str):
    assert f"hydra.run.dir='{rsnet_run}'" in resumed([f"resume={written.format(rsnet_run)}"])


def test_resume_goes_on_with_single_values_changed(mrgen: Script, tmp_path: Path, phantom_store: Path):
    run_dir = tiny_run(tmp_path / "run", phantom_store)
    called = mrgen("train", f"resume={run_dir}", "trainer.max_epochs=2")
    assert called.code == 0, called.err
    assert "epoch 2/2" in called.out
    assert "epoch 1/" not in called.out
    assert not list(run_dir.rglob("*.log"))


def test_a_folder_that_holds_a_run_is_refused_without_resume(
    mrgen: Script, rsnet_run: Path, tmp_path: Path, phantom_store: Path
):
    run_dir = tmp_path / "run"
    shutil.copytree(rsnet_run, run_dir)
    called = mrgen("train", PRESET, *TINY, f"data.store={phantom_store}", f"hydra.run.dir={run_dir}")
    assert called.code == 1
    assert f"holds a finished or interrupted run; give another folder, or go on with resume={run_dir}" in called.message


def test_with_m_a_run_is_not_resumed(mrgen: Script, rsnet_run: Path):
    called = mrgen("train", "-m", f"resume={rsnet_run}")
    assert called.code == 1
    assert "goes on with one run; leave -m out" in called.message


def test_a_second_interrupt_ends_the_process_with_one_line():
    """While what was begun is being ended; the first one raises KeyboardInterrupt, as ever."""
    code = """
import os, signal
from mrgen.launch import app
app._end_at_the_second_interrupt()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("ending", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
print("never")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "ending\n")
    assert done.stderr == "error: interrupted twice, and ended at once; what was saved before is whole\n"
