"""``mrgen-prepare``: a raw cohort on disk becomes a checked, prepared store."""

from omegaconf import DictConfig

from mrgen.launch.app import run_app


def task(conf: DictConfig) -> None:
    """Grows the phantom where the cohort is one, checks every subject, and prepares the good ones."""
    from mrgen.launch.preparing import prepare

    prepare(conf)


def main() -> None:
    """Console script."""
    run_app("prepare", task)


if __name__ == "__main__":
    main()
