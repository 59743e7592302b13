"""Run the notebooks where they lie and keep their outputs, tidied; or write the student edition.

    python notebooks/run.py                  every notebook, in order
    python notebooks/run.py 03_influence     those named
    python notebooks/run.py --student        notebooks/student/: the same without the cells tagged `solution`
"""

import copy
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
VIEW = "application/vnd.jupyter.widget-view+json"


def execute(path: Path, timeout: float = 600, env: dict | None = None):
    """The notebook at `path`, run in a fresh kernel in its own folder. Raises CellExecutionError where a cell does."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources,
                            record_timing=False, store_widget_state=False, coalesce_streams=True)
    return client.execute(env=env) if env else client.execute()


def tidy(notebook):
    """A copy that two runs write alike: no widget state, progress bars, stderr or timings; of the metadata, only tags.

    A widget leaves its static picture; one without a picture, such as a progress bar, leaves nothing.
    """
    notebook = copy.deepcopy(notebook)
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    })
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": cell.metadata.tags} if cell.metadata.get("tags") else {})
        if cell.cell_type == "code":
            cell.outputs = [output for output in map(without_widget, cell.outputs) if output]
    return notebook


def without_widget(output):
    """The output as it is kept, or None: a page without a kernel shows the picture only where no live view is named."""
    if output.output_type == "stream":
        return output if output.name == "stdout" else None
    if VIEW in output.get("data", {}):
        del output.data[VIEW]
        return output if set(output.data) - {"text/plain"} else None
    return output


def student(notebook):
    """A copy without the cells tagged `solution`, its pictures looked for one folder up."""
    notebook = copy.deepcopy(notebook)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = cell.source.replace("](images/", "](../images/")
    return notebook


def main(arguments):
    names = [Path(argument).stem for argument in arguments if argument != "--student"]
    paths = [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb"))
    for path in paths:
        if "--student" in arguments:
            (FOLDER / "student").mkdir(exist_ok=True)
            nbformat.write(student(nbformat.read(path, as_version=4)), FOLDER / "student" / path.name)
            print(f"student/{path.name}")
        else:
            start = time.perf_counter()
            nbformat.write(tidy(execute(path)), path)
            print(f"{path.name:40} {time.perf_counter() - start:5.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
