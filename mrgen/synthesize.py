"""``mrgen-synthesize``: a checkpoint and a folder of scans become NIfTI files of a missing sequence and of lesions."""

from omegaconf import DictConfig

from mrgen.launch.app import run_app


def task(conf: DictConfig) -> None:
    """Synthesises every subject below the input; exit code 1 where some were left out."""
    import sys

    from mrgen.launch.synthesizing import synthesize

    if synthesize(conf):
        sys.exit(1)


def main() -> None:
    """Console script."""
    run_app("synthesize", task)


if __name__ == "__main__":
    main()
