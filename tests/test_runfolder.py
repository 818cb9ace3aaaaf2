"""One run folder, one run at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from lab.recipe import Recipe, RecipeError
from lab.runfolder import RunFolder

HOLD = "import sys, time; from lab.runfolder import RunFolder\nwith RunFolder(sys.argv[1]).locked(): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder's lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_none(tmp_path, holder):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(RecipeError, match=rf"in use by process {holder.pid} on .*--out"), run.locked():
        pass
    holder.kill()
    holder.wait()
    assert (run.path / "lock").exists()  # stale: nothing to clean up by hand
    with run.locked():
        run.create(Recipe())
    with run.locked():
        assert run.holds_run


def test_the_lock_ends_with_the_block_and_leaves_no_empty_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(KeyError), run.locked():
        with pytest.raises(RecipeError, match="in use"), RunFolder(run.path).locked():
            pass
        raise KeyError
    assert not run.path.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"), RunFolder(tmp_path / "file" / "run").locked():
        pass
