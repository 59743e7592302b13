"""The what-if in a browser, with real retrainings: what it shows is what the kernel has, and clicks go on meanwhile."""

import numpy as np
import pytest
from playwright.sync_api import expect

from .browse import opened
from .test_explorer import themed
from .view import View

CELLS = ["""
from functools import partial
import torch
from sklearn.datasets import load_digits
from influence_nb import Influence, Split, Task, converge, fit, models
from influence_nb.widgets import Explorer, WhatIf
torch.set_num_threads(1)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
names = tuple("zero one two three four five six seven eight nine".split())
train, test = Split(x[:400], y[:400], names), Split(x[1000:1060], y[1000:1060], names)
task = Task(models.logistic(64, 10).double(), train, test, l2=1e-2)
base = converge(task)
scores = Influence(damping=0.0).fit(task).scores()
""", """
def weights(ids):
    w = torch.ones(400).double()
    w[ids] = 0
    return w

def retrain(ids, progress):  # to the certified optimum
    there = task.to(torch.float64)
    end = converge(there, weights(ids), base=base.eigen, watch=lambda point: progress(point.steps / 20))
    return there.losses() - task.losses(), end

def long(ids, progress):  # a small network, epoch by epoch
    there = Task(models.mlp([64, 32, 10]), train.to(torch.float32), test.to(torch.float32))
    fit(there, 900, batch_size=50, w=weights(ids).float(), keep=lambda epoch: progress(epoch / 900), progress=False)
    return there.losses() - there.losses()

def broken(ids, progress):
    raise ValueError("<b>no</b> such luck")
""", """
axes = torch.linalg.svd(train.x.flatten(1) - train.x.flatten(1).mean(0), full_matrices=False).Vh[:2].T
places = [split.x.flatten(1) @ axes for split in (train, test)]
train_xy = places[0].float().numpy()
whatif = WhatIf(task, scores, retrain, places)
whatif
""", """
explorer = Explorer(task, {"influence": scores}, places, k=5)
shared = WhatIf.from_explorer(explorer, retrain)
explorer
"""]


class Bench(View):
    """A what-if on a page."""

    def __init__(self, page, nth=0):
        super().__init__(page, nth)
        self.outcome, self.verdict, self.runs = (self.root.locator(part) for part in (
            ".inb-cloud[data-name=outcome]", ".inb-verdict", ".inb-runs"))

    def says(self, kernel, what="whatif"):
        """Wait until the page says the kernel's numbers in full; (predicted, actual)."""
        numbers = kernel.ask(f"[{what}.predicted, {what}.actual]")
        told = ["" if value is None else repr(value) for value in numbers]
        close = """(e, told) => ["predicted", "actual"].every((name, i) => told[i] === e.dataset[name] ||
            (told[i] && e.dataset[name] && Number(told[i]) === Number(e.dataset[name])))"""
        self.until(self.verdict, close, told)
        return numbers

    def alone(self) -> list[int]:
        """Training points that have nothing else near them on the map, so that a click means them and no other."""
        train, test = (np.array(self.all_xy(layer, range(n))) for layer, n in (("train", 400), ("test", 60)))
        gap = np.linalg.norm(train[:, None] - np.concatenate([train, test]), axis=2)
        gap[np.arange(400), np.arange(400)] = np.inf
        return np.flatnonzero(gap.min(1) > 15).tolist()

    def row(self, name) -> list[str]:
        """The words of one row of the verdict."""
        return self.verdict.locator(f"tr.inb-{name} .inb-number").all_text_contents()


@pytest.fixture(scope="module")
def page(browser, server):
    server.write("whatif.ipynb", CELLS)
    with opened(browser, server, "whatif.ipynb", size=(1400, 1300)) as found:
        yield found


@pytest.fixture
def bench(page):
    """The what-if with nothing picked and no retraining: (bench, kernel). Then: no error, no request elsewhere."""
    view, kernel, watch = Bench(page[0]), *page[1:]
    kernel.ask("None", before="""
if whatif.state.running: whatif.state.cancel()
whatif.removed, whatif.state.history, whatif.retrainer = [], [], retrain
whatif.test_id = 3
whatif.lasso.value = False
whatif.state.forget()""")
    view.shows(view.verdict, removed=0, test_id=3)
    view.shows(view.runs, runs=0)
    yield view, kernel
    watch.check()


