"""``hydra/launcher=slurm``: a sweep's jobs become jobs of SLURM."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SlurmLauncher(Launcher):
    """Submits the jobs of a sweep and waits for them, unless ``launch.detach`` is set.

    Args:
        settings: the keys of ``conf/hydra/launcher/slurm.yaml``.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        # The task is not called here: each of a job's processes is a new mrgen-train.
        self.hydra_context = hydra_context
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        # Hydra imports every plugin at every start of every command.
        from mrgen.launch.cluster.submission import launch

        return launch(self.settings, self.config, self.hydra_context, job_overrides, first=initial_job_idx)
