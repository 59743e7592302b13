import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import digits_task, mlp_task

from influence_nb import audit, fit, fit_many, leave_one_out, models, removal_effects, subsets, truth
from influence_nb.store import written

HERE, LOCK = Path(__file__).parent, threading.Lock()
RUN = {"epochs": 3, "batch_size": 7, "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "progress": False}


def small(n=23, **changes):
    """An untrained network on n examples."""
    return replace(digits_task(n=n, model=models.mlp([9, 5, 4]), trained=False), **changes)


@pytest.fixture
def counted(monkeypatch):
    """The weights of every retraining to a certified optimum, as they begin; the base, with all examples, is None."""
    calls, original = [], truth.converge

    def counting(task, w=None, **settings):
        calls.append(None if w is None else (w == 0).nonzero()[:, 0].tolist())
        return original(task, w=w, **settings)

    monkeypatch.setattr(truth, "converge", counting)
    return calls


def test_a_store_repeats_no_finished_retraining_and_can_be_audited(tmp_path, counted):
    task = mlp_task()
    whole = leave_one_out(task, [5, 7, 30, 2], progress=False)
    counted.clear()
    first = leave_one_out(task, [5, 7], store=tmp_path, progress=False)
    assert counted == [None, [5], [7]]
    assert torch.equal(leave_one_out(task, [5, 7, 30, 2], store=tmp_path, progress=False), whole)
    assert counted == [None, [5], [7], None, [30], [2]] and torch.equal(first, whole[:, :2])
    again = leave_one_out(task, [2, 7], store=tmp_path, progress=False)
    assert len(counted) == 6 and torch.equal(again, whole[:, [3, 1]])  # not even the base is computed again

    header, block = audit(tmp_path)
    assert header["task"] == task.fingerprint() and "1e-10" in header["retraining"] and header["versions"]["torch"]
    assert [(row == 0).nonzero()[0].tolist() for row in block.w] == [[2], [5], [7], [30], []]
    assert torch.allclose(torch.from_numpy(block.readings[2] - block.readings[4]), whole[:, 1], rtol=0, atol=0)
    assert all(c["gradient_norm"] <= 1e-10 for c in block.certificates)
    assert all(c["passes"] > 1 for c in block.certificates[:4])
    base = block.certificates[4]  # certified in full
    assert base["smallest_eigenvalue"] > 0 and base["null"] == ["a constant added to linear2.bias"]


def test_a_store_of_another_question_is_refused_and_left_as_it_was(tmp_path):
    task, store = digits_task(n=20), tmp_path / "truth"
    leave_one_out(task, [3], store=store, progress=False)
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    other = digits_task(n=20, l2=0.1)
    few = replace(task, test=task.test.take([1, 2]))
    for refused, words in [
        (lambda: leave_one_out(other, [3], store=store), "task .*, got "),
        (lambda: leave_one_out(few, [3], store=store), "test points"),
        (lambda: leave_one_out(task, [3], tol=1e-8, store=store), r"\|gradient\| <= 1e-08"),
        (lambda: leave_one_out(task, [3], store=store, retrain=partial(fit, **RUN)),
         r"'influence_nb.train.fit\(batch_size=7, epochs=3, optimizer=torch.optim.sgd.SGD\(lr=0.1, momentum=0.9\)\)'"),
        (lambda: leave_one_out(task, [3], store=store, retrain=partial(fit, keep=LOCK)), "holds a lock"),
        (lambda: leave_one_out(task, [3], store=tmp_path), "a new or empty folder"),
    ]:
        with pytest.raises(ValueError, match=words):
            refused()
    assert before == {path.name: path.read_bytes() for path in store.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["truth"]
    leave_one_out(task, [3], store=tmp_path / "fit", retrain=partial(fit, **RUN), progress=False)
    with pytest.raises(ValueError, match="epochs=3.*got.*epochs=3|epochs=4"):
        leave_one_out(task, [3], store=tmp_path / "fit", retrain=partial(fit, **RUN | {"epochs": 4}))


def trains(lr):
    """A retrainer that closes over its learning rate."""
    def train(task, w):
        return fit(task, w=w, **RUN | {"optimizer": partial(torch.optim.SGD, lr=lr)})
    return train


@pytest.mark.parametrize("one, other", [
    (dict(model=models.mlp([9, 5, 4]).double()), dict(model=models.mlp([9, 5, 4], torch.nn.ReLU).double())),
    (dict(measure=lambda outputs, y: outputs[:, 0]), dict(measure=lambda outputs, y: outputs[:, 1])),
    (dict(retrain=trains(0.01)), dict(retrain=trains(0.5))),
], ids=["activation", "measure", "closure"])
def test_no_answers_to_another_question_of_the_same_name(tmp_path, one, other):
    def ask(retrain=None, **changes):
        retrain = retrain or partial(fit, **RUN)
        return removal_effects(small(**changes), subsets(23, 2), retrain, store=tmp_path, progress=False)

    effects = ask(**one)
    with pytest.raises(ValueError, match="give store= another folder, for every question its own"):
        ask(**other)
    assert torch.equal(ask(**one), effects)


def test_damaged_and_foreign_files_are_reported(tmp_path):
    task = digits_task(n=20)
    effects = leave_one_out(task, [3, 4], store=tmp_path, progress=False)
    first, second, _ = sorted(tmp_path.glob("*.npz"))
    whole = first.read_bytes()
    for content in (whole[:60], whole[:-40], b"", b"notes", second.read_bytes()):
        first.write_bytes(content)
        with pytest.raises(ValueError, match=f"{first.name} .*: delete it"):
            leave_one_out(task, [3, 4], store=tmp_path, progress=False)
    np.savez(first, w=np.ones((1, 20)))
    with pytest.raises(ValueError, match=f"{first.name} .* is damaged, or no file of a store"):
        audit(tmp_path)
    first.unlink()
    assert torch.equal(leave_one_out(task, [3, 4], store=tmp_path, progress=False), effects)
    assert first.read_bytes() and len(audit(tmp_path)[1].w) == 3
    (tmp_path / "header.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="new or empty folder, or one of retrainings"):
        leave_one_out(task, [3, 4], store=tmp_path)


KILLED = """
import sys, time
import torch
from problems import digits_task
from influence_nb import leave_one_out, truth

torch.set_num_threads(1)
original = truth.converge

def slowly(task, w=None, **settings):
    time.sleep(0.1)
    return original(task, w=w, **settings)

truth.converge = slowly
leave_one_out(digits_task(n=30), range(12), store=sys.argv[1], progress=False)
"""


def test_a_killed_run_goes_on_with_the_same_numbers(tmp_path, counted):
    task = digits_task(n=30)
    unbroken = leave_one_out(task, range(12), progress=False)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=env)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("*.npz"))) < 6 and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    finished = [(row == 0).nonzero()[0].tolist() for row in audit(tmp_path)[1].w]
    assert 6 <= len(finished) < 13
    counted.clear()
    assert torch.equal(leave_one_out(task, range(12), store=tmp_path, progress=False), unbroken)
    assert counted == [None, *([j] for j in range(12) if [j] not in finished)]


