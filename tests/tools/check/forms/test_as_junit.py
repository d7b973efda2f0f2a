from __future__ import annotations

import dataclasses
from xml.etree import ElementTree

import pytest

from mdm.tools.check.forms.as_junit import as_junit
from mdm.tools.check.report import Report


def cases(report: Report) -> dict[str, ElementTree.Element]:
    root = ElementTree.fromstring(as_junit(report))
    return {f"{case.get('classname')} {case.get('name')}": case for case in root.iter("testcase")}


def test_each_finding_is_one_case_and_the_counts_agree(failing: Report) -> None:
    root = ElementTree.fromstring(as_junit(failing))
    assert len(list(root.iter("testcase"))) == len(failing.findings)
    counts = failing.counts()
    told = {name: int(root.get(name, "-1")) for name in ("tests", "failures", "skipped", "errors")}
    skipped = counts["SKIPPED"] + counts["AMBIGUOUS"]
    assert told == {"tests": len(failing.findings), "failures": counts["FAIL"], "skipped": skipped, "errors": 0}
    for suite in root.iter("testsuite"):
        assert int(suite.get("tests", "-1")) == len(suite.findall("testcase"))
        assert int(suite.get("failures", "-1")) == len(suite.findall("testcase/failure"))
        assert int(suite.get("skipped", "-1")) == len(suite.findall("testcase/skipped"))


def test_a_failure_says_what_a_person_needs_in_ten_lines(failing: Report) -> None:
    failure = cases(failing)["mdm.check.blocks denoiser backbone.blocks.6 batch 2, text 5"].find("failure")
    assert failure is not None
    lines = (failure.text or "").splitlines()
    assert len(lines) <= 10
    text = "\n".join(lines)
    for needed in ("rms error 2.5e-5", "floor 2.0e-7", "limit 8.0e-7", "31 ×", "[1, 4, 15]", failing.command):
        assert needed in text


def test_a_failure_keeps_to_ten_lines_whatever_it_holds(failing: Report) -> None:
    lines = "\n".join(map(str, range(100)))
    failing.findings = [dataclasses.replace(one, said=lines, reproduce=lines) for one in failing.findings]
    failures = list(ElementTree.fromstring(as_junit(failing)).iter("failure"))
    assert failures
    assert all(len((failure.text or "").splitlines()) <= 10 for failure in failures)


def test_what_is_skipped_or_ambiguous_gives_its_reason(failing: Report) -> None:
    made = cases(failing)
    for name, said in (
        ("mdm.check.files weights.safetensors sha256", "--no-hashes was given"),
        ("mdm.check.decoded caption text seed 0", "AMBIGUOUS: the rms error is 31 times the floor"),
    ):
        skipped = made[name].find("skipped")
        assert skipped is not None
        assert skipped.get("message") == said
        assert made[name].find("failure") is None


def test_measures_are_properties(sound: Report) -> None:
    case = cases(sound)["mdm.check.trajectories t2i latents seed 0"]
    values = {one.get("name"): one.get("value") for one in case.iter("property")}
    assert values["used"] == "0.62"
    assert values["rms limit"] == "8e-07"
    picture = cases(sound)["mdm.check.decoded t2i picture seed 0"]
    assert {one.get("name"): one.get("value") for one in picture.iter("property")} == {
        "psnr": "71.25",
        "ssim": "0.99998",
    }


@pytest.mark.parametrize("start", range(0, 0x10000, 0x4000))
def test_no_character_breaks_the_xml(start: int, sound: Report) -> None:
    every = "".join(map(chr, range(start, start + 0x4000)))
    sound.findings = [dataclasses.replace(sound.findings[1], subject=every, said=every)]
    name = next(iter(cases(sound)))
    assert name.startswith("mdm.check.files ")
    # What XML knows comes back as it was.
    assert all(letter in name for letter in every if letter.isalnum())
