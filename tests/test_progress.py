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
from helpers import PROMPTS, ROOT, exit_code, parsed, random_model
from rich.console import Console

import lab.evaluate
import lab.run
import lab.screen
import model.sampler
import rl.grpo
from lab.checkpoint import checkpoints
from lab.errors import Stopped
from lab.runfolder import RunFolder
from lab.screen import progress_bar
from lab.stages import train
from model import generate
from model.sampler import plan_batches

ESCAPE = r"\x1b\[([?\d;]*[a-zA-Z])"
RICH = {
    "FORCE_COLOR",
    "NO_COLOR",
    "TTY_COMPATIBLE",
    "TTY_INTERACTIVE",
}  # variables that tell it of a terminal


def expected_reports(groups, room, check_every) -> list[tuple[int, int]]:
    """What each batch reports after every `check_every` tokens and at its end, from the completions."""
    reports, done, tokens = [], 0, 0
    for prompts, samples in plan_batches(list(map(len, PROMPTS)), 3, 23, room):
        batch = [completion for group in groups[prompts] for completion in group[samples]]
        lengths = [len(completion.token_ids) for completion in batch]
        for count in [*range(check_every, 23, check_every), 23]:
            ended = [c for c in batch if len(c.token_ids) <= count and (c.finished or count == 23)]
            reports.append((done + len(ended), tokens + sum(min(length, count) for length in lengths)))
            if len(ended) == len(batch):
                break
        done, tokens = reports[-1]
    return reports


@pytest.mark.parametrize("check_every", [3, 8])
@pytest.mark.parametrize("stops", [(), (7, 30), range(0, 48, 2)], ids=["none stops", "some stop", "all stop"])
def test_reports_are_true_on_the_way_and_end_at_the_totals(stops, check_every, monkeypatch):
    monkeypatch.setitem(model.sampler.CHECK_EVERY, "cpu", check_every)
    decoder = random_model(std=0.2)
    for room in (32, 160, 10**6):
        options = dict(num_samples=3, max_new_tokens=23, stop_token_ids=stops, seed=5, max_cache_tokens=room)
        report = mock.Mock()
        groups = generate(decoder, PROMPTS, **options, on_progress=report)
        reports = [call.args for call in report.call_args_list]
        assert reports[-1] == (15, sum(len(completion.token_ids) for group in groups for completion in group))
        assert reports == expected_reports(groups, room, check_every)
        assert generate(decoder, PROMPTS, **options) == groups  # the same without reports


def screen_of(text: str) -> list[str]:
    """The lines that a terminal shows in the end, stripped; it knows the escapes that rich sends."""
    rows, row, column = [""], 0, 0
    for moved, sent in re.findall(ESCAPE + r"|([\r\n]|[^\x1b\r\n]+)", text):
        if sent == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        elif sent == "\r":
            column = 0
        elif sent:
            rows[row] = rows[row][:column].ljust(column) + sent + rows[row][column + len(sent) :]
            column += len(sent)
        elif moved == "2K":
            rows[row] = ""
        elif moved.endswith("A"):
            row -= int(moved[:-1])
        else:
            assert moved in ("?25l", "?25h") or moved.endswith("m"), f"unknown escape {moved}"
    assert "\x1b[?25l" not in text or text.rindex("\x1b[?25l") < text.rindex("\x1b[?25h"), (
        "the cursor stays hidden"
    )
    return "\n".join(line.rstrip() for line in rows).rstrip("\n").split("\n")


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
    shown = re.sub(ESCAPE, "", terminal.getvalue())
    assert "rollout" in shown
    assert "31/77 completions  1,234 tokens/s" in shown
    assert screen_of(terminal.getvalue() + "next") == ["next"]


class OnTerminal:
    """`python command` on a terminal of its own, for standard output and errors alike."""

    def __init__(self, command: str):
        self.master, slave = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if name not in RICH}
        environment |= {"TERM": "xterm", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *command.split()],
            cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave,
            # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and it would be
            # inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(slave)
        self.text = ""

    def read_until(self, pattern: str | None) -> None:
        """Read on until `pattern` has been printed; None: until the process ends."""
        deadline = time.monotonic() + 120
        while pattern is None or not re.search(pattern, self.text):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self.master], [], [], left)[0], (
                f"no {pattern or 'end'} in two minutes:\n{self.text}"
            )
            try:
                self.text += os.read(self.master, 65536).decode(errors="replace")
            except OSError:  # Linux's way of saying that nobody has the terminal open any more
                assert pattern is None, f"ended without {pattern}:\n{self.text}"
                return

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


TRAIN = """smoke --model tiny-256 --stages.0.steps 500 --stages.0.prompts-per-step 3
--stages.0.samples-per-prompt 4 --sampling.max-new-tokens 24 --evaluation.problems 5 --evaluation.every 100"""


