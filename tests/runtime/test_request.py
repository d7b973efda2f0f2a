"""Requests from words as people and programs write them, and the sampler that comes of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdm.plugins.errors import InputError
from mdm.runtime import Request, Result
from mdm.runtime.pipeline import requests_of
from mdm.runtime.request import KIND_OF_SETTING, MOST_STEPS, WORDS, sampler_for
from mdm.runtime.solver import GRID, SOLVERS, sampler_of

HUGE = 10**5000  # Python refuses to print it

OWN = sampler_of({"sampler": {"solver": "dpmpp_2m", "steps": 20, "guidance": 2.0, "t_start": 0.997, "order": 1}})


def refused(error: pytest.ExceptionInfo[InputError]) -> str:
    """What it says, which has at most three lines and no more than a screenful."""
    said = str(error.value)
    assert len(said.splitlines()) <= 3
    assert len(said) < 600
    return said


# ------------------------------------------------------------------------------------------------ Request.of


def test_a_request_from_words() -> None:
    words: dict[str, Any] = {"prompt": "two", "label": 3, "negative": "", "seed": 2**64 - 1, "size": 32, "steps": 7,
                             "guidance": 2, "final_zero": False, "solver": "ddim"}  # fmt: skip
    request = Request.of("text_to_image", **words)
    sampler = {name: words[name] for name in ("steps", "guidance", "final_zero", "solver")}
    assert request == Request("text_to_image", "two", label=3, negative="", seed=2**64 - 1, size=32, sampler=sampler)
    assert Request.of("joint", sample=4) == Request("joint", sample=4)


def test_none_is_as_good_as_absent() -> None:
    assert Request.of("joint", **dict.fromkeys(name for name in WORDS if name != "task")) == Request("joint")


def test_every_word_is_taken() -> None:
    values: dict[type, Any] = {str: "a", int: 3, float: 0.5, bool: True}
    of_words: dict[str, Any] = {"prompt": "a", "picture": b"", "label": 1, "negative": "b", "seed": 1, "sample": 2,
                                "size": 3, "upsample": 2, "noise": np.zeros(3, np.float32)}  # fmt: skip
    settings = {name: values[kind] for name, kind in KIND_OF_SETTING.items()}
    request = Request.of("joint", **of_words, **settings)
    assert request.sampler == settings
    assert {name: getattr(request, name) for name in of_words} == of_words
    assert {"task", *of_words, *settings} == set(WORDS)
    options = {name for solver in SOLVERS.values() for name in solver.options}
    assert {"solver", "steps", "guidance", *GRID, *options} == set(KIND_OF_SETTING)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("promt", "'promt'; did you mean 'prompt'?\n"),
        ("guidence", "'guidence'; did you mean 'guidance'?\n"),
        ("solvertype", "'solvertype'; did you mean 'solver_type'?\n"),
        ("sampler", "'sampler'"),
        ("task_name", "'task_name'"),
        ("", "''\n"),
        ("a\n\n\n\nb", r"'a\n\n\n\nb'"),
        ("x" * 10**5, f"'{'x' * 59}... (100000 characters)"),
    ],
)
def test_an_unknown_word_is_told_with_the_nearest(word: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        Request.of("joint", **{word: 1})
    assert f"a request has no field {said}" in refused(error)
    assert "\nfields: prompt, picture, label, " in str(error.value)
    with pytest.raises(InputError):  # also if it says nothing
        Request.of("joint", **{word: None})


WRONG: dict[str, tuple[Any, ...]] = {
    "prompt": (5, b"a", ["a"], True, 1.5, {}, 10**100, HUGE),
    "negative": (0, b""),
    "label": ("3", 1.0, True, False, [1], math.nan, {}, np.zeros((9, 1))),
    "seed": ("3", 1.0, True, math.inf, b"1", 3 + 0j),
    "sample": ("0", 0.0, False),
    "size": ("32", 32.0, True),
    "upsample": (2.0, True, "2"),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=lambda value: ""
)
def test_a_value_of_the_wrong_kind_is_told(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name} is ") as error:
        Request.of("joint", **{name: value})
    assert refused(error).endswith(("expected a text", "expected a whole number"))


def test_a_task_is_a_text() -> None:
    for task in (5, b"joint", ["joint"], True):
        with pytest.raises(InputError, match="task is"):
            Request.of(task)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- requests_of


def test_a_list_has_a_value_for_each_sample() -> None:
    made = requests_of("joint", 2, seed=[3, 4], label=(1, None), steps=5, sample=[0, 10])
    assert [(one.seed, one.sample, one.label, one.sampler) for one in made] == [
        (3, 0, 1, {"steps": 5}), (3, 1, 1, {"steps": 5}), (4, 10, None, {"steps": 5}), (4, 11, None, {"steps": 5}),
    ]  # fmt: skip
    assert requests_of("joint", 1) == [Request("joint")]
    assert [one.sample for one in requests_of("joint", 3, sample=2**64 - 3)] == [2**64 - 3, 2**64 - 2, 2**64 - 1]


def test_an_array_is_no_list() -> None:
    noise = np.zeros((2, 3), np.float32)
    [made] = requests_of("joint", 1, noise=noise)
    assert made.noise is noise
    first, second = requests_of("joint", 1, noise=[noise[0], noise[1]])
    assert first.noise is not None
    assert first.noise.shape == (3,)
    assert second.noise is not None


@pytest.mark.parametrize(
    ("batch", "fields", "said"),
    [
        (1, {"seed": [1, 2], "label": [1, 2, 3]}, r"batch is 1 and there are 2 of seed, 3 of label\nexpected lists of"),
        (1, {"seed": [], "label": []}, "there are 0 of seed, 0 of label"),
        (1, {"seed": [], "label": [1]}, "there are 0 of seed, 1 of label"),
        (0, {}, "batch is 0\n"),
        (-1, {"seed": [1]}, "batch is -1 and there are 1 of seed"),
        (1.0, {}, "batch is 1.0"),
        ("2", {}, "batch is '2'"),
        (None, {}, "batch is None"),
        ([2], {}, "batch is"),
    ],
)
def test_lists_of_different_lengths_are_told(batch: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        requests_of("joint", batch, **fields)
    refused(error)


@pytest.mark.parametrize("sample", ["3", "", True, False, 0.0, 1.5, {}, b"1"])
def test_which_sample_is_a_whole_number_here_too(sample: Any) -> None:
    """`sample` is counted on for a batch; that must not hide what was given."""
    with pytest.raises(InputError, match=r"^sample is .*expected a whole number"):
        requests_of("joint", 1, sample=sample)


def test_a_batch_is_a_number_and_no_truth() -> None:
    with pytest.raises(InputError, match="batch is True"):
        requests_of("joint", True)


def test_a_list_of_lists_is_a_wrong_value() -> None:
    with pytest.raises(InputError, match="seed is a list of 1, expected a whole number"):
        requests_of("joint", 1, seed=[[1], [2]])


# ------------------------------------------------------------------------------------------------- samplers


def test_nothing_asked_is_the_models_own() -> None:
    assert sampler_for(OWN, {}) == OWN
    assert OWN["order"] == 1
    assert sampler_for(OWN, {"solver": "dpmpp_2m"}) == OWN


@pytest.mark.parametrize("solver", SOLVERS)
def test_another_solver_keeps_the_times_and_drops_the_options(solver: str) -> None:
    own = OWN | {"spacing": "karras", "t_end": 0.02, "final_zero": True, "solver_type": "heun"}
    made = sampler_for(own, {"solver": solver})
    if solver == "dpmpp_2m":
        assert made == own
        return
    kept = {"steps": 20, "guidance": 2.0, "spacing": "karras", "t_start": 0.997, "t_end": 0.02}
    assert made == {"solver": solver, **kept, "final_zero": solver == "euler-maruyama", **SOLVERS[solver].options}


def test_what_is_asked_wins() -> None:
    asked = {
        "solver": "dpmpp_3m",
        "steps": 5,
        "guidance": 0,
        "spacing": "logsnr",
        "t_start": 0.9,
        "t_end": 0.1,
        "final_zero": True,
        "order": 2,
        "predict_x0": False,
        "solver_type": "heun",
        "lower_order_final": False,
    }
    assert sampler_for(OWN, asked) == asked
    assert sampler_for(OWN, {"solver": "euler-maruyama", "final_zero": False})["final_zero"] is False
    maruyama = sampler_of({"sampler": {"solver": "euler-maruyama", "steps": 1000}})
    assert maruyama["final_zero"] is True
    assert sampler_for(maruyama, {"solver": "ddim"})["final_zero"] is False
    assert sampler_for(maruyama, {"steps": 3})["final_zero"] is True


def test_the_models_own_is_left_alone() -> None:
    own = dict(OWN)
    sampler_for(own, {"solver": "heun", "steps": 3})
    assert own == OWN


@pytest.mark.parametrize("steps", [1, MOST_STEPS])
def test_steps_of_both_ends(steps: int) -> None:
    assert sampler_for(OWN, {"steps": steps})["steps"] == steps


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"solver": "dpmp_2m"}, "unknown solver 'dpmp_2m'; did you mean 'dpmpp_2m'?"),
        ({"solver": "ddmi"}, "did you mean 'ddim'?"),
        ({"solver": ""}, "unknown solver ''"),
        ({"solver": 5}, "solver is 5, expected a text"),
        ({"solver": "heun", "order": 2}, "solver 'heun' has no option 'order'"),
        ({"solver": "ddim", "solver_type": "heun"}, "solver 'ddim' has no option 'solver_type'"),
        ({"solver": "dpmpp_2m_sde", "predict_x0": True}, "no option 'predict_x0'"),
        ({"steps": 0}, "steps is 0, expected 1 to 10000"),
        ({"steps": -1}, "steps is -1, expected"),
        ({"steps": 10_001}, "steps is 10001, expected"),
        ({"steps": 2**70}, "steps is 1180591620717411303424, expected"),
        ({"steps": HUGE}, "steps is .*expected 1 to 10000"),
        ({"steps": "20"}, "steps is '20', expected a whole number"),
        ({"steps": 20.0}, "steps is 20.0, expected a whole number"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"guidance": "2"}, "guidance is '2', expected a number"),
        ({"guidance": True}, "guidance is True, expected a number"),
        ({"guidance": math.nan}, "guidance is nan, expected a finite number"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"guidance": -math.inf}, "guidance is -inf"),
        ({"guidance": json.loads("1e400")}, "guidance is inf"),
        ({"guidance": json.loads("NaN")}, "guidance is nan"),
        ({"guidance": 10**400}, "guidance is .*expected a finite number"),
        ({"guidance": HUGE}, "guidance is .*expected a finite number"),
        ({"guidance": 1j}, "guidance is 1j, expected a number"),
        ({"t_start": "1"}, "t_start is '1', expected a number"),
        ({"t_end": False}, "t_end is False, expected a number"),
        ({"final_zero": 1}, "final_zero is 1, expected true or false"),
        ({"final_zero": "yes"}, "final_zero is 'yes', expected true or false"),
        ({"lower_order_final": 0}, "lower_order_final is 0, expected true or false"),
        ({"order": 2.0}, "order is 2.0, expected a whole number"),
        ({"order": True}, "order is True, expected a whole number"),
        ({"spacing": ["karras"]}, "spacing is a list of 1, expected a text"),
        ({"solver_type": None}, "solver_type is None, expected a text"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        sampler_for(OWN, Request("joint", sampler=asked).sampler)
    refused(error)


def test_a_setting_nobody_knows_is_told() -> None:
    """`Request.of` keeps them out; who makes a Request by hand is told too."""
    with pytest.raises(InputError, match="stps"):
        Request("joint", sampler={"stps": 3})


# --------------------------------------------------------------------------------------------------- facts


def result_of(request: Request, **changes: Any) -> Result:
    made = Result(request, {**OWN, "steps": 7}, "two red", None, np.zeros((2, 3), np.float32), 7, 0.123456, 0.01)
    return dataclasses.replace(made, **changes)


def test_facts_are_the_request_the_sampler_and_the_outcome() -> None:
    request = Request.of("ask", prompt="what", label=0, seed=3, sample=1, negative="", steps=7)
    facts = result_of(request).facts()
    asked = {"task": "ask", "prompt": "what", "label": 0, "seed": 3, "sample": 1, "negative": ""}
    assert facts == {**asked, **OWN, "steps": 7, "text": "two red", "evaluations": 7, "seconds": 0.1235}
    assert "text" not in result_of(request, text=None).facts()
    assert result_of(request, text="").facts()["text"] == ""


@pytest.mark.parametrize("picture", [np.zeros((4, 4, 3), np.uint8), b"bytes", Path("a.png"), "a.png"], ids=repr)
def test_a_picture_or_noise_does_not_break_facts(picture: Any) -> None:
    request = Request.of("caption", picture=picture, noise=np.ones((2, 3), np.float32), size=32, upsample=2)
    facts = result_of(request, picture=np.zeros((4, 4, 3), np.uint8)).facts()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert {"size": 32, "upsample": 2}.items() <= facts.items()


def test_facts_make_the_request_again() -> None:
    request = Request.of("turn", prompt="a b", negative="c", label=2, seed=2**63 + 1, sample=5, size=48, upsample=3)
    facts = json.loads(json.dumps(result_of(request).facts()))
    for outcome in ("text", "evaluations", "seconds"):
        del facts[outcome]
    again = Request.of(**facts)
    assert dataclasses.replace(again, sampler={}) == request
    assert sampler_for(sampler_of({"sampler": {"solver": "heun", "steps": 3}}), again.sampler) == OWN | {"steps": 7}
