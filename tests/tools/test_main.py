"""The command `mdm`: verbs are imported late; every failure ends in its exit code and at most three lines."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from mdm.plugins.errors import EnvironmentLackError, InputError, MdmError, ParityError
from mdm.tools.main import EXTRA_OF_MODULE, VERBS, main

FAKE = {
    "fake": ("fake_verb:command", "Does what the test says."),
    "broken": ("fake_verb_that_is_not_there:command", "Its module cannot be imported."),
}

RAISED: list[BaseException] = []


@click.command()
@click.argument("words", nargs=-1)
@click.option("--size", type=int)
@click.option("--kind", type=click.Choice(["dog", "cat"]))
@click.option("--json", "as_json", is_flag=True)
def fake(words: tuple[str, ...], size: int | None, kind: str | None, as_json: bool) -> int:
    """A verb that raises what the test put into RAISED."""
    if RAISED:
        raise RAISED.pop()
    click.echo(f"did {words} {size} {kind} {as_json}")
    return 7  # ignored: a verb fails by raising


@pytest.fixture(autouse=True)
def fake_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = types.ModuleType("fake_verb")
    module.__dict__["command"] = fake
    monkeypatch.setitem(sys.modules, "fake_verb", module)
    monkeypatch.delenv("MDM_DEBUG", raising=False)
    yield
    RAISED.clear()


def failed(error: BaseException, *words: str) -> int:
    RAISED.append(error)
    return main(["fake", *words], FAKE)


def test_a_verb_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fake", "a", "--size", "3"], FAKE) == 0
    assert capsys.readouterr() == ("did ('a',) 3 None False\n", "")


def test_help_names_every_verb_and_imports_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], FAKE) == 0
    out = capsys.readouterr().out
    assert "Its module cannot be imported." in out
    assert "Does what the test says." in out


def test_help_of_the_installed_command_loads_nothing_heavy() -> None:
    code = "import sys\nfrom mdm.tools.main import main\nassert main(['--help']) == 0\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.splitlines()[-1].split())
    assert all(name in run.stdout for name in VERBS)
    assert loaded & {"torch", "onnx", "numpy", "mdm.reference", "mdm.runtime", "mdm.tools.train"} == set()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"], FAKE) == 0
    assert capsys.readouterr().out.startswith("mdm, version ")


def test_no_verb_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([], FAKE) == 2
    assert "Does what the test says." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ParityError("images differ by 0.3"), 1, "images differ by 0.3"),
        (InputError("width: found 3, expected 4"), 2, "width: found 3, expected 4"),
        (EnvironmentLackError("no GPU"), 3, "no GPU"),
        (MdmError("odd"), 4, "odd"),
        (FileNotFoundError(2, "No such file or directory", "x.pth"), 2, "x.pth: No such file or directory"),
        (FileNotFoundError("No such file or directory: x.safetensors"), 2, "x.safetensors"),
        (PermissionError(13, "Permission denied", "/out"), 2, "/out: Permission denied"),
        (IsADirectoryError(21, "Is a directory", "out"), 2, "out: Is a directory"),
        (click.BadParameter("size must be even"), 2, "size must be even"),
        (click.ClickException("whatever"), 2, "whatever"),
        (KeyboardInterrupt(), 130, "stopped"),
        (click.Abort(), 130, "stopped"),
        (ModuleNotFoundError("No module", name="torch"), 3, "mdm-deploy[export]"),
        (ModuleNotFoundError("No module", name="onnx.helper"), 3, "mdm-deploy[export]"),
        (ModuleNotFoundError("No module", name="onnxruntime"), 3, "mdm-deploy[cpu]"),
        (ModuleNotFoundError("No module named 'mdm.nix'", name="mdm.nix"), 4, "MDM_DEBUG=1"),
        (ValueError("a\nvery\nlong\nstory"), 4, "ValueError: a very long story"),
        (AssertionError(), 4, "MDM_DEBUG=1"),
    ],
)
def test_every_failure_has_its_code_and_three_lines(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failed(error) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert 1 <= len(err.splitlines()) <= 3
    assert "Traceback" not in err

    assert failed(error, "--json") == code
    shown = json.loads(capsys.readouterr().out)["error"]
    assert shown["exit_code"] == code
    assert shown["type"] == type(error).__name__
    assert said in shown["message"]


def test_an_error_of_four_lines_is_cut_to_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert failed(InputError("1\n2\n3\n4")) == 2
    assert capsys.readouterr().err == "Error: 1\n2\n3\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fak"], "fake"),
        (["nix"], "nix"),
        (["--nix"], "--nix"),
        (["fake", "--siz", "3"], "--size"),
        (["fake", "--size", "three"], "'three' is not a valid integer"),
        (["fake", "--kind", "bird"], "'dog', 'cat'"),
    ],
)
def test_wrong_use_is_2(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words, FAKE) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Usage: mdm" in err
    assert len(err.splitlines()) == 3

    assert main([*words, "--json"], FAKE) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_a_traceback_is_shown_when_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MDM_DEBUG", "1")
    assert failed(RuntimeError("deep inside")) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("module", EXTRA_OF_MODULE)
def test_every_extra_named_exists(module: str) -> None:
    tomllib = import_module("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = project["optional-dependencies"][EXTRA_OF_MODULE[module]]
    assert any(line.startswith(module) for line in wanted)


def test_a_closed_pipe_is_no_error_message(tmp_path: Path) -> None:
    (tmp_path / "big.py").write_text(
        "import sys, click\nfrom mdm.tools.main import main\n"
        "@click.command()\ndef command():\n    [print('x' * 1000) for _ in range(5000)]\n"
        "if __name__ == '__main__':\n    sys.exit(main(['big'], {'big': ('big:command', '')}))\n"
    )
    script = f"'{sys.executable}' big.py | head -n 1 >first; echo code ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout == "code 141\n"
    assert (tmp_path / "first").read_text().startswith("xxx")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_can_be_loaded_and_has_json(name: str) -> None:
    pytest.importorskip("torch", reason="torch (extra export) is not installed")
    module, _, attribute = VERBS[name][0].partition(":")
    command = getattr(import_module(module), attribute)
    assert isinstance(command, click.Command)
    for one in command.commands.values() if isinstance(command, click.Group) else [command]:
        if one.name != "polygraphy":  # another program: what it prints is its own
            assert "--json" in {option for param in one.params for option in param.opts}
