"""Requests from files: what each kind says, which side wins, and that a fault is told with file and line."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mdm.plugins.errors import InputError
from mdm.tools import requests_file
from mdm.tools.requests_file import METADATA, Asked, read_requests

RECORD = {
    "task": "turn", "prompt": "now red", "picture": "given.png", "picture_sha256": sha256(b"given").hexdigest(),
    "seed": 7, "sample": 2, "solver": "dpmpp_2m", "steps": 20, "guidance": 2.0, "order": 2, "final_zero": False,
    "text": "one red cross", "evaluations": 20, "seconds": 0.5, "bundle": "tiny", "checkpoint": "ab" * 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()


def asked(name: str, content: str | bytes, line_is: str = "prompt", **given: Any) -> list[Asked]:
    path = Path("in", name)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_requests(path, line_is, given)


def picture(record: object, key: str = METADATA) -> Path:
    info = PngInfo()
    info.add_text(key, record if isinstance(record, str) else json.dumps(record))
    Image.new("RGB", (4, 4)).save("in/made.png", pnginfo=info)
    return Path("in/made.png")


def test_a_line_of_text_is_a_prompt() -> None:
    found = asked("a.txt", "\ufefftwo red circles\r\n\n  one blue cross  \n", seed=3)
    assert [one.fields for one in found] == [
        {"seed": 3, "prompt": "two red circles"}, {"seed": 3, "prompt": "one blue cross"},
    ]  # fmt: skip
    assert found[1].where == "file 'in/a.txt', line 3"


def test_or_a_picture_beside_the_file() -> None:
    (one,) = asked("a.txt", "b.png", "picture")
    assert one.fields == {"picture": Path("in/b.png")}
    (other,) = asked("a.txt", "/there/b.png", "picture")
    assert other.fields == {"picture": Path("/there/b.png")}


def test_a_line_of_json_comes_before_the_command_line() -> None:
    lines = [{"prompt": "a", "steps": 40, "t_start": 0.9}, {"prompt": "b \u2028 c", "steps": None, "picture": "b.png"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    first, second = asked("a.jsonl", text, steps=5, seed=1)
    assert first.fields == {"steps": 40, "seed": 1, "prompt": "a", "t_start": 0.9}
    assert second.fields == {"steps": 5, "seed": 1, "prompt": "b \u2028 c", "picture": Path("in/b.png")}


def test_a_picture_brings_all_of_its_request_and_nothing_of_its_outcome() -> None:
    Path("in/given.png").write_bytes(b"given")
    (one,) = read_requests(picture(RECORD), "prompt", {})
    outcome = ("text", "evaluations", "seconds", "bundle", "checkpoint", "picture_sha256")
    assert one.fields == {name: value for name, value in RECORD.items() if name not in outcome} | {
        "picture": Path("in/given.png")
    }
    assert one.checkpoint == RECORD["checkpoint"]
    assert one.request().sampler["order"] == 2


def test_the_command_line_varies_a_pictures_request() -> None:
    (one,) = read_requests(picture(RECORD), "prompt", {"seed": 8, "solver": "dpmpp_2m", "picture": "other.png"})
    assert (one.fields["seed"], one.fields["picture"], one.fields["order"]) == (8, "other.png", 2)
    Path("in/given.png").write_bytes(b"given")
    (one,) = read_requests(picture(RECORD), "prompt", {"solver": "heun"})
    assert {"solver": "heun", "steps": 20, "guidance": 2.0}.items() <= one.fields.items()
    assert one.fields.keys().isdisjoint({"order", "final_zero"}), "an option of another solver"


def test_another_picture_of_the_same_name_is_told() -> None:
    """Every folder of results has its 0000.png."""
    with pytest.raises(InputError, match=r"in/given.png' cannot be read"):
        read_requests(picture(RECORD), "prompt", {})
    Path("in/given.png").write_bytes(b"another")
    with pytest.raises(InputError, match=r"was made from another 'given.png' than the one that lies beside it"):
        read_requests(picture(RECORD), "prompt", {})


WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "kind": ("a.csv", "a", "not a file of requests"),
    "empty": ("a.txt", " \n\n", "is empty"),
    "bytes": ("a.txt", b"ab\xff", "not UTF-8 text: byte 2"),
    "json": ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', "file 'in/a.jsonl', line 2 is not sound JSON"),
    "list": ("a.jsonl", "[1]", "line 1 is a list of 1, expected an object"),
    "unknown": ("a.jsonl", '{"promt": "a"}', "line 1 has the unknown field 'promt'; did you mean 'prompt'?"),
    "noise": ("a.jsonl", '{"noise": [1]}', "unknown field 'noise'"),
    "batch": ("a.jsonl", '{"batch": 2}', "unknown field 'batch'"),
    "picture": ("a.jsonl", '{"picture": [1]}', "line 1: picture is a list of 1, expected a path"),
    "twice": ("a.jsonl", '{"seed": 1, "seed": 2}', "stands 2 times"),
    "lines": ("a.txt", "a\n" * 11, "more than 10 lines"),
    "line": ("a.jsonl", f'{{"prompt": "{"a" * 2**20}"}}', "expected at most"),
    "foreign": ("a.png", "no picture", "is not a picture"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_told_in_three_lines(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests_file, "MAX_LINES", 10)
    name, content, said = WRONG[case]
    with pytest.raises(InputError) as refused:
        asked(name, content)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("record", "key", "said"),
    [
        (RECORD, "other", "holds no request"),
        ("{", METADATA, "is not sound JSON"),
        ([1], METADATA, "is not one of ours"),
        ({"picture": 3}, METADATA, "is not one of ours"),
    ],
)
def test_a_picture_without_a_request_of_ours(record: object, key: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_requests(picture(record, key), "prompt", {})


def test_a_field_of_the_wrong_kind_is_told_with_its_line() -> None:
    (one,) = asked("a.jsonl", '{"task": "ask", "seed": "x"}')
    with pytest.raises(InputError, match=r"^file 'in/a.jsonl', line 1: seed is 'x', expected a whole number"):
        one.request()
    with pytest.raises(InputError, match=r"^seed is 'x'"):
        Asked({"task": "ask", "seed": "x"}).request()
