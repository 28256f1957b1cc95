"""A reader's study of which images look real (Guo et al., Table 1): the sheet, its key, and what the answers say.

The sheet shows real and synthetic slices side by side in an order of chance, under letters. It is one HTML file that
needs nothing else, and holds nothing that tells which is which: that stands in the key, which is kept apart.
"""

import base64
import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np

from mrgen.errors import UserError
from mrgen.evaluation.figures import SEQUENCES, axial
from mrgen.evaluation.samples_figures import WINDOW, mask_colours, mask_picture, surroundings
from mrgen.evaluation.swap import REAL
from mrgen.evaluation.swap_tables import DASH, cell
from mrgen.evaluation.table import Table, write_rows
from mrgen.files import read_text, write_text

__all__ = ["BlindItem", "preference_table", "read_answers", "read_key", "score", "write_blind_sheet"]

ANSWERS = ("sheet", "item", "letter", "real", "most")
KEY = ("sheet", "item", "letter", "method", "subject", "slice")
BARE: dict[str, Any] = {"Software": None}  # of a PNG, in which matplotlib would name itself
README = """\
sheet.html in blind/ is for the reader, who gives each picture a yes or no and saves answers.csv.
Do not open key.csv here before reading is done: it says which picture is real and who made the others.
Afterwards: mrgen-evaluate experiment=samr/samples answers=answers.csv key=key.csv
"""


@dataclass(frozen=True)
class BlindItem:
    """One slice, real and as every method makes it from the real label.

    Attributes:
        subject: its id.
        slice: its number in the scan.
        label: (X, Y) classes, 255 ignored.
        brain: (X, Y) bool.
        images: by method, ``real`` among them, (C, X, Y) on [−1, 1].
    """

    subject: str
    slice: int
    label: np.ndarray
    brain: np.ndarray
    images: Mapping[str, np.ndarray]


def write_blind_sheet(
    items: Sequence[BlindItem], out_dir: Path, *, modalities: Sequence[str], classes: Sequence[str], seed: int
) -> None:
    """Writes ``blind/sheet.html``, and ``key/key.csv`` with a line on when to open it.

    All pictures are cut out along the brain: outside it a real scan was set to the background when it was read, which
    no reader should know it by. The file's own contents do not name, order or describe them otherwise.

    Args:
        items: of the same methods each; shown in this order.
        out_dir: where the two folders go.
        modalities: the images' channels, in order.
        classes: of the label; the first is no lesion.
        seed: of the order of the letters.

    Raises:
        UserError: more methods than letters.
    """
    from jinja2 import Environment

    letters = ascii_uppercase[: len(items[0].images)]
    if len(letters) < len(items[0].images):
        raise UserError(f"found {len(items[0].images) - 1} runs, expected {len(ascii_uppercase) - 1} or fewer")
    rng = np.random.default_rng(seed)
    shown, key = [], []
    for number, item in enumerate(items, start=1):
        place, methods = surroundings(item.brain, item.label), list(item.images)
        order = [methods[i] for i in rng.permutation(len(methods))]
        cut = [np.where(item.brain, item.images[name], WINDOW[0]) for name in order]  # (C, X, Y) each
        shown.append(
            {
                "mask": _png(axial(mask_picture(item.label, item.brain, classes)[place].transpose(2, 0, 1))),
                "candidates": [[_png(axial(channel[place])) for channel in image] for image in cut],
            }
        )
        for letter, name in zip(letters, order, strict=True):
            key.append({"item": number, "letter": letter, "method": name, "subject": item.subject, "slice": item.slice})
    # Answers to another sheet are recognised by it.
    sheet = hashlib.sha256(repr(shown).encode()).hexdigest()[:12]
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, trim_blocks=True).from_string(template)
    text = page.render(
        sheet=sheet,
        letters=letters,
        sequences=[SEQUENCES.get(name, name.upper()) for name in modalities],
        items=shown,
        colours=mask_colours(classes),
    )
    for folder in ("blind", "key"):
        (out_dir / folder).mkdir(parents=True, exist_ok=True)
    write_text(out_dir / "blind" / "sheet.html", text)
    write_rows(out_dir / "key" / "key.csv", [{"sheet": sheet, **line} for line in key])
    write_text(out_dir / "key" / "README.txt", README)


