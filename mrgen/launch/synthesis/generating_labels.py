"""What ``mrgen-synthesize`` needs for generators that are given labels: what may be done to lesions, and what was."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mrgen.data.generated import Lesion
from mrgen.data.lesions import KINDS
from mrgen.data.slices import SiteSlices
from mrgen.data.store import Store, StoredSubject
from mrgen.errors import UserError
from mrgen.launch.runs import Run
from mrgen.launch.synthesis.generating_lesions import lesion_settings
from mrgen.protocols import Generated, Generator

__all__ = ["LabelMethod"]

_DONE = {
    "mirror": "mirrored",
    "move": "moved",
    "enlarge": "enlarged",
    "shrink": "shrunk",
    "transplant": "transplanted",
}


class LabelMethod:
    """The run's model as the cohort's generator (a ``mrgen.launch.synthesis.generating.Method``).

    Args:
        run: of a ``mrgen.protocols.Generator``.
        conf: ``manipulations`` of ``conf/synthesize.yaml``.

    Raises:
        UserError: manipulations that there are not, or a setting of other generators.
    """

    def __init__(self, run: Run, conf: DictConfig):
        if given := lesion_settings(conf):
            raise UserError(
                f"{given[0]}: {run.conf.name} is no lesion VAE-GAN, of whose cohorts this is a setting; leave "
                f"{given[0].partition('=')[0]} out"
            )
        self.model: Generator = run.model
        self.kinds = _kinds(conf.manipulations)
        self.networks: Sequence[nn.Module] = [run.model] if isinstance(run.model, nn.Module) else []
        self.settings: Mapping[str, Any] = {}

    def donors(
        self, training: Sequence[StoredSubject], sampling: SiteSlices, lookup: np.ndarray
    ) -> list[StoredSubject]:
        return list(training)

    def patients(self, real: Store) -> set[str]:
        return set()

    def line(self, lesion: Lesion, made: Generated) -> str:
        done = "labels as they were" if lesion.manipulation is None else f"lesion {_DONE[lesion.manipulation]}"
        return f"{done} from {lesion.subject.id}" if lesion.manipulation == "transplant" else done

    def outcome(
        self, sources: Sequence[Mapping[str, Any]], exhausted: Mapping[str, Mapping[str, float]]
    ) -> tuple[str, Mapping[str, Any]]:
        counts = Counter(str(source["manipulation"]) for source in sources)
        lesions = [f"{counts[kind]} {_DONE[kind]}" for kind in KINDS if counts[kind]]
        lesions += [f"{counts['None']} as they were"] if counts["None"] else []
        return f"lesions: {', '.join(lesions)}", {}


def _kinds(asked: Any) -> tuple[str, ...]:
    kinds = KINDS if asked is None else OmegaConf.to_container(asked) if OmegaConf.is_list(asked) else [asked]
    if unknown := [kind for kind in kinds if kind not in KINDS]:  # type: ignore[union-attr]
        raise UserError(
            f"manipulations: found {', '.join(map(str, unknown))}; expected some of [{', '.join(KINDS)}], or [] for "
            "labels as they are"
        )
    return tuple(kind for kind in KINDS if kind in kinds)  # type: ignore[operator]
