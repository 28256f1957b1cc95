"""Whether a synthetic cohort may go on in a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mrgen.data.store import read_cohort
from mrgen.errors import UserError
from mrgen.launch.synthesis.generating_lesions import BOUNDS

__all__ = ["check_output"]


def check_output(output: Path, earlier: Mapping[str, Any] | None, asked: Mapping[str, Any]) -> None:
    """Raises UserError where the output holds anything but the beginning of what is asked for."""
    advice = "choose another output, or delete that folder"
    if earlier is None:
        if read_cohort(output) is not None:
            raise UserError(f"output={output}: found a prepared cohort that mrgen-synthesize did not make; {advice}")
        if others := sorted(path.name for path in output.iterdir() if path.name != ".lock"):
            (output / ".lock").unlink(missing_ok=True)
            raise UserError(f"output={output}: found {others[0]} there, expected an empty folder or a name for one")
        return
    said = {"prepared": "its real cohort was prepared anew since", "patients": "it was made from other patients"}
    changed = [
        said.get(key, f"{key} was {earlier.get(key)} and is now {value}")
        for key, value in asked.items()
        if key not in ("subjects", "slices", "complete") and _decisive(earlier.get(key)) != _decisive(value)
    ]
    if changed:
        raise UserError(f"output={output} holds another synthetic cohort: {'; '.join(changed)}; {advice}")
    if asked["slices"] < earlier["slices"]:
        raise UserError(
            f"output={output}: made for {earlier['subjects']} subjects of {earlier['slices']} slices, asked for "
            f"{asked['subjects']} of {asked['slices']}; ask for as many or more, {advice}"
        )


def _decisive(value: Any) -> Any:
    """What of a setting decides what is made: a bound on the tries says when to give up."""
    return {k: v for k, v in value.items() if k not in BOUNDS} if isinstance(value, Mapping) else value