def test_clicks_and_a_lasso_pick_and_retraining_lands_where_the_kernel_says(bench, server, shots):
    view, kernel = bench
    expect(view.button("Retrain")).to_be_disabled()
    expect(view.root.locator(".inb-action")).to_contain_text("nothing is picked: pick at least one training example")
    view.root.screenshot(path=shots / f"{server.frontend}-whatif-start.png")

    first, second, *_ = view.alone()
    for i in (first, second):                               # a click adds
        view.click("train", i)
    kernel.becomes("whatif.removed", [first, second])
    view.click("train", first)                              # and takes away
    kernel.becomes("whatif.removed", [second])
    predicted, _ = view.says(kernel)
    assert predicted == pytest.approx(kernel.ask(f"float(scores.row(3)[{second}])"))
    corners = view.kidney()
    view.drag(corners, key="Shift")                         # a lasso adds
    inside = view.within(kernel.ask("train_xy"), corners)
    assert 30 < len(inside) < 370
    kernel.becomes("sorted(whatif.removed)", sorted({second, *inside}))
    view.button("Undo").click()
    kernel.becomes("whatif.removed", [second])
    view.root.get_by_label("How many", exact=True).fill("12")
    view.page.keyboard.press("Enter")
    view.button("Most harmful").click()
    kernel.becomes("whatif.removed", kernel.ask("scores.top(3, 12).harmful"))
    picked = kernel.ask("whatif.removed")
    view.shows(view.gallery, helpful="", harmful=",".join(map(str, picked)))
    assert view.cards("harmful") == picked and view.cards("helpful") == []
    predicted, _ = view.says(kernel)
    assert predicted == pytest.approx(kernel.ask("float(scores.row(3)[whatif.removed].sum())"))
    assert view.row("actual")[0] == "not yet retrained"

    view.button("Retrain").click()
    view.shows(view.runs, runs=1, shown=1)
    view.shows(view.outcome, test_id=1)
    predicted, actual = view.says(kernel)
    assert actual == pytest.approx(kernel.ask("float(retrain(whatif.removed, print)[0][3])"), abs=1e-9)
    assert actual < 0 and predicted == pytest.approx(actual, rel=0.3)
    for name, value in (("predicted", predicted), ("actual", actual)):
        shown = view.row(name)[0].replace("\u2212", "-")
        assert float(shown) == pytest.approx(value, rel=5e-3)
    expect(view.verdict).to_contain_text("First order: the sum of 12 scores")
    expect(view.verdict).to_contain_text("|gradient|")
    assert kernel.ask("whatif.history[0].certificate['gradient_norm']") <= 1e-10
    view.root.screenshot(path=shots / f"{server.frontend}-whatif-one.png")

    kernel.ask("None", before="for pick in (whatif.state.pick_helpful, whatif.state.pick_random): "
                              "pick(12); whatif.retrain()")
    view.shows(view.runs, runs=3, shown=3)
    points = kernel.ask("[[run.predicted[3], run.actual[3]] for run in whatif.history]")
    pixels = np.array(view.all_xy("test", [1, 2, 3], view.outcome))
    corner = np.array(view.all_xy("train", [3, 63, 123], view.outcome))
    assert np.allclose(pixels, corner, atol=0.1)            # the diamond lies on its own faint point
    lie = np.polyfit(np.array(points)[:, 0], pixels[:, 0], 1), np.polyfit(np.array(points)[:, 1], pixels[:, 1], 1)
    for axis in (0, 1):
        assert np.allclose(np.polyval(lie[axis], np.array(points)[:, axis]), pixels[:, axis], atol=0.1)
    r, slope = kernel.ask("whatif.state.agreement(True)[1:]")
    expect(view.outcome.locator(".inb-note")).to_have_text(f"r {r:.4f}, slope {slope:.3f}")

    view.runs.get_by_role("button", name="Bring back retraining 1", exact=True).click()
    kernel.becomes("whatif.removed", kernel.ask("list(whatif.history[0].ids)"))
    view.shows(view.runs, shown=1)
    view.click("test", 2, view.outcome)                     # the same by its diamond
    kernel.becomes("whatif.removed", kernel.ask("list(whatif.history[1].ids)"))
    view.shows(view.outcome, test_id=2)
    view.root.screenshot(path=shots / f"{server.frontend}-whatif-light.png")
    themed(view.page, server.frontend, "Dark")
    bright = """(canvas, light) => light === (canvas.getContext("2d").getImageData(3, 3, 1, 1).data[0] > 128)"""
    view.until(view.map.locator(".inb-base"), bright, False)
    view.root.screenshot(path=shots / f"{server.frontend}-whatif-dark.png")
    themed(view.page, server.frontend, "Light")
    view.until(view.map.locator(".inb-base"), bright, True)


