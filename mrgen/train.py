"""``mrgen-train``: a preset becomes a run folder with checkpoint, metrics, config and status."""

from omegaconf import DictConfig

from mrgen.errors import UserError
from mrgen.launch.app import leave_nothing, run_app
from mrgen.launch.sweeps.sweeping import check_objective, kept, table_at_the_end


def task(conf: DictConfig) -> float | None:
    """Trains, or plans with ``plan=true``.

    Returns:
        The least value of ``monitor``, for sweepers; None without one.
    """
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from mrgen.launch import ranks
    from mrgen.launch.build import trust
    from mrgen.launch.sweeps.jobs import objective

    trust(conf.trust)
    if "evaluation" in conf:
        raise UserError(f"{conf.name} is a preset of mrgen-evaluate: there is nothing in it to train")
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    if not isinstance(conf.plan, bool):
        raise UserError(f"plan={conf.plan}: expected true or false")
    if conf.plan:
        from mrgen.launch.plan import plan, show

        show(conf.name, plan(conf))
        leave_nothing(run_dir)
        return None
    check_objective(conf)
    if ranks.is_estimator(conf.model):
        if not ranks.first_rank():
            return None
        if conf.trainer.devices != 1:
            print(f"{conf.name} has no network and is fitted in one process, whatever trainer.devices says")
    elif ranks.is_rank():
        ranks.check_ranks(conf, run_dir)
    elif ranks.needs_processes(conf):
        ranks.train_on_devices(conf, run_dir)
        return objective(run_dir)
    from mrgen.launch.training import train

    train(conf, run_dir)
    if ranks.first_rank():
        print(f"run: {run_dir}")
    return objective(run_dir)


def main() -> None:
    """Console script."""
    with table_at_the_end():
        run_app("train", kept(task))


if __name__ == "__main__":
    main()
