"""What a user sees while completions are sampled; Ctrl-C ends a command and costs at most one step."""

import io
import itertools
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import closing
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
        assert generate(decoder, PROMPTS, **options, max_cache_tokens=room, on_progress=report) == groups
        reports = [call.args for call in report.call_args_list]
        assert reports[-1] == (15, sum(lengths))
        assert reports == sorted(reports)
        assert room < 10**6 or reports == expected


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
    shown = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert "rollout" in shown
    assert "31/77 completions  1,234 tokens/s" in shown
    assert screen_of(terminal.getvalue()) == ""


class OnTerminal:
    """`python command` on a terminal of its own, for standard output and errors alike."""

    def __init__(self, command: str):
        self.master, slave = pty.openpty()
        # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and it would be inherited.
        self.process = subprocess.Popen(
            [sys.executable, *command.split()],
            cwd=ROOT, env=os.environ | {"COLUMNS": "120"}, stdin=slave, stdout=slave, stderr=slave,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str | None) -> None:
        """Read on until `pattern` has been printed; None: until the process ends."""
        deadline = time.monotonic() + 120
        while pattern is None or not re.search(pattern, self.text):
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.master], [], [], left)
            assert ready, f"no {pattern or 'end'} in two minutes:\n{self.text}"
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # Linux's way of saying that nobody has the terminal open any more
                assert pattern is None, f"ended without {pattern}:\n{self.text}"
                return

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_ctrl_c_ends_a_run_in_one_line_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    command = f"train.py {TRAIN} --plain --stages.0.steps 500 --evaluation.every 100 --out {out}"
    with closing(OnTerminal(command)) as running:
        running.read_until(r"grpo 1/3 +3/500.*?\nat this speed, \d+:\d\d of GRPO left.*?\n")
        running.process.send_signal(signal.SIGINT)
        running.read_until(None)
        assert running.process.wait(timeout=10) == 130
    for words in ("rollout", "4/4 completions", "evaluation", "2/2 completions"):
        assert words in re.sub(r"\x1b\[[\d;]*m", "", running.text)
    # Nothing of these stays: first the run's own lines, a line for each step, then what Ctrl-C says.
    *lines, stopped = screen_of(running.text).strip().split("\n")
    assert [line.split()[0] for line in lines[:5]] == ["model", "problems", "stages", "run", "memory"]
    last = int(checkpoints(out)[-1].name[5:])
    assert last >= 3
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
    rows = RunFolder(out).metrics()
    assert rows[: last + 1] == old
    assert rows[-1]["step"] == last + 1
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
    assert capfd.readouterr().err.endswith("once more stops it at once\n\nstopped at once.\n")


@pytest.mark.parametrize("command", [f"train.py {TRAIN} --out", "eval.py tiny --count 2 --json"])
def test_ctrl_c_advises_no_resume_where_nothing_can_be_resumed(command, tmp_path, monkeypatch, capsys):
    # In the evaluation before any step.
    monkeypatch.setattr(lab.evaluate, "collect_rollouts", mock.Mock(side_effect=KeyboardInterrupt))
    assert exit_code(monkeypatch, f"{command} {tmp_path}/new") == 130
    assert capsys.readouterr().err == "\nstopped.\n"


def test_a_quiet_run_shows_nothing_on_a_terminal(tmp_path, terminal, monkeypatch, capfd):
    # After an evaluation and a step's rollouts.
    monkeypatch.setattr(rl.grpo, "sum_gradients", mock.Mock(side_effect=KeyboardInterrupt))
    rewards = mock.Mock(side_effect=itertools.count())  # no two are equal
    monkeypatch.setattr("rl.rollout.reward_for", rewards)
    with pytest.raises(KeyboardInterrupt):
        train(one_step("--out", tmp_path / "run"), quiet=True)
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")