class Stopped:
    """Trains, and notes it in a file; at its third call in all it is interrupted."""

    def __init__(self, log):
        self.log = log
        self.log.touch()

    def calls(self):
        return len(self.log.read_text())

    def __call__(self, task, w):
        self.log.write_text(self.log.read_text() + ".")
        if self.calls() == 3:
            raise KeyboardInterrupt
        return fit(task, w=w, **RUN)


@pytest.mark.parametrize("threads", [False, True])
def test_an_interrupted_run_keeps_what_is_finished(tmp_path, threads):
    task, w, retrain, store = small(), subsets(23, 60), Stopped(tmp_path / "log"), tmp_path / "truth"
    with ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
        removal_effects(task, w, retrain, store=store, executor=pool if threads else None, progress=False)
    calls, finished = retrain.calls(), len(list(store.glob("*.npz")))
    assert finished >= 2 and calls < 30  # what was waiting is given up
    again = removal_effects(task, w, retrain, store=store, progress=False)
    assert retrain.calls() == calls + 61 - finished
    assert torch.equal(again, removal_effects(task, w, partial(fit, **RUN), progress=False))


def test_two_threads_may_write_one_file_at_once(tmp_path):
    both = threading.Barrier(2)

    def write(file):
        file.write(b"whole")
        both.wait(10)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(written, tmp_path / "header.json", write) for _ in range(2)]:
            future.result()
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("header.json", b"whole")]


def test_a_folder_that_another_run_made_its_own_is_left_to_it(tmp_path):
    """Two runs that begin at once in a new folder: the header of the second wins."""
    task, header = small(), tmp_path / "header.json"

    def overtaken(task, w):
        header.write_text(header.read_text().replace("overtaken", "another"))
        return fit(task, w=w, **RUN)

    with pytest.raises(ValueError, match=r"retraining '.*overtaken:.*', got '.*another:.*give store= another folder"):
        removal_effects(task, subsets(23, 2), overtaken, store=tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["header.json"]


def test_an_audit_lists_a_retraining_once(tmp_path):
    task, w = small(), subsets(23, 4)
    for together in (2, 3):
        effects = removal_effects(task, w, partial(fit_many, **RUN), together, store=tmp_path, progress=False)
    _, block = audit(tmp_path)
    assert len(block.w) == len(block.readings) == len(block.certificates) == 5
    rows = [int((torch.from_numpy(block.w) == row).all(1).nonzero()) for row in torch.cat([w, torch.ones(1, 23)])]
    readings = torch.from_numpy(block.readings)[rows]
    assert torch.allclose((readings[:-1] - readings[-1]).T, effects, rtol=0, atol=1e-12)
