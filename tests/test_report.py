"""The page about runs: what it says, that it needs nothing else, and that a browser shows it."""

import json
import re
import shutil
import subprocess

import pytest
from helpers import fails

import lab.report
from lab.report import pieces, write_report
from lab.runfolder import RunFolder
from model import Tokenizer
from model.weights import TINY


def data_of(page: str) -> dict:
    element = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    return json.loads(element[1])


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
    first, *_, last = RunFolder(smoke_run).rollout_files()
    logged = []
    for path in (first, last):
        logged += map(json.loads, path.read_text().splitlines()[:3])
    shown = data_of(page)["runs"][0]["rollouts"]
    assert [row["step"] for row in shown] == [int(path.stem[5:]) for path in (first, last) for _ in range(3)]
    for row, source in zip(shown, logged, strict=True):
        assert row["completion"] == source["completion"]
        assert row["advantage"] == source["advantage"]
        texts, logprobs = zip(*row["pieces"])
        assert "".join(texts).startswith(source["completion"])  # and then the stop token's
        assert sum(logprobs) == pytest.approx(sum(source["logprobs"]), abs=0.1)


def test_a_character_of_several_tokens_is_one_piece():
    tokenizer = Tokenizer(TINY)
    ids = tokenizer.encode("7+漢é")
    texts, logprobs = zip(*pieces(tokenizer, ids, [-0.5] * len(ids)))
    assert "".join(texts) == "7+漢é"
    assert "漢" in texts
    assert sum(logprobs) == pytest.approx(-0.5 * len(ids))
    _, logprobs = zip(*pieces(tokenizer, ids[:-1], [-0.5] * len(ids)))  # cut off within a character
    assert sum(logprobs) == pytest.approx(-0.5 * (len(ids) - 1))


def test_no_completion_can_end_the_script_or_load_anything(smoke_run, tmp_path):
    run = shutil.copytree(smoke_run, tmp_path / "run")
    path = RunFolder(run).rollout_files()[0]
    hostile = "</script><script>alert(1)</script><!--"
    row = json.loads(path.read_text().splitlines()[0]) | {"completion": hostile}
    path.write_text(json.dumps(row) + "\n")
    page = write_report([run]).read_text(encoding="utf-8")
    assert page.count("</script>") == 2
    assert data_of(page)["runs"][0]["rollouts"][0]["completion"] == hostile
    assert not re.search(r"(src|href)\s*=|@import|url\(|fetch\(|XMLHttp", page)


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    for folders in ([tmp_path], []):
        assert "runs/256-tiny" in fails(capsys, lambda: write_report(folders))  # noqa: B023


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium to open the page in")
def test_a_browser_draws_charts_and_rollouts(page, tmp_path):
    path = tmp_path / "page.html"
    handler = "<script>\nonerror = message => { document.title = message; };\n"
    path.write_text(page.replace("<script>\n", handler, 1))
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    command = [BROWSER, *options.split(), f"--user-data-dir={tmp_path}", "--dump-dom", path.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "<title>pocketgrpo: runs</title>" in shown  # where an error would stand
    assert shown.count("<figure") == 12
    assert shown.count('<article class="card"') == 3
    assert shown.count("<polygon") == 2
    assert "NaN" not in shown.partition('<script id="data"')[0]
