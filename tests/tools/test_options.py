"""Sizes as people write them, and that nothing of a bar reaches a program."""

from __future__ import annotations

import click
import pytest

from mdm.tools.options import Bytes, progress_bar


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5 g", 15 * 10**8), ("2K", 2000), ("100", 100), ("1tib", 2**40)],
)
def test_a_size_is_read_as_people_write_it(text: str, size: int) -> None:
    assert Bytes().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GB", "-4GB", "0", "4 PB", "4GBs", "1e9", "nan", "9" * 40])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size of memory such as 4GB"):
        Bytes().convert(text, None, None)


@pytest.mark.parametrize(("as_json", "transient", "seen"), [(False, False, True), (True, False, False)])
def test_a_bar_is_seen_by_people_alone(
    as_json: bool, transient: bool, seen: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar(as_json, transient) as bar:
        bar.update(bar.add_task("training", total=2, note="so far"), completed=2)
        bar.console.print("a draft")
    out, err = capsys.readouterr()
    assert out == ""
    assert [word in err for word in ("training", "2/2", "so far", "a draft")] == [seen] * 4


def test_a_transient_bar_leaves_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(as_json=False, transient=True) as bar:
        bar.update(bar.add_task("sampling", total=2, note=""), completed=2)
        bar.console.print("a draft")
    assert capsys.readouterr() == ("", "a draft\n")
