"""``mrgen-synthesize``: scans become NIfTI files of a missing sequence and of lesions; labels become a cohort."""

from omegaconf import DictConfig

from mrgen.launch.app import run_app


def task(conf: DictConfig) -> None:
    """Synthesises every subject below the input, or generates a cohort; exit code 1 where some were left out."""
    import sys

    from mrgen.launch.build import trust
    from mrgen.launch.synthesis.synthesizing import synthesize

    trust(conf.trust)
    if synthesize(conf):
        sys.exit(1)


def main() -> None:
    """Console script."""
    run_app("synthesize", task)


if __name__ == "__main__":
    main()
