"""Checkpoint files that are cut, spoiled, noise, or hold code: each is told in an InputError, and no code runs."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mdm.plugins.errors import InputError
from mdm.reference.checkpoint import read_tensors

# Large enough for a cut inside the data: torch.load fails in another way there than for a file cut short at its start.
TENSORS = {"a": torch.arange(40.0), "b": torch.ones(3, 5), "c": torch.zeros(30000)}


class Code:
    """Unpickled in full, this makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("suffix", [".pth", ".pt"])
@pytest.mark.parametrize("way", ["zip", "legacy", "bare"])
def test_code_in_a_file_does_not_run(suffix: str, way: str, tmp_path: Path) -> None:
    target, path = tmp_path / "made", tmp_path / f"weights{suffix}"
    content = {**TENSORS, "extra": Code(target)}
    if way == "bare":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == "zip")
    with pytest.raises(InputError, match="a file with code in it is never run") as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert not target.exists()
    if way == "bare":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists()  # so the file was a trap


def cut(whole: bytes, draws: random.Random) -> Iterator[bytes]:
    for length in (*range(80), *(draws.randrange(len(whole)) for _ in range(60))):
        yield whole[:length]


def noise(whole: bytes, draws: random.Random) -> Iterator[bytes]:
    for _ in range(60):
        yield draws.randbytes(draws.randrange(300))
    for _ in range(400):
        yield b"\x80\x02" + draws.randbytes(draws.randrange(60)) + b"."  # the frame of a pickle


def spoiled(whole: bytes, draws: random.Random) -> Iterator[bytes]:
    """Some bytes changed: near the start, near the end, anywhere."""
    for _ in range(300):
        copy, reach = bytearray(whole), draws.choice([50, 1000, len(whole)])
        for _ in range(draws.choice([1, 3, 30])):
            place = draws.randrange(reach)
            copy[draws.choice([place, -1 - place])] = draws.randrange(256)
        yield bytes(copy)


@pytest.mark.parametrize("damage", [cut, noise, spoiled])
@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.filterwarnings("ignore")  # torch warns of unknown pickle protocols before it refuses them
def test_a_damaged_file_is_told(
    form: str, damage: Callable[[bytes, random.Random], Iterator[bytes]], tmp_path: Path
) -> None:
    """Or it is read, where the damage hit values only; nothing but an InputError comes out."""
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    if form == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=form == "zip")
    wrong: list[str] = []
    read = refused = 0
    for blob in damage(path.read_bytes(), random.Random(0)):
        path.write_bytes(blob)
        try:
            read_tensors(path)
            read += 1
        except InputError as error:
            refused += 1
            if str(path) not in str(error) or len(str(error).splitlines()) > 3:
                wrong.append(f"message: {error}")
        except Exception as error:
            wrong.append(f"{len(blob)} bytes: {type(error).__name__}: {error}")
    print(f"{form}, {damage.__name__}: {read} read, {refused} refused, {len(wrong)} wrong")
    assert not wrong, "\n".join(sorted(set(wrong))[:5])
    assert refused > 50
    assert read == 0 or damage is spoiled
