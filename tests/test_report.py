"""The page about runs: what it says, that it needs nothing else, and that a browser shows it."""

import json
import re
import shutil
import subprocess

import pytest

import lab.report
from lab.errors import user_errors
from lab.report import pieces, write_report
from lab.runfolder import RunFolder
from model import Tokenizer
from model.weights import TINY


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    )


@pytest.fixture(scope="module")
def page(smoke_run, tmp_path_factory) -> str:
    """The page of the smoke run beside itself."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        for name, number in (("STEPS", 2), ("GROUPS", 1), ("SAMPLES", 3)):
            patch.setattr(lab.report, name, number)
        assert write_report((smoke_run, smoke_run), out) == out
    return out.read_text(encoding="utf-8")


def test_the_page_says_what_metrics_say(smoke_run, page):
    first, second = data_of(page)["runs"]
    assert first == second
    assert first["name"] == str(smoke_run)
    metrics = (smoke_run / "metrics.jsonl").read_text().splitlines()
    assert first["rows"] == [json.loads(line) for line in metrics]
    assert [kind for _, _, kind in first["stages"]] == ["grpo", "sft", "grpo"]


def test_rollouts_are_spread_evenly_and_keep_their_numbers(smoke_run, page):
    """Tokens, log-probabilities and advantages are those of the files."""
    shown = data_of(page)["runs"][0]["rollouts"]
    files = RunFolder(smoke_run).rollout_files()
    assert sorted({row["step"] for row in shown}) == [int(files[0].stem[5:]), int(files[-1].stem[5:])]
    for path in (files[0], files[-1]):
        logged = [json.loads(line) for line in path.read_text().splitlines()][:3]
        of_step = [row for row in shown if row["step"] == int(path.stem[5:])]
        assert [row["completion"] for row in of_step] == [row["completion"] for row in logged]
        for row, source in zip(of_step, logged):
            assert row["advantage"] == source["advantage"]
            assert len(row["pieces"]) <= len(source["token_ids"])
            text = "".join(piece for piece, _ in row["pieces"])
            assert text.startswith(source["completion"])  # and then the stop token's
            assert sum(logprob for _, logprob in row["pieces"]) == pytest.approx(
                sum(source["logprobs"]), abs=0.1
            )


def test_a_character_of_several_tokens_is_one_piece():
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode("7+漢é")
    logprobs = [-0.5] * len(ids)
    texts, sums = zip(*pieces(tokenizer, ids, logprobs), strict=True)
    assert "".join(texts) == "7+漢é"
    assert "漢" in texts
    assert sum(sums) == pytest.approx(-0.5 * len(ids))
    half = pieces(tokenizer, ids[:-1], logprobs[:-1])  # cut off within a character
    assert sum(logprob for _, logprob in half) == pytest.approx(-0.5 * (len(ids) - 1))


def test_no_completion_can_end_the_script_or_load_anything(smoke_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(smoke_run, run)
    path = RunFolder(run).rollout_files()[0]
    row = json.loads(path.read_text().splitlines()[0]) | {
        "completion": "</script><script>alert(1)</script><!--"
    }
    path.write_text(json.dumps(row) + "\n")
    page = write_report([run]).read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert data_of(page)["runs"][0]["rollouts"][0]["completion"] == row["completion"]
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|XMLHttp", page)


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    for folders in ((tmp_path,), ()):
        with pytest.raises(SystemExit) as exit_, user_errors():
            write_report(folders)
        assert exit_.value.code == 2
        assert "runs/256-tiny" in capsys.readouterr().err


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in")
def test_a_browser_draws_charts_and_rollouts(page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        page.replace("<script>\n", "<script>\nonerror = message => { document.title = message; };\n", 1)
    )
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-sync",
        "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>pocketgrpo: runs</title>" in shown  # where an error would stand
    assert shown.count("<figure") == 12
    assert shown.count('<article class="card"') == 3
    assert shown.count("<polygon") == 2
    assert "NaN" not in shown.partition('<script id="data"')[0]
