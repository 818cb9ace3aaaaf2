"""Run a notebook's code cells in order, without Jupyter, and keep what they print and draw.

`python docs/run_notebook.py docs/one_step.ipynb` writes the outputs back into the notebook, or into a second
path. All cells share one namespace. A cell that raises ends the run, and nothing is written.
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def run(notebook: dict) -> None:
    """Replace the outputs of every code cell by those of a run from the top."""
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate((cell for cell in notebook["cells"] if cell["cell_type"] == "code"), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"code cell {number}", "exec"), namespace)
        lines = printed.getvalue().splitlines(keepends=True)
        text = [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []
        cell["execution_count"], cell["outputs"] = (
            number,
            text + [picture(figure) for figure in plt.get_fignums()],
        )
        plt.close("all")


def picture(figure: int) -> dict:
    """An open figure as a notebook's output; the same figure gives the same bytes."""
    file = io.BytesIO()
    plt.figure(figure).savefig(file, dpi=80, metadata={"Software": None})
    data = {"image/png": base64.b64encode(file.getvalue()).decode() + "\n", "text/plain": ["<Figure>"]}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def main(source: Path, target: Path) -> None:
    notebook = json.loads(source.read_text(encoding="utf-8"))
    run(notebook)
    target.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python docs/run_notebook.py notebook.ipynb [target.ipynb]")
    main(Path(sys.argv[1]), Path(sys.argv[-1]))
