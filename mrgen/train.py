"""``mrgen-train``: a preset becomes a run folder with checkpoint, metrics, config and status."""

from omegaconf import DictConfig

from mrgen.errors import UserError
from mrgen.launch.app import run_app


def task(conf: DictConfig) -> None:
    """Trains, or plans with ``plan=true``."""
    import os
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if "evaluation" in conf:
        raise UserError(f"{conf.name} is a preset of mrgen-evaluate: there is nothing in it to train")
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    several = conf.trainer.devices not in (1, "1", "auto") or conf.trainer.get("num_nodes", 1) != 1
    if HydraConfig.get().mode == RunMode.MULTIRUN and several and not conf.plan:
        # Lightning would start the second rank with -m, and it would run a sweep of its own.
        raise UserError(
            "a sweep trains on one device a job; leave -m out to train on several, or set trainer.devices=1"
        )
    if conf.plan:
        from mrgen.launch.plan import plan, show

        show(conf.name, plan(conf))
        return
    from mrgen.launch.training import train

    train(conf, run_dir)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"run: {run_dir}")


def main() -> None:
    """Console script."""
    run_app("train", task)


if __name__ == "__main__":
    main()
