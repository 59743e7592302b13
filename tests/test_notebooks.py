"""Every notebook runs clean, offline, in time, as it was saved; and reads as the house style says."""

import ast
import json
import os
import re
import shutil
import statistics
import time
from pathlib import Path

import nbformat
import pytest
import run
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)

SECONDS = 60  # what a reader with two free cores may wait
BUSY = 3      # a machine that runs other things too takes this many times as long at most

OFFLINE = '''
import socket
connect = socket.socket.connect
def only_loopback(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a notebook must run offline, this one asks for {address}")
    return connect(self, address)
socket.socket.connect = only_loopback
'''


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_solution(cell):
    return "solution" in cell.metadata.get("tags", [])


def parse(cells):
    return ast.parse("\n".join(TransformerManager().transform_cell(cell.source) for cell in cells))


def headings(notebook):
    """(level, title) of every heading in the Markdown, those in code fences left out."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [(len(marks), title.strip()) for marks, title in re.findall(r"^(#+) +(.+)$", text, re.M)]


def output_text(notebook):
    """All that the outputs say in words: pictures, styles and scripts left out."""
    words = []
    for output in (output for cell in code_cells(notebook) for output in cell.outputs):
        data = output.get("data", {})
        words += [output.get("text", ""), data.get("text/plain", ""), data.get("text/markdown", "")]
        page = data.get("text/html", "")
        words.append(re.sub(r"base64,[\w+/=]+|<(style|script|svg)\b.*?</\1>", "", page, flags=re.S))
    return "\n".join(words)


def kinds(notebook):
    """What each code cell shows: a list of kinds of output a cell."""
    return [[(output.output_type, *sorted(output.get("data", {}))) for output in cell.outputs]
            for cell in code_cells(notebook)]


def test_there_are_notebooks():
    assert PATHS, "notebooks/ is empty"
    assert PATHS[0].stem == "00_start_here"
    numbers = [path.stem[:2] for path in PATHS]
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in PATHS) and len(set(numbers)) == len(numbers)


@every_notebook
def test_runs_clean_offline_and_in_time(path, tmp_path, record_property):
    shutil.copytree(path.parent, tmp_path / "notebooks", ignore=shutil.ignore_patterns("student", ".*", "__pycache__"))
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(OFFLINE)
    folders = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    start = time.perf_counter()
    notebook = run.execute(tmp_path / "notebooks" / path.name, timeout=SECONDS * BUSY,
                           env=os.environ | {"PYTHONPATH": folders, "HF_HUB_OFFLINE": "1"})
    seconds = time.perf_counter() - start
    record_property("seconds", round(seconds, 1))
    print(f"{path.name}: {seconds:.1f} s")
    assert seconds < SECONDS * BUSY
    said = [o.text for cell in code_cells(notebook) for o in cell.outputs if o.get("name") == "stderr"]
    assert not [text for text in said if "Warning" in text], "a reader should see no warnings"
    assert kinds(run.tidy(notebook)) == kinds(read(path)), "the saved outputs are not those of a run: make notebooks"


@every_notebook
def test_saved_outputs_are_kept_and_tidy(path):
    notebook = read(path)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert outputs, "no outputs: make notebooks"
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert run.tidy(notebook) == notebook, "not written by make notebooks"
    assert path.stat().st_size < 2e6


@every_notebook
def test_saved_outputs_hold_nothing_of_the_machine_or_the_moment(path):
    words = output_text(read(path))
    source = "\n".join(cell.source for cell in read(path).cells)
    assert str(ROOT) not in words + source
    assert not re.findall(r"(?<![\w.:/<])/(?:home|Users|root|tmp|usr|opt|var|mnt)/\S*|\b[A-Z]:\\\w+", words + source)
    assert not re.findall(r"\b0x[0-9a-f]{6,}", words), "an address"
    assert not re.findall(r"\d\.\d+ ?s(?:ec\w*)?\b|\d ?(?:ms|µs)\b|\d seconds\b|Wall time|\bit/s\b", words), "a time"


@every_notebook
def test_opens_with_what_and_how_long_and_closes_with_limits_exercises_next(path):
    notebook = read(path)
    titles, opening = headings(notebook), notebook.cells[0].source
    assert [level for level, _ in titles].count(1) == 1 and opening.startswith("# ")
    assert re.search(r"what you will learn", opening, re.I)
    assert re.search(r"\d+ min", opening) and re.search(r"\bneeds?\b", opening, re.I)
    level = next((level for level, title in titles if title.startswith("Limits")), None)
    assert level, "no section on limits"
    sections = [title.split()[0] for depth, title in titles if depth <= level]
    assert sections[-3:] == ["Limits", "Exercises", "Next"]


@every_notebook
def test_exercises_have_stars_minutes_and_a_tagged_solution(path):
    notebook = read(path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    exercises = re.split(r"^#+ Next\b", re.split(r"^#+ Exercises\b", text, flags=re.M)[-1], flags=re.M)[0]
    assert 3 <= len(re.findall(r"[★⭐]+[^★⭐\n]*?\d+ ?min", exercises)) <= 5
    solutions = [cell for cell in notebook.cells if is_solution(cell)]
    assert [cell for cell in solutions if cell.cell_type == "code"]
    untagged = [cell for cell in notebook.cells if re.match(r"[#\s*_]*solution", cell.source, re.I) and
                not is_solution(cell)]
    assert not untagged


@every_notebook
def test_student_edition_needs_nothing_from_the_solutions(path):
    notebook = read(path)
    edition = run.student(notebook)
    assert len(edition.cells) == sum(not is_solution(cell) for cell in notebook.cells)
    bound, used = ({node.id for node in ast.walk(parse(code_cells(part))) if isinstance(node, ast.Name)
                    and isinstance(node.ctx, kind)} for part, kind in
                   ((nbformat.from_dict({"cells": [c for c in notebook.cells if is_solution(c)]}), ast.Store),
                    (edition, ast.Load)))
    kept = {node.id for node in ast.walk(parse(code_cells(edition))) if isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Store)}
    assert not (bound & used) - kept


@every_notebook
def test_code_cells_are_short_and_their_claims_asserted(path):
    notebook = read(path)
    lengths = [len(cell.source.splitlines()) for cell in code_cells(notebook)]
    assert max(lengths) <= 15 and statistics.median(lengths) <= 6, sorted(lengths)
    tree = parse(cell for cell in code_cells(notebook) if not is_solution(cell))
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    assert [node for node in ast.walk(tree) if isinstance(node, ast.Assert)], "no cell asserts what the prose claims"


def a_notebook():
    """A small notebook as a kernel leaves it, with everything in it that must not be saved."""
    v4, view = nbformat.v4, {run.VIEW: {"model_id": "1"}, "text/plain": "Widget()"}
    cells = [
        v4.new_markdown_cell("# Title\n![map](images/map.png)"),
        v4.new_code_cell("fit()", metadata={"execution": {"shell.execute_reply": "now"}, "tags": ["claim"]}, outputs=[
            v4.new_output("stream", name="stderr", text="a warning"), v4.new_output("stream", name="stdout", text="7"),
            v4.new_output("display_data", data=view | {"text/plain": "100%|####| 9/9"}),
            v4.new_output("display_data", data=view | {"image/png": "iVBORw0="}),
            v4.new_output("execute_result", data={"text/plain": "0.5"}, execution_count=1)]),
        v4.new_code_cell("answer = 1", metadata={"tags": ["solution"]}),
    ]
    metadata = {"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.0"},
                "kernelspec": {"name": "mine", "display_name": "Mine"}}
    return v4.new_notebook(cells=cells, metadata=metadata)


def test_tidy_keeps_results_and_drops_the_rest():
    notebook = a_notebook()
    before, tidied = json.dumps(notebook), run.tidy(notebook)
    assert json.dumps(notebook) == before and run.tidy(tidied) == tidied
    assert kinds(tidied) == [[("stream",), ("display_data", "image/png", "text/plain"),
                              ("execute_result", "text/plain")], []]
    assert tidied.cells[1].outputs[0].text == "7"
    assert tidied.cells[1].metadata == {"tags": ["claim"]}
    assert set(tidied.metadata) == {"kernelspec", "language_info"} and tidied.metadata.kernelspec.name == "python3"
    nbformat.validate(tidied)


def test_student_edition_has_no_solution_and_finds_its_pictures():
    edition = run.student(a_notebook())
    assert [cell.source for cell in edition.cells] == ["# Title\n![map](../images/map.png)", "fit()"]


def test_a_notebook_that_asks_for_the_network_fails(tmp_path):
    cell = nbformat.v4.new_code_cell("import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "online.ipynb")
    (tmp_path / "sitecustomize.py").write_text(OFFLINE)
    with pytest.raises(Exception, match="must run offline"):
        run.execute(tmp_path / "online.ipynb", env=os.environ | {"PYTHONPATH": str(tmp_path)})