def test_ctrl_c_ends_a_run_in_one_line_and_resume_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    with closing(OnTerminal(f"train.py {TRAIN} --out {out}")) as command:
        command.read_until(r"grpo 1/3 +3/500.*?\nat this speed, \d+:\d\d of GRPO left.*?\n")
        command.process.send_signal(signal.SIGINT)
        command.read_until(None)
        assert command.process.wait(timeout=10) == 130
    assert "Traceback" not in command.text and "Exception" not in command.text, command.text
    shown = re.sub(ESCAPE, "", command.text)
    assert all(words in shown for words in ("rollout", "12/12 completions", "evaluation", "5/5 completions"))
    # Nothing of these stays: first the run's own lines, a line for each step, then what Ctrl-C says.
    *lines, stopped = [line for line in screen_of(command.text) if line]
    lines.remove("stopping where the run can go on; once more stops it at once")
    assert [line.split()[0] for line in lines[:6]] == [
        "model",
        "problems",
        "stages",
        "run",
        "memory",
        "before",
    ]
    steps = [line.split()[:3] for line in lines[6:] if line.startswith("grpo")]
    assert steps == [["grpo", "1/3", f"{n}/500"] for n in range(1, len(steps) + 1)]
    last, old = int(checkpoints(out)[-1].name[5:]), RunFolder(out).metrics()
    assert stopped == f"stopped. Saved after step {last}; go on with the same command and --resume."
    assert [row["step"] for row in old] == list(range(last + 1))  # nothing is lost
    assert last >= 3

    def stopping_line(*arguments) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "step"

    monkeypatch.setattr(lab.run, "step_line", stopping_line)
    assert exit_code(monkeypatch, f"train.py {TRAIN} --out {out} --resume") == 143  # SIGTERM's
    printed = capsys.readouterr()
    assert f"resumed after step {last}" in printed.out
    assert printed.err.endswith(
        f"\nstopped. Saved after step {last + 1}; go on with the same command and --resume.\n"
    )
    rows = RunFolder(out).metrics()
    assert [row["step"] for row in rows] == list(range(last + 2))
    assert rows[: last + 1] == old
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stopped_run_goes_on_as_if_uninterrupted(tmp_path, monkeypatch):
    """A stop drops rollouts but finishes an update."""
    options = f"{TRAIN} --stages.0.steps 3 --stages.0.updates-per-step 1 --out"
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(parsed(options, whole).recipe, quiet=True)

    def stops_at(name, call, saved, resume):
        """Train with a signal at this call of `rl.grpo.<name>`."""
        real, calls = getattr(rl.grpo, name), itertools.count(1)

        def signalled(*arguments, **options):
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return real(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"Saved after step {saved};"):
            patch.setattr(rl.grpo, name, signalled)
            train(parsed(options, stopped).recipe, resume=resume, quiet=True)
        assert [row["step"] for row in RunFolder(stopped).metrics()] == list(range(saved + 1))

    stops_at("collect_rollouts", call=2, saved=1, resume=False)
    stops_at("sum_gradients", call=1, saved=2, resume=True)
    train(parsed(options, stopped).recipe, resume=True, quiet=True)
    weights = [(checkpoints(run)[-1] / "model.safetensors").read_bytes() for run in (whole, stopped)]
    assert weights[0] == weights[1]


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    slow = "--stages.0.prompts-per-step 64 --stages.0.samples-per-prompt 64 --sampling.max-new-tokens 250"
    with closing(OnTerminal(f"train.py {TRAIN} {slow} --out {tmp_path}/run")) as command:
        command.read_until("/4096 completions")
        command.process.send_signal(signal.SIGTERM)
        command.read_until("once more stops it at once")
        command.process.send_signal(signal.SIGTERM)
        command.read_until(None)
        assert command.process.wait(timeout=10) == 143
    assert "stopped at once." in screen_of(command.text)


@pytest.mark.parametrize(
    "command", [f"train.py {TRAIN} --out {{}}", "eval.py tiny --count 2"], ids=["train.py", "eval.py"]
)
def test_ctrl_c_advises_no_resume_where_nothing_can_be_resumed(command, tmp_path, monkeypatch, capsys):
    # In the evaluation before any step.
    monkeypatch.setattr(lab.evaluate, "collect_rollouts", mock.Mock(side_effect=KeyboardInterrupt))
    assert exit_code(monkeypatch, command.format(tmp_path / "run")) == 130
    assert capsys.readouterr().err == "\nstopped.\n"


def test_a_quiet_run_shows_nothing_on_a_terminal(tmp_path, terminal, monkeypatch, capfd):
    # After an evaluation and a step's rollouts.
    monkeypatch.setattr(rl.grpo, "sum_gradients", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(parsed(TRAIN, "--out", tmp_path / "run").recipe, quiet=True)
    assert terminal.getvalue() == ""
    assert capfd.readouterr() == ("", "")