def _png(picture: np.ndarray) -> str:
    """(N, M) in the window, grey, or (N, M, 3) RGB as the base64 of a PNG that holds pixels and nothing else."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, picture, cmap="gray", vmin=WINDOW[0], vmax=WINDOW[1], format="png", metadata=BARE)
    return base64.b64encode(file.getvalue()).decode()


# ----- the answers ---------------------------------------------------------------------------------------------------


def read_answers(path: Path) -> list[dict[str, str]]:
    """What the sheet's button saved: ``sheet``, ``item``, ``letter``, ``real`` and ``most`` (yes, no or nothing).

    Raises:
        UserError: no such file, or another one.
    """
    answers = _read(path, ANSWERS, "the answers.csv that the sheet saves")
    for line in answers:
        for name in ("real", "most"):
            if line[name] not in ("yes", "no", ""):
                where = f"item {line['item']}, {line['letter']}"
                raise UserError(f"{path}: {where}: {name} is {line[name]!r}; expected yes, no or nothing")
    chosen = [line["item"] for line in answers if line["most"] == "yes"]
    if twice := sorted({item for item in chosen if chosen.count(item) > 1}):
        raise UserError(f"{path}: item {twice[0]} has several pictures that look most like a real scan; expected one")
    return answers


def read_key(path: Path) -> list[dict[str, str]]:
    """What ``write_blind_sheet`` wrote: ``sheet``, ``item``, ``letter``, ``method``, ``subject`` and ``slice``.

    Raises:
        UserError: no such file, or another one.
    """
    expected = "the key.csv that was written with the sheet"
    key = _read(path, KEY, expected)
    items: dict[str, list[str]] = {}
    for line in key:
        items.setdefault(line["item"], []).append(line["method"])
    shown = sorted(next(iter(items.values())))
    for item, methods in items.items():  # every item shows an image of each
        if sorted(methods) != shown or len({*methods}) < len(methods):
            found = f"{', '.join(methods)} in item {item} and {', '.join(shown)} in another"
            raise UserError(f"{path}: found {found:.200}; expected {expected}, with the same methods in all")
    return key


def _read(path: Path, columns: Sequence[str], expected: str) -> list[dict[str, str]]:
    text = read_text(path, expected=expected, remedy="give that file as it was saved").removeprefix("\ufeff")
    try:
        lines = list(csv.DictReader(io.StringIO(text, newline=""), restval=""))
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read ({error}); expected {expected}") from error
    if not lines or not set(columns) <= set(lines[0]):
        found = ", ".join(map(str, lines[0])) if lines else "no lines"
        raise UserError(f"{path}: found {found}; expected {expected}, with the columns {', '.join(columns)}")
    return [{name: (line[name] or "").strip() for name in columns} for line in lines]


def score(answers: Sequence[Mapping[str, str]], key: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """How often each method's images were taken for real.

    Args:
        answers: of ``read_answers``, one reader's.
        key: of ``read_key``.

    Returns:
        One mapping a method, real first and then from the most to the least accepted: ``method``; ``n`` images that
        were answered, ``real`` (%), the share of yes, with ``real_low`` and ``real_high``; ``n_most`` items in which
        one was chosen, ``most`` (%), likewise. The intervals are Wilson's at 95%, nan where nothing was answered.

    Raises:
        UserError: answers to another sheet, to pictures that are not in the key, or twice to one.
    """
    of = {(line["item"], line["letter"]): line["method"] for line in key}
    places = [(line["item"], line["letter"]) for line in answers]
    sheets = {line["sheet"] for line in key}, {line["sheet"] for line in answers}
    if sheets[0] != sheets[1]:
        found, expected = (", ".join(sorted(sheet)) or "none" for sheet in (sheets[1], sheets[0]))
        raise UserError(f"the answers are to sheet {found}, the key to {expected}; give the two that belong together")
    for place in places:
        if place not in of or places.count(place) > 1:
            what = "stands twice in the answers" if place in of else "is not in the key"
            raise UserError(f"item {place[0]}, {place[1]} {what}; give answers.csv as the sheet saved it")
    lines = []
    for method in dict.fromkeys(of.values()):
        mine = [line for line, place in zip(answers, places, strict=True) if of[place] == method]
        line: dict[str, Any] = {"method": method}
        for name, count in (("real", "n"), ("most", "n_most")):
            said = [answer[name] == "yes" for answer in mine if answer[name]]
            line |= {count: len(said), **_rate(name, sum(said), len(said))}
        lines.append(line)
    return sorted(lines, key=lambda line: (line["method"] != REAL, -np.nan_to_num(line["real"], nan=-1)))


def _rate(name: str, yes: int, count: int) -> dict[str, float]:
    from scipy.stats import binomtest

    if not count:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    interval = binomtest(yes, count).proportion_ci(method="wilson")
    return {name: 100 * yes / count, f"{name}_low": 100 * interval.low, f"{name}_high": 100 * interval.high}


def preference_table(
    lines: Sequence[Mapping[str, Any]], *, subjects: int, items: int, paper: Mapping[str, Any] | None
) -> Table:
    """The study's table, the paper's Table 1 beside it.

    Args:
        lines: of ``score``.
        subjects: whose slices were shown.
        items: how many slices were.
        paper: ``title`` and ``preference``, percent by method; None: none.
    """
    printed = (paper or {}).get("preference", {})
    table = Table("Human preference", ["method", "n", "acceptable as real (%)", "n", "most like a real scan (%)"])
    for line in lines:
        row = [line["method"], str(line["n"]), cell(line, "real", 1), str(line["n_most"]), cell(line, "most", 1)]
        table.rows.append(row)
    table.notes = [
        f"One reader, {items} slices of {subjects} subjects. n: what was answered.",
        "In brackets Wilson's 95% interval; slices of one subject are alike, which it does not know: it is too narrow.",
    ]
    if paper:
        table.columns = [*table.columns, "paper (%)"]
        for row, line in zip(table.rows, lines, strict=True):
            rate = printed.get(str(line["method"]).partition("#")[0])  # behind it the number of a repeated run
            row.append(DASH if rate is None else f"{rate:.1f}")
        table.notes.append(f"Paper: {paper['title']}.")
    return table
