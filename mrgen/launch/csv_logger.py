"""The metrics of a run as one CSV, the source of truth beside whatever service shows them.

Lightning's own CSV logger deletes the file when a run goes on in the same folder; this one continues it.
"""

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from mrgen.files import read_metrics, replacing

__all__ = ["CsvLogger"]


class CsvLogger(Logger):
    """One row a step, written whole at every ``save``, so that a killed run leaves no half line.

    Args:
        path: the CSV file. Rows of an earlier part of the run stay.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = list(read_metrics(path))

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def go_on_from(self, step: int) -> None:
        """Forgets rows after a step, -1 for all: the resumed run computes them again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        pass  # config.yaml has them

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {name: repr(float(value)) for name, value in metrics.items()}
        if "epoch" in metrics:
            row["epoch"] = int(metrics["epoch"])
        step = int(step or 0)
        if self.rows and int(self.rows[-1]["step"]) == step:  # training and validation report one after the other
            self.rows[-1].update(row)
        else:
            self.rows.append({"step": step, **row})

    @rank_zero_only
    def save(self) -> None:
        if not self.rows:
            return
        columns = ["epoch", "step", *sorted({name for row in self.rows for name in row} - {"epoch", "step"})]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
