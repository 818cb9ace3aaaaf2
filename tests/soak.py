"""A soak: `python tests/soak.py` runs 2,000 small steps and watches the process from outside (Linux).

Over the last half of the steps, memory may grow by 2 % and the number of open files not at all.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import tyro

ROOT = Path(__file__).parent.parent
PARTS = 10
# Of 2,000 steps: 100 plots, 400 checkpoints
OPTIONS = "smoke --plain --evaluation.every 20 --checkpoint-every 5 --stages.0.steps"


def watch(steps: int, run: Path) -> list[tuple[int, int, int]]:
    """(step, resident bytes, open files), twice a second, of a run in a process of its own."""
    command = [sys.executable, "train.py", *OPTIONS.split(), str(steps), "--out", str(run)]
    seen = []
    with open(run.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None:
            time.sleep(0.5)
            try:
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                step = (run / "metrics.jsonl").read_bytes().count(b"\n") - 1
            except (OSError, IndexError):  # not begun, or over
                continue
            seen.append((step, 4096 * pages, files))
    if process.returncode:
        sys.exit(f"the run failed:\n{run.with_suffix('.log').read_text()[-2000:]}")
    return seen


def main(steps: int = 2000, growth: float = 0.02) -> None:
    """Train for long, in little, and watch memory and open files.

    Args:
        steps: GRPO steps of the smoke recipe's first stage.
        growth: how much more memory the last tenth of the steps may take than the sixth tenth.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seen = watch(steps, Path(folder) / "run")
    print(f"{steps:,} steps in {time.perf_counter() - start:,.0f} s\n")
    print("| steps | memory, MB | open files |\n|---|---|---|")
    parts = []
    for number in range(PARTS):
        low, high = steps * number // PARTS, steps * (number + 1) // PARTS
        part = [(memory, files) for step, memory, files in seen if low <= step < high]
        memory = median(memory for memory, _ in part)
        files = min(files for _, files in part)
        parts.append((memory, files))
        print(f"| {low:,} to {high:,} | {memory / 1e6:,.1f} | {files} |")
    before, files_before = parts[PARTS // 2]
    after, files_after = parts[-1]
    print("\nover the last half:")
    print(f"memory {100 * (after / before - 1):+.2f} %, open files {files_after - files_before:+d}")
    if after > before * (1 + growth) or files_after > files_before:
        sys.exit("they grow")


if __name__ == "__main__":
    tyro.cli(main)
