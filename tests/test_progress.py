"""What a user sees while completions are sampled; Ctrl-C ends a command and costs at most one step."""

import io
import os
import pty
import re
import select
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
from helpers import PROMPTS, QUICK, ROOT, exit_code, one_step, random_model
from rich.console import Console

import lab.evaluate
import lab.screen
import model.sampler
import rl.grpo
from lab.checkpoint import checkpoints
from lab.runfolder import RunFolder
from lab.screen import progress_bar
from lab.stages import train
from model import generate

COLOR = r"\x1b\[[\d;]*m"
FIRST_WORDS = ["model", "problems", "stages", "run", "memory", "before"]
TRAIN = f"smoke --model tiny-256 {QUICK}"


@pytest.mark.parametrize("stops, check_every", [((), 8), ((7, 30), 3), (range(0, 48, 2), 3)])
def test_reports_are_true_on_the_way_and_end_at_the_totals(stops, check_every, monkeypatch):
    """In one batch, after every `check_every` tokens and at its end; in several, they add up."""
    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", check_every)
    decoder = random_model(std=0.2)
    options = dict(num_samples=3, max_new_tokens=23, stop_token_ids=stops, seed=5)
    groups = generate(decoder, PROMPTS, **options)  # without reports
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    expected = []
    for count in [*range(check_every, 23, check_every), 23]:
        done = sum(length <= count for length in lengths)
        expected.append((done, sum(min(length, count) for length in lengths)))
        if done == 15:
            break
    for room in (10**6, 160, 32):
        report = mock.Mock()
        reported = generate(decoder, PROMPTS, **options, max_cache_tokens=room, on_progress=report)
        reports = [call.args for call in report.call_args_list]
        assert reports[-1] == (15, sum(lengths))
        assert reports == sorted(reports)
        if room == 10**6:
            assert reports == expected
            assert reported == groups  # the same as without reports


def screen_of(text: str) -> str:
    """What a terminal shows in the end: lines that rich draws over are gone, and so is what it colors."""
    assert text.rfind("\x1b[?25h") >= text.rfind("\x1b[?25l"), "the cursor stays hidden"
    plain = re.sub(r"\x1b\[(\?25[lh]|[\d;]*m)", "", text.replace("\r\n", "\n"))
    left = re.sub(r"[^\n]*(\n\r\x1b\[1A|\r)\x1b\[2K", "", plain)
    assert "\x1b" not in left
    return left


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    """In the place of standard error: a terminal of 100 columns."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100)
    monkeypatch.setattr(lab.screen, "Console", lambda **_: console)
    return written


def test_a_terminal_shows_progress_and_keeps_none_after_an_error(terminal, monkeypatch):
    """It shows completions done, and tokens per second."""
    clock = mock.Mock(side_effect=[100.0, 100.5, 104.0])
    monkeypatch.setattr(lab.screen, "time", SimpleNamespace(perf_counter=clock))
    with pytest.raises(KeyboardInterrupt), progress_bar("rollout", 77) as show:
        show(3, 900)
        show(31, 4938)
        raise KeyboardInterrupt
    shown = re.sub(COLOR, "", terminal.getvalue())
    assert "rollout" in shown
    assert "31/77 completions  1,234 tokens/s" in shown
    assert screen_of(terminal.getvalue()) == ""


def started_on_terminal(command: str) -> tuple[int, int]:
    """`python command` on a terminal of its own: its process, and our end of the terminal."""
    child, ours = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # it may be ignored here, and would be inherited
        os.chdir(ROOT)
        os.environ["COLUMNS"] = "120"
        os.execv(sys.executable, [sys.executable, *command.split()])
    return child, ours


def read_until(ours: int, pattern: str) -> str:
    """What is shown on a terminal until the pattern is, or until the process ends."""
    text = ""
    while not re.search(pattern, text):
        ready, _, _ = select.select([ours], [], [], 120)
        assert ready, f"two minutes of silence after {text}"
        try:
            text += os.read(ours, 65536).decode(errors="replace")
        except OSError:  # Linux's way of saying that nobody has the terminal open any more
            break
    return text


def test_ctrl_c_ends_a_run_in_one_line_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    command = f"train.py {TRAIN} --plain --stages.0.steps 500 --evaluation.every 100 --out {out}"
    child, terminal = started_on_terminal(command)
    text = read_until(terminal, r"grpo 1/3 +3/500.*?\nat this speed, \d+ min of GRPO left")
    os.write(terminal, b"\x03")
    text += read_until(terminal, "never")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    for words in ("rollout", "4/4 completions", "evaluation", "2/2 completions"):
        assert words in re.sub(COLOR, "", text)
    # Nothing of these stays: first the run's own lines, a line for each step, then what Ctrl-C says.
    *lines, stopped = screen_of(text).strip().split("\n")
    assert [line.split()[0] for line in lines[:6]] == FIRST_WORDS
    last = int(checkpoints(out)[-1].name[5:])
    steps = [line.split()[2] for line in lines if line.startswith("grpo")]
    assert steps == [f"{n}/500" for n in range(1, last + 1)]
    assert stopped == f"stopped. Saved after step {last}; go on with the same command and --resume."
    old = RunFolder(out).metrics()
    assert [row["step"] for row in old] == list(range(last + 1))  # nothing is lost

    def stopping_line(*arguments) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "step"

    monkeypatch.setattr(lab.screen, "step_line", stopping_line)
    assert exit_code(monkeypatch, f"{command} --resume") == 143  # SIGTERM's
    printed = capsys.readouterr()
    assert f"resumed after step {last}" in printed.out
    assert f"\nstopped. Saved after step {last + 1};" in printed.err
    *rows, new = RunFolder(out).metrics()
    assert rows == old
    assert new["step"] == last + 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_signal_ends_the_process_at_once(tmp_path, monkeypatch, capfd):
    def signalled(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(rl.grpo, "collect_rollouts", signalled)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as exit_:
        train(one_step("--out", tmp_path / "run"), quiet=True)
    assert exit_.value.code == 143
    assert capfd.readouterr().err.endswith("a second signal stops at once\n\nstopped at once.\n")


@pytest.mark.parametrize("command", [f"train.py {TRAIN} --out", "eval.py tiny --count 2 --json"])
def test_ctrl_c_advises_no_resume_where_nothing_can_be_resumed(command, tmp_path, monkeypatch, capsys):
    # In the evaluation before any step.
    monkeypatch.setattr(lab.evaluate, "collect_rollouts", mock.Mock(side_effect=KeyboardInterrupt))
    assert exit_code(monkeypatch, f"{command} {tmp_path}/new") == 130
    assert capsys.readouterr().err == "\nstopped.\n"


def test_a_quiet_run_shows_nothing_on_a_terminal(tmp_path, terminal, capfd):
    train(one_step("--out", tmp_path / "run"), quiet=True)
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")
