"""What a run has written is never lost when it goes on, and a signal is heeded whatever the run is doing."""

import itertools
import shutil
import signal
from pathlib import Path

import pytest
from helpers import smoke, timeless

import lab.run
import lab.setup
import lab.stages
import rl.grpo
import rl.trainer
from lab.checkpoint import checkpoints
from lab.errors import Stopped
from lab.recipe import RecipeError
from lab.runfolder import RunFolder
from lab.stages import train

SMALL = """
--evaluation.every 1 --evaluation.problems 2 --evaluation.final-problems 2
--stages.0.prompts-per-step 2 --stages.1.batch-size 2 --stages.2.prompts-per-step 2
"""


def small_run(out: Path, resume: bool = False, options: str = "") -> None:
    """GRPO, SFT, GRPO, with checkpoints and evaluations after every step."""
    train(smoke("--out", out, SMALL, options), resume=resume, quiet=True)


def stopped_run(out: Path, monkeypatch, module, name: str, call: int, resume: bool = False) -> None:
    """A run that gets SIGTERM in this call of the function `name` of `module`."""
    real, calls = getattr(module, name), itertools.count(1)

    def signalled(*arguments, **options):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="Saved after step"):
        patch.setattr(module, name, signalled)
        small_run(out, resume)


def contents(run: Path) -> dict[Path, bytes]:
    """What a run has written, but for views of it."""
    views = ("events.", "curve.", "lock", "report.")
    paths = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(views)]
    return {path.relative_to(run): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    small_run(out)
    return out


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than so small a run."""
    monkeypatch.setattr(lab.run, "write_curve", lambda *arguments: None)


def assert_same_end(run: Path, whole: Path) -> None:
    assert timeless(run) == timeless(whole)
    weights = [(checkpoints(folder)[-1] / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert weights[0] == weights[1]


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    """The whole run in another folder, stopped a step before its end."""
    out = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(checkpoints(out)[-1])
    config = (out / "config.json").read_text().replace(str(whole), str(out))
    (out / "config.json").write_text(config)
    return out


def test_an_sft_stage_keeps_its_traces_without_rollouts(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_run(out, monkeypatch, lab.stages, "sft_step", 2)
    traces = (out / "traces.jsonl").read_bytes()
    shutil.rmtree(out / "rollouts")
    small_run(out, resume=True)
    assert traces
    assert (out / "traces.jsonl").read_bytes() == traces
    assert_same_end(out, whole)


def test_an_sft_stage_not_yet_begun_asks_for_missing_rollouts(tmp_path, monkeypatch):
    out = tmp_path / "run"
    stopped_run(out, monkeypatch, lab.run, "save_checkpoint", 2)  # at the end of the GRPO stage
    (out / "rollouts" / "step_0002.jsonl").unlink()
    before = contents(out)
    with pytest.raises(RecipeError, match=r"rollouts/step_0002.jsonl is missing"):
        small_run(out, resume=True)
    assert contents(out) == before


def break_metrics(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "\0\0\0\n", *lines[2:]]))


def empty_metrics(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")


def delete_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")


DAMAGES = {
    "metrics.jsonl has nothing on step 0": empty_metrics,
    "metrics.jsonl, line 2": break_metrics,
    "no whole checkpoint of this run is left": delete_checkpoints,
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_run_that_has_lost_a_part_is_not_resumed_over_the_rest(message, copied):
    DAMAGES[message](copied)
    before = contents(copied)
    with pytest.raises(RecipeError, match=message):
        small_run(copied, resume=True)
    assert contents(copied) == before


def test_old_checkpoints_and_files_of_other_tools_do_not_matter(copied, whole):
    for path in checkpoints(copied)[1].iterdir():
        path.write_bytes(b"")
    for name in ("rollouts/step_0001 (copy).jsonl", "rollouts/step_.jsonl", "checkpoints/step_0002 (1)"):
        (copied / name).write_text("of a sync tool")
    small_run(copied, True, "--keep-checkpoints 1")
    assert_same_end(copied, whole)
    assert (copied / "report.html").stat().st_size > 0


def test_the_kl_penalty_refuses_a_reference_not_of_its_stage(tmp_path, monkeypatch):
    options = "--stages.2.kl-coef 0.1"
    small_run(tmp_path / "run", False, options)
    *_, start, _, last = checkpoints(tmp_path / "run")
    shutil.rmtree(last)
    shutil.rmtree(start)
    with pytest.raises(RecipeError, match=f"{start.name}: the KL penalty needs it"):
        small_run(tmp_path / "run", True, options)


def test_a_failed_start_in_a_linked_folder_says_why(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="its own"), RunFolder(tmp_path / "run").locked():
        raise RecipeError("its own")
    assert (tmp_path / "run").is_symlink()


# Evaluations: one before any step, one after each of 2 + sft + 2 steps, and two more at the end.
@pytest.mark.parametrize("call", [2, -1])
def test_a_signal_cuts_off_an_evaluation_which_is_made_later(call, whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    count = sum("eval_accuracy" in row for row in RunFolder(whole).metrics()) + 2
    stopped_run(out, monkeypatch, lab.run, "evaluate", call if call > 0 else count + 1 + call)
    last = RunFolder(out).metrics()[-1]
    assert "eval_accuracy" not in last
    assert checkpoints(out)[-1].name == f"step_{last['step']:04d}"
    # Stopped once more, in the evaluation that it makes up for.
    stopped_run(out, monkeypatch, lab.run, "evaluate", 1, resume=True)
    assert RunFolder(out).metrics()[-1] == last
    small_run(out, resume=True)
    assert_same_end(out, whole)


@pytest.mark.parametrize(
    "module, name, call, saved", [(rl.grpo, "group_advantages", 1, 0), (rl.trainer, "make_batch", 1, 1)]
)
def test_a_signal_drops_an_update_that_has_moved_no_weight(
    module, name, call, saved, whole, tmp_path, monkeypatch
):
    """Before an update of step 1; and within the last micro-batch of one, which is finished."""
    out = tmp_path / "run"
    stopped_run(out, monkeypatch, module, name, call)
    assert [row["step"] for row in RunFolder(out).metrics()] == list(range(saved + 1))
    small_run(out, resume=True)
    assert_same_end(out, whole)
