"""Run the notebooks of ``examples/notebooks`` without Jupyter: each cell in one namespace, its outputs collected.

    python -m tests.notebooks    # writes the outputs of this machine into the notebooks

What is printed, the value of the last expression, and figures of pyplot are collected, as Jupyter does. ``with_values``
replaces names that the cell tagged ``parameters`` binds.
"""

import ast
import base64
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def run(path, with_values=None):
    """The notebook with the outputs of its code cells, and the namespace after the last one."""
    import matplotlib

    matplotlib.use("Agg")
    notebook, names, counter = json.loads(path.read_text()), {"__name__": "notebook"}, 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        counter += 1
        cell["execution_count"] = counter
        cell["outputs"] = outputs_of("".join(cell["source"]), f"{path.name}[{counter}]", names, counter)
        if "parameters" in cell["metadata"].get("tags", []):
            assert (with_values or {}).keys() <= names.keys(), "no such parameter"
            names.update(with_values or {})
    return notebook, names


def outputs_of(source, name, names, counter):
    """Run a cell, and what Jupyter would show below it."""
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(tree, name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    found = []
    if printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)})
    found += figures()
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        found.append({"data": data, "execution_count": counter, "metadata": {}, "output_type": "execute_result"})
    return found


def figures():
    """Open figures as pictures; they are closed."""
    import matplotlib.pyplot as plt

    found = []
    for number in plt.get_fignums():
        picture = io.BytesIO()
        plt.figure(number).savefig(picture, format="png", dpi=80)
        data = {"image/png": base64.b64encode(picture.getvalue()).decode(), "text/plain": ["<Figure>"]}
        found.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return found


def main():
    """Write the outputs."""
    folder = ROOT / "examples" / "notebooks"
    os.chdir(folder)
    for name in sys.argv[1:] or [path.name for path in NOTEBOOKS]:
        notebook, _ = run(folder / name)
        (folder / name).write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
        print(name)


if __name__ == "__main__":
    main()
