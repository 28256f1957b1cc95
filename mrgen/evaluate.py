"""``mrgen-evaluate``: runs become tables, figures and CSV."""

from omegaconf import DictConfig, ListConfig

from mrgen.errors import UserError
from mrgen.launch.app import leave_nothing, run_app


def task(conf: DictConfig) -> None:
    """Judges runs by what the preset says; of a sweep alone it shows how far the jobs are."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from mrgen.launch.build import trust

    trust(conf.trust)
    if conf.evaluation is None and conf.sweep:
        from mrgen.launch.sweeps.jobs import view

        for folder in conf.sweep if isinstance(conf.sweep, ListConfig) else [conf.sweep]:
            view(Path(str(folder)).expanduser())
        leave_nothing(Path(HydraConfig.get().runtime.output_dir))
        return
    if conf.evaluation is None:
        raise UserError("nothing says what to judge; choose a preset, such as experiment=rsnet/swap")
    from mrgen.launch.going_on import only_here
    from mrgen.launch.judging.augmenting import judge_augmentation
    from mrgen.launch.judging.availability import judge_availability
    from mrgen.launch.judging.benching import judge_bench
    from mrgen.launch.judging.cross_validating import cross_validate
    from mrgen.launch.judging.evaluating import evaluate
    from mrgen.launch.judging.sampling import KEYS, draw_samples
    from mrgen.launch.tracking import track_results

    judges = {
        "cross_validation": cross_validate,
        "augmentation": judge_augmentation,
        "availability": judge_availability,
        "bench": judge_bench,
        "samples": draw_samples,
    }
    if conf.evaluation.kind != "samples" and (asked := [f"{key}={conf[key]}" for key in KEYS if conf[key]]):
        raise UserError(f"{', '.join(asked)}: only samples have a blind sheet; choose experiment=samr/samples")
    judge = judges.get(conf.evaluation.kind, evaluate)
    out_dir = Path(HydraConfig.get().runtime.output_dir)
    with only_here(out_dir, use="written to"):
        results = judge(conf, out_dir)
    track_results(conf, results)
    print(f"results: {results}")


def main() -> None:
    """Console script."""
    import sys

    if len(sys.argv) == 2 and sys.argv[1].startswith("sweep="):  # a look leaves nothing behind
        sys.argv += ["hydra.run.dir=.", "hydra.output_subdir=null"]
    run_app("evaluate", task)


if __name__ == "__main__":
    main()
