"""Seeded damage to text files: encodings, half a file, and each key of JSON and YAML missing or of the wrong type."""

import csv
import io
import json
import random
from typing import Any

import yaml

from tests.faults.mutations import Mutator, Unfit, append_garbage, drop_block, empty, flip_bit, lose_the_end, truncate

__all__ = ["CSV", "JSON", "YAML", "same_form"]

DEEP = "[" * 3000 + "]" * 3000
WRONG: tuple[Any, ...] = (
    *(None, [], {}, "text", "", -1, 0, 1e308, float("nan"), True, 10**30, 0.5, [None], {"a": {"b": []}}, ["a", 1]),
    *("${oc.env:HOME}", "${nothing}", "${", "../../..", "/dev/zero", "é\x00", "a" * 5000, "*", "%s{}", "-"),
)


def utf16(data: bytes, rng: random.Random) -> bytes:
    return data.decode().encode("utf-16")


def latin1(data: bytes, rng: random.Random) -> bytes:
    place = data.find(b"\n") + 1
    return data[:place] + "Ünreadable".encode("latin-1") + data[place:]


def byte_order_mark(data: bytes, rng: random.Random) -> bytes:
    return b"\xef\xbb\xbf" + data


def nul(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + b"\x00" + data[place:]


def carriage_returns(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"\n", b"\r\n")


def no_last_newline(data: bytes, rng: random.Random) -> bytes:
    return data.rstrip(b"\n")


def other_content(data: bytes, rng: random.Random) -> bytes:
    return rng.choice((b"[]", b"{}", b"null", b"3", b'"text"', b"true", b"[[]]", b"- a\n- b\n", b"a: b\n", b"\n\n"))


def nested(data: bytes, rng: random.Random) -> bytes:
    return DEEP.encode()


def tag(data: bytes, rng: random.Random) -> bytes:
    return b"a: !!python/object/apply:os.system ['touch canary']\n" + data


def anchors(data: bytes, rng: random.Random) -> bytes:
    """A few lines that mean billions of items."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return ("\n".join(lines) + "\n").encode() + data


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in items for found in ((*path, key), *_paths(value, (*path, key)))]


def _changed(content: Any, rng: random.Random) -> Any:
    """One key of a content missing, or something else."""
    paths = _paths(content)
    if not paths:
        raise Unfit
    depth = rng.randint(1, max(map(len, paths)))  # a few keys at the top mean more than many leaves
    path = rng.choice([path for path in paths if len(path) <= depth])
    node = content
    for key in path[:-1]:
        node = node[key]
    if rng.random() < 0.25:
        del node[path[-1]]
    else:
        node[path[-1]] = rng.choice(WRONG)
    return content


def json_key(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(_changed(json.loads(data), rng), indent=1).encode()


def yaml_key(data: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(_changed(yaml.safe_load(data), rng), sort_keys=False).encode()


def repeated_key(data: bytes, rng: random.Random) -> bytes:
    lines = [line for line in data.split(b"\n") if b":" in line and not line.rstrip().endswith((b"[", b"{", b":"))]
    if not lines:
        raise Unfit
    line = rng.choice(lines)
    key, _, _ = line.partition(b":")
    return data.replace(line, line + b"\n" + key + b": 7" + b"," * line.rstrip().endswith(b","), 1)


def _rows(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode())))


def _written(rows: list[list[str]], delimiter: str = ",") -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return out.getvalue().encode()


def csv_cell(data: bytes, rng: random.Random) -> bytes:
    rows = _rows(data)
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(("", "text", "-1", "nan", "1e400", "é", "=1+1", "9" * 30, '"', "\x00"))
    return _written(rows)


def csv_cell_more(data: bytes, rng: random.Random) -> bytes:
    rows = _rows(data)
    rng.choice(rows).append("more")
    return _written(rows)


def csv_cell_less(data: bytes, rng: random.Random) -> bytes:
    rows = _rows(data)
    rng.choice(rows).pop()
    return _written(rows)


def csv_column(data: bytes, rng: random.Random) -> bytes:
    rows = _rows(data)
    column = rng.randrange(len(rows[0]))
    return _written([row[:column] + row[column + 1 :] for row in rows])


def csv_semicolons(data: bytes, rng: random.Random) -> bytes:
    return _written(_rows(data), ";")


def csv_tabs(data: bytes, rng: random.Random) -> bytes:
    return _written(_rows(data), "\t")


def csv_blanks(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b",", b" , ")


def csv_open_quote(data: bytes, rng: random.Random) -> bytes:
    place = data.find(b"\n") + 1
    return data[:place] + b'"' + data[place:]


def csv_no_header(data: bytes, rng: random.Random) -> bytes:
    return data.partition(b"\n")[2]


def csv_row_twice(data: bytes, rng: random.Random) -> bytes:
    rows = _rows(data)
    return _written([*rows, rng.choice(rows[1:])])


TEXT: tuple[Mutator, ...] = (
    *(truncate, utf16, empty, flip_bit, nul, latin1, byte_order_mark, carriage_returns, other_content, lose_the_end),
    *(no_last_newline, drop_block, append_garbage),
)
JSON: tuple[Mutator, ...] = (json_key, *TEXT, json_key, nested, json_key, repeated_key, *[json_key] * 12)
YAML: tuple[Mutator, ...] = (yaml_key, *TEXT, yaml_key, nested, anchors, tag, repeated_key, *[yaml_key] * 12)
CSV: tuple[Mutator, ...] = (
    *(csv_cell, csv_semicolons, *TEXT, csv_column, csv_cell_more, csv_cell_less, csv_tabs, csv_blanks, csv_open_quote),
    *(csv_no_header, csv_row_twice, csv_cell, csv_cell, csv_cell),
)


def same_form(before: Any, after: Any) -> bool:
    """Whether a content could have been written by hand or by us in place of another: same keys, same types.

    Such a change cannot be told from data: a learning rate of 0.0006 where 0.0005 stood.
    """
    if isinstance(before, bool) or isinstance(after, bool) or before is None or after is None:
        return type(before) is type(after)
    if isinstance(before, int | float) and isinstance(after, int | float):
        return abs(after) <= 1e6 * (1 + abs(before)) and (after >= 0 or before < 0) and after == after
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(same_form(before[key], after[key]) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return all(any(same_form(old, new) for old in before) for new in after) and bool(before) == bool(after)
    return isinstance(before, str) and isinstance(after, str) and after.isprintable() and "${" not in after
