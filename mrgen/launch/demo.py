"""``make demo``: the main job on the embedded phantom, from an empty folder to a swap table, in one process.

A smoke run and not a result: 3 mm voxels, narrow networks, about a minute of training each.
"""

import argparse
import time
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console

from mrgen.launch.app import register_resolvers
from mrgen.launch.judging.evaluating import evaluate
from mrgen.launch.paths import CONF_DIR
from mrgen.launch.preparing import prepare
from mrgen.launch.status import has_begun, read_status
from mrgen.launch.training import train

__all__ = ["demo"]

TARGETS = ("t2", "t1ce")
NARROW = {"snet": "model.net.filters=8", "rsnet": "model.filters=8", "rnet": "model.filters=8"}


def demo(folder: Path, *, spacing: float = 3.0, subjects: int = 20, epochs: int = 20) -> Path:
    """Grows and prepares the phantom, trains S-Net and for each target RS-Net and R-Net, and swaps.

    Args:
        folder: everything is written below it; a second call goes on where the first one stopped.
        spacing: voxel size in mm.
        subjects: size of the cohort.
        epochs: of every training.

    Returns:
        The folder with ``table.md``, ``table.csv``, ``subjects.csv`` and ``figure.png``.
    """
    register_resolvers()
    console = Console()
    started = time.monotonic()
    data = [
        f"data.phantom.spacing={spacing}",
        f"data.phantom.subjects={subjects}",
        f"data.root='{folder}/cohort'",
        f"data.store='{folder}/store'",
    ]

    def composed(config: str, *overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose(config, [*overrides])

    def step(text: str) -> None:
        console.rule(f"{text}  [{time.monotonic() - started:.0f} s]", align="left")

    step(f"prepare: {subjects} phantom subjects at {spacing:g} mm")
    prepare(composed("prepare", *data))

    # Ten times the preset's learning rate: these networks are narrow and see a few hundred steps.
    common = [*data, f"trainer.max_epochs={epochs}", "trainer.log_every_n_steps=5", "model.lr=2e-3", "tracking=csv"]
    runs: list[Path] = []
    for name, target in [("snet", "t2"), *((method, target) for target in TARGETS for method in ("rsnet", "rnet"))]:
        run_dir = folder / "runs" / (name if name == "snet" else f"{name}-{target}")
        runs.append(run_dir)
        if read_status(run_dir).get("state") == "finished":
            continue
        step(f"train: {run_dir.name}")
        run_dir.mkdir(parents=True, exist_ok=True)
        resume = f"resume='{run_dir}'" if has_begun(run_dir) else "resume=null"
        train(composed("train", f"experiment=rsnet/{name}", f"target={target}", NARROW[name], *common, resume), run_dir)

    step("swap")
    swap = [f"segmenter='{runs[0]}'", "runs=[" + ",".join(f"'{run}'" for run in runs[1:]) + "]", "smoke=true"]
    out_dir = folder / "swap"
    evaluate(composed("evaluate", "experiment=rsnet/swap", *swap), out_dir)
    step("done")
    return out_dir


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--spacing", type=float, default=3.0, help="voxel size in mm")
    parser.add_argument("--subjects", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    out_dir = demo(
        arguments.folder.resolve(), spacing=arguments.spacing, subjects=arguments.subjects, epochs=arguments.epochs
    )
    print(out_dir)


if __name__ == "__main__":
    main()
