"""What a run has written is never lost when it goes on, and a signal is heeded whatever the run is doing."""

import itertools
import json
import shutil
import signal
from pathlib import Path

import pytest
from helpers import SMALL, smoke, terse, timeless

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


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Runs are terse, and no curve is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        terse(patch)
        patch.setattr(lab.run, "write_curve", lambda *arguments: None)
        yield


def small_run(out: Path, resume: bool = False, options: str = "") -> None:
    """GRPO, SFT, GRPO, with checkpoints and evaluations after every step."""
    train(smoke("--evaluation.every 1 --out", out, SMALL, options), resume=resume, quiet=True)


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


def assert_same_end(run: Path, whole: Path) -> None:
    assert timeless(run) == timeless(whole)
    ours, theirs = (checkpoints(folder)[-1] / "model.safetensors" for folder in (run, whole))
    assert ours.read_bytes() == theirs.read_bytes()


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
    shutil.rmtree(out / "rollouts")
    small_run(out, resume=True)
    assert_same_end(out, whole)
    assert (out / "traces.jsonl").read_bytes() == (whole / "traces.jsonl").read_bytes()


def test_an_sft_stage_not_yet_begun_asks_for_missing_rollouts(copied):
    for folder in checkpoints(copied):
        if folder.name != "step_0002":
            shutil.rmtree(folder)
    (copied / "rollouts" / "step_0002.jsonl").unlink()
    before = (copied / "traces.jsonl").read_bytes()
    with pytest.raises(RecipeError, match=r"rollouts/step_0002.jsonl is missing"):
        small_run(copied, resume=True)
    assert (copied / "traces.jsonl").read_bytes() == before


def break_metrics(run: Path) -> None:
    path = run / "metrics.jsonl"
    first, _, *others = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, "\0\0\0\n", *others]))


DAMAGES = {
    "metrics.jsonl has nothing on step 0": lambda run: (run / "metrics.jsonl").write_text(""),
    "metrics.jsonl, line 2": break_metrics,
    "no whole checkpoint of this run is left": lambda run: shutil.rmtree(run / "checkpoints"),
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


def test_the_kl_penalty_refuses_a_reference_not_of_its_stage(copied):
    config = json.loads((copied / "config.json").read_text())
    config["recipe"]["stages"][2]["kl_coef"] = 0.1
    (copied / "config.json").write_text(json.dumps(config))
    *_, start, _ = checkpoints(copied)
    shutil.rmtree(start)
    with pytest.raises(RecipeError, match=f"{start.name}: the KL penalty needs it"):
        small_run(copied, True, "--stages.2.kl-coef 0.1")


def test_a_failed_start_in_a_linked_folder_says_why(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecipeError, match="its own"), RunFolder(tmp_path / "run").locked():
        raise RecipeError("its own")
    assert (tmp_path / "run").is_symlink()


@pytest.mark.parametrize("from_end", [False, True])
def test_a_signal_cuts_off_an_evaluation_which_is_made_later(from_end, whole, tmp_path, monkeypatch):
    """The one after the first step, and the last one, which is greedy."""
    out = tmp_path / "run"
    steps = len(RunFolder(whole).metrics())
    stopped_run(out, monkeypatch, lab.run, "evaluate", steps + 2 if from_end else 2)
    last = RunFolder(out).metrics()[-1]
    assert "eval_accuracy" not in last
    assert checkpoints(out)[-1].name == f"step_{last['step']:04d}"
    # Stopped once more, in the evaluation that it makes up for.
    stopped_run(out, monkeypatch, lab.run, "evaluate", 1, resume=True)
    assert RunFolder(out).metrics()[-1] == last
    small_run(out, resume=True)
    assert_same_end(out, whole)


@pytest.mark.parametrize(
    "module, name, call, saved",
    [
        (rl.grpo, "collect_rollouts", 2, 1),
        (rl.grpo, "group_advantages", 1, 0),
        (rl.trainer, "make_batch", 2, 1),  # within the last micro-batch of the last update, which is finished
    ],
)
def test_a_signal_drops_an_update_that_has_moved_no_weight(
    module, name, call, saved, whole, tmp_path, monkeypatch
):
    out = tmp_path / "run"
    stopped_run(out, monkeypatch, module, name, call)
    assert [row["step"] for row in RunFolder(out).metrics()] == list(range(saved + 1))
    small_run(out, resume=True)
    assert_same_end(out, whole)
