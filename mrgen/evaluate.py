"""``mrgen-evaluate``: runs become tables, figures and CSV."""

from omegaconf import DictConfig

from mrgen.errors import UserError
from mrgen.launch.app import run_app


def task(conf: DictConfig) -> None:
    """Judges runs by what the preset says."""
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    if conf.evaluation is None:
        raise UserError("nothing says what to judge; choose a preset, such as experiment=rsnet/swap")
    from mrgen.launch.cross_validating import cross_validate
    from mrgen.launch.evaluating import evaluate

    judge = cross_validate if conf.evaluation.kind == "cross_validation" else evaluate
    out_dir = Path(HydraConfig.get().runtime.output_dir)
    print(f"results: {judge(conf, out_dir)}")


def main() -> None:
    """Console script."""
    run_app("evaluate", task)


if __name__ == "__main__":
    main()
