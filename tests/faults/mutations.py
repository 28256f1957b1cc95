"""Seeded damage to bytes, whatever they mean: what disks, transfers and editors do to files."""

import gzip
import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["BYTES", "PLACES", "Mutator", "Unfit", "archive_mutators", "inside_gzip"]

Mutator = Callable[[bytes, random.Random], bytes]


class Unfit(Exception):
    """The mutation has nothing to work on in this file."""


def _span(data: bytes, rng: random.Random, most: int) -> tuple[int, int]:
    if len(data) < 2:
        raise Unfit
    start = rng.randrange(len(data) - 1)
    return start, min(len(data), start + rng.randint(1, most))


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randint(2, 32)):
        data = flip_bit(data, rng)
    return data


def flip_at_start(data: bytes, rng: random.Random) -> bytes:
    """Where headers lie, which a flip anywhere hardly ever meets in a large file."""
    return flip_bit(data[:512], rng) + data[512:]


def flip_at_end(data: bytes, rng: random.Random) -> bytes:
    return data[:-64] + flip_bit(data[-64:], rng)


def zero_range(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng, 4096)
    return data[:start] + bytes(stop - start) + data[stop:]


def noise_range(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng, 4096)
    return data[:start] + rng.randbytes(stop - start) + data[stop:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def lose_the_end(data: bytes, rng: random.Random) -> bytes:
    return data[: -rng.randint(1, min(16, len(data) - 1))]


def lose_the_start(data: bytes, rng: random.Random) -> bytes:
    return data[rng.randint(1, min(16, len(data) - 1)) :]


def append_garbage(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.randint(1, 2000))


def append_zeros(data: bytes, rng: random.Random) -> bytes:
    return data + bytes(rng.randint(1, 2000))


def repeat_block(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng, 4096)
    return data[:stop] + data[start:]


def drop_block(data: bytes, rng: random.Random) -> bytes:
    start, stop = _span(data, rng, 4096)
    return data[:start] + data[stop:]


def swap_blocks(data: bytes, rng: random.Random) -> bytes:
    size = rng.choice((16, 512, 4096))
    if len(data) < 3 * size:
        raise Unfit
    a, b = sorted(rng.sample(range(len(data) // size - 1), 2))
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    blocks[a], blocks[b] = blocks[b], blocks[a]
    return b"".join(blocks)


def twice(data: bytes, rng: random.Random) -> bytes:
    return data + data


def empty(data: bytes, rng: random.Random) -> bytes:
    return b""


def all_zero(data: bytes, rng: random.Random) -> bytes:
    return bytes(len(data))


def a_page(data: bytes, rng: random.Random) -> bytes:
    """What a download gives where the server asks for a password."""
    return b"<!DOCTYPE html><html><body>Please log in</body></html>\n"


def newlines(data: bytes, rng: random.Random) -> bytes:
    """What a transfer as text does to bytes."""
    return data.replace(b"\n", b"\r\n")


BYTES: tuple[Mutator, ...] = (
    *(flip_bit, truncate, zero_range, append_garbage, flip_at_start, empty, flip_bits, lose_the_end, swap_blocks),
    *(repeat_block, noise_range, flip_at_end, a_page, drop_block, append_zeros, all_zero, lose_the_start, twice),
    *(newlines, flip_bit, flip_bit),
)


# ----- something else in a file's place ------------------------------------------------------------------------------


def gone(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing-of-that-name")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def huge_hole(path: Path) -> None:
    """Far more bytes than memory has, none of which takes room on the disk."""
    os.truncate(path, 1 << 36)


def filled_folder(path: Path) -> None:
    folder(path)
    shutil.copy(__file__, path / "something.txt")


PLACES: tuple[Callable[[Path], None], ...] = (gone, folder, pipe, link_to_nothing, link_to_itself, endless, huge_hole)


# ----- inside containers ---------------------------------------------------------------------------------------------


def inside_gzip(mutator: Mutator) -> Mutator:
    """The same damage before the file was compressed: its checksums are right."""

    def inside(data: bytes, rng: random.Random) -> bytes:
        return gzip.compress(mutator(gzip.decompress(data), rng), 1)

    inside.__name__ = f"{mutator.__name__} inside"
    return inside


def archive_mutators() -> tuple[Mutator, ...]:
    """Damage to the members of a zip archive, such as checkpoints and npz files are."""

    def rebuilt(data: bytes, change: Callable[[list[tuple[str, bytes]]], None]) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
        change(members)
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        return out.getvalue()

    def member_gone(data: bytes, rng: random.Random) -> bytes:
        return rebuilt(data, lambda members: members.pop(rng.randrange(len(members))) and None)

    def member_renamed(data: bytes, rng: random.Random) -> bytes:
        def change(members: list[tuple[str, bytes]]) -> None:
            i = rng.randrange(len(members))
            members[i] = ("renamed", members[i][1])

        return rebuilt(data, change)

    def member_empty(data: bytes, rng: random.Random) -> bytes:
        def change(members: list[tuple[str, bytes]]) -> None:
            i = rng.randrange(len(members))
            members[i] = (members[i][0], b"")

        return rebuilt(data, change)

    def members_swapped(data: bytes, rng: random.Random) -> bytes:
        def change(members: list[tuple[str, bytes]]) -> None:
            i, j = rng.sample(range(len(members)), 2)
            members[i], members[j] = (members[i][0], members[j][1]), (members[j][0], members[i][1])

        return rebuilt(data, change)

    def no_members(data: bytes, rng: random.Random) -> bytes:
        return rebuilt(data, lambda members: members.clear())

    return (member_gone, member_renamed, member_empty, members_swapped, no_members)
