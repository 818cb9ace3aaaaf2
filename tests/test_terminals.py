"""Whatever terminal there is, lines stay plain, no character is an error, and a lost one ends no work."""

import json
import os
import pty
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers import QUICK, ROOT, fails, one_step, run_command, smoke

import eval as eval_command
import play as play_command
from lab.errors import user_errors
from lab.output import LastingFile, check_writable
from lab.screen import Screen, can_draw, pick_screen, plain_console
from lab.stages import train

TERMINAL = SimpleNamespace(isatty=lambda: True)


def in_child(work, output: int | None, encoding: str = "utf-8", input: int | None = None) -> int:
    """The exit code of a command that does `work` in its own process, with these standard streams or None."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        sys.stdout = None if output is None else open(output, "w", encoding=encoding, closefd=False)
        sys.stdin = None if input is None else open(input, encoding=encoding)
        with user_errors():
            work()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    finally:
        os._exit(code)


def printed_by(work, **options) -> bytes:
    reader, writer = os.pipe()
    assert in_child(work, writer, **options) == 0
    os.close(writer)
    with open(reader, "rb") as file:
        return file.read()


def gone_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def gone_terminal() -> int:
    ours, theirs = pty.openpty()
    os.close(ours)
    return theirs


LOST = {"pipe": gone_pipe, "terminal": gone_terminal, "disk": lambda: os.open("/dev/full", os.O_WRONLY)}


@pytest.mark.parametrize(
    "name, value",
    [("TERM", "dumb"), ("TERM", "unknown"), ("TERM", ""), ("TERM", None), ("CI", "true"), ("COLUMNS", "39")],
)
def test_nothing_is_drawn_where_the_cursor_cannot_move(name, value, monkeypatch):
    """Nothing is drawn in a log either."""
    assert can_draw(TERMINAL)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    assert not can_draw(TERMINAL)


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_file_is_no_terminal_whatever_the_environment_says(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("COLUMNS", "40")
    assert type(pick_screen(smoke())) is Screen
    assert not plain_console(stderr=True).is_interactive
    plain_console().print("[bold]x", "y" * 70, style="bold")
    assert capsys.readouterr().out == f"[bold]x {'y' * 70}\n"


def test_a_run_logs_plain_lines_in_a_bare_environment(tmp_path):
    """There is no home, no terminal and no character set, and a notebook's backend is not installed."""
    code = "import pwd, runpy, sys; pwd.getpwuid = lambda _: {}[0]; sys.argv[:1] = []; "
    code += "runpy.run_path('train.py', run_name='__main__')"
    environment = {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"FORCE_COLOR": "1", "COLUMNS": "40", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    environment |= {"PYTHONUTF8": "0", "MPLBACKEND": "module://not_installed_here.backend_inline"}
    options = f"train.py smoke --model tiny-256 {QUICK} --out {tmp_path}/run"
    finished = run_command("-c", code, *options.split(), env=environment)
    assert finished.returncode == 0, finished.stderr
    assert "\x1b" not in finished.stdout
    first_words = [line.split()[0] for line in finished.stdout.splitlines()]
    assert first_words[:6] == ["model", "problems", "stages", "run", "memory", "before"]
    assert first_words.count("grpo") == 3
    assert first_words[-1] == "done:"
    assert (tmp_path / "run" / "curve.png").exists()


def test_every_console_comes_from_one_place():
    files = [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), *ROOT.glob("experiments/*/*.py")]
    assert [path.name for path in files if re.search(r"\bConsole\(", path.read_text())] == ["screen.py"]


def test_a_path_that_is_no_text_is_one_line(capsys):
    assert "not UTF-8" in fails(capsys, lambda: smoke("--out", "r\udcfcn"))


def test_characters_that_cannot_be_shown_become_question_marks():
    for encoding, shown in {"ascii": "? ? 1\n", "latin-1": "é ? 1\n", "utf-8": "é 漢 1\n"}.items():
        assert printed_by(partial(print, "é 漢 1"), encoding=encoding) == shown.encode(encoding)


@pytest.mark.parametrize("kind", LOST)
def test_a_run_goes_on_when_its_output_or_terminal_is_lost(kind, tmp_path):
    recipe = replace(one_step("--out", tmp_path / "run"), stages=())

    def work():
        os.kill(os.getpid(), signal.SIGHUP)
        train(recipe)

    assert in_child(work, LOST[kind]()) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_a_full_pipe_that_does_not_block_is_waited_for(monkeypatch):
    """Another program has made it non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))

    def emptied(*arguments):
        os.read(reader, 2**20)

    wait = mock.Mock(side_effect=emptied)
    monkeypatch.setattr("select.select", wait)
    assert LastingFile(writer, "w").write(b"said") == 4
    assert os.read(reader, 9) == b"said"
    wait.assert_called_once()


def evaluation(**options):
    arguments = eval_command.Arguments(("tiny",), count=2, samples=1, max_new_tokens=2, **options)
    return lambda: eval_command.main(arguments)


@pytest.mark.parametrize("kind, code", [("pipe", 0), ("terminal", 2), ("disk", 2)])
def test_an_evaluation_without_output_writes_its_file_or_fails(kind, code, tmp_path):
    assert in_child(evaluation(), LOST[kind]()) == code  # whoever closes a pipe has seen enough
    assert in_child(evaluation(json=str(tmp_path / "found.json")), LOST[kind]()) == 0
    assert json.loads((tmp_path / "found.json").read_text())["problems"]["count"] == 2


def test_where_results_go_is_checked_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(eval_command, "candidate_of", None)
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path, tmp_path / "file" / "found.json", "/proc/nowhere/found.json"):
        assert str(place) in fails(capsys, evaluation(json=str(place)))
    assert (tmp_path / "file").read_text() == "kept"
    assert in_child(evaluation(), None) == 2
    check_writable(tmp_path / "new" / "found.json")
    assert not any((tmp_path / "new").iterdir())


@pytest.mark.parametrize("typed", [b"7 9 \xff 22\nq\n", None], ids=["no UTF-8", "closed"])
def test_a_session_outlives_input_that_it_cannot_read(typed, monkeypatch):
    def show(*arguments):
        print("shown")

    monkeypatch.setattr(play_command, "show", show)
    monkeypatch.setattr(
        play_command, "load_player", lambda *_: SimpleNamespace(source="tiny", recipe=smoke())
    )
    reader, writer = os.pipe()
    os.write(writer, typed or b"")
    os.close(writer)
    out = printed_by(lambda: play_command.main(play_command.Arguments()), input=reader if typed else None)
    assert out.count(b"shown") == 1
    assert out.count(b"q to end") == (2 if typed else 1)
    assert (b"type whole numbers" in out) == bool(typed)