def test_clicks_are_answered_while_a_network_trains_and_cancel_ends_it(bench, server, shots):
    view, kernel = bench
    kernel.ask("None", before="whatif.retrainer = long; whatif.removed = [5]")
    view.shows(view.verdict, removed=1)
    points = [i for i in view.alone() if i != 5][:4]
    view.button("Retrain").click()
    bar = view.root.locator(".inb-action .progress-bar")
    view.until(bar, "(bar) => parseFloat(bar.style.width) > 2")
    for count, i in enumerate(points, start=2):
        view.click("train", i)
        view.shows(view.verdict, removed=count)
    view.click("test", 21)
    view.shows(view.map, test_id=21)
    view.shows(view.verdict, test_id=21)
    assert kernel.ask("[whatif.state.running, whatif.test_id, len(whatif.removed)]") == [True, 21, 5]  # all meanwhile
    view.root.screenshot(path=shots / f"{server.frontend}-whatif-busy.png")
    view.button("Cancel").click()
    kernel.becomes("whatif.state.running", False)
    expect(view.root.locator(".inb-action")).to_contain_text("cancelled after")
    assert kernel.ask("len(whatif.history)") == 0 and view.runs.get_attribute("data-runs") == "0"
    expect(view.button("Cancel")).to_be_hidden()


def test_a_retrainer_that_fails_says_so_as_text(bench):
    view, kernel = bench
    kernel.ask("None", before="whatif.retrainer = broken; whatif.removed = [5]")
    view.shows(view.verdict, removed=1)
    view.button("Retrain").click()
    expect(view.verdict.get_by_role("alert")).to_have_text("the retraining failed: ValueError: <b>no</b> such luck")
    assert view.verdict.locator("b").count() == 0
    expect(view.button("Retrain")).to_be_enabled()


def test_it_is_worked_by_keyboard(bench):
    view, kernel = bench
    canvas = view.canvas(view.map)
    canvas.focus()
    canvas.press("t")                                       # to the training examples
    for key in ("Home", "Enter", "PageDown", "Enter"):
        canvas.press(key)
    kernel.becomes("whatif.removed", [0, 1])
    view.card("train", 0).focus()
    view.page.keyboard.press("Enter")                       # a card lets go of its example
    kernel.becomes("whatif.removed", [1])
    view.button("Retrain").focus()
    view.page.keyboard.press("Enter")
    view.shows(view.runs, runs=1, shown=1)
    canvas.focus()
    canvas.press("Escape")                                  # nothing picked
    kernel.becomes("whatif.removed", [])
    view.runs.get_by_role("button").focus()
    view.page.keyboard.press("Enter")
    kernel.becomes("whatif.removed", [1])
    point = view.root.get_by_label("Test point", exact=True)
    point.fill("21")
    point.press("Enter")
    kernel.becomes("whatif.test_id", 21)
    view.shows(view.verdict, test_id=21)
    canvas.focus()
    canvas.press("t")


def test_the_explorers_selection_is_the_pick(bench):
    view, kernel = Bench(bench[0].page, nth=1), bench[1]
    (point, *_) = view.alone()
    view.click("train", point)
    kernel.becomes("[explorer.selected, shared.removed]", [[point], [point]])
    kernel.ask("None", before="shared.removed = [7, 9]")
    view.shows(view.map, selected=2)
    predicted, expected = kernel.ask("[shared.predicted, float(scores.row(explorer.test_id)[[7, 9]].sum())]")
    assert predicted == pytest.approx(expected)
