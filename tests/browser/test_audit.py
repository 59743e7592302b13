"""The label audit in a browser, by keyboard alone: what is pressed is what the kernel has, and what comes of it."""

import pytest
from playwright.sync_api import expect

from .browse import opened, themed
from .view import View

CELLS = ["""
import torch
from sklearn.datasets import load_digits
from influence_nb import Influence, Split, Task, data, labels, models
from influence_nb.widgets import LabelAudit
torch.set_num_threads(1)
x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x).reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
names = tuple("zero one two three four five six seven eight nine".split())
train, test = Split(x[:300], y[:300], names), Split(x[1000:1200], y[1000:1200], names)
flipped, planted = data.flip_labels(train, 0.2, seed=0)
task = Task(models.logistic(64, 10).double(), flipped, test, l2=1e-3)
last = labels.last_layer(task)
scores = Influence().fit(last).scores(last.train)
""", """
audit = LabelAudit(task, {"loss": labels.loss, "margin": labels.margin, "random": labels.at_random}, scores=scores,
                   path="decisions.json", k=5)
audit
""", """
tag = "<img src=x onerror='window.broken = 1'><script>window.broken = 1</script>"
read = Split(torch.randn(30, 4).double(), torch.arange(30) % 12, ("<i>bad</i>", *"abcdefghijk"),
             tuple(f"{tag} sentence {i}" for i in range(30)))
talk = Task(models.logistic(4, 12).double(), read, read.take([0, 1]), l2=0.1)
own = labels.last_layer(talk)
sentences = LabelAudit(talk, {"<i>loss</i>": labels.loss}, scores=Influence().fit(own).scores(own.train), k=2)
sentences
"""]


class Desk(View):
    """A label audit on a page."""

    def __init__(self, page, nth=0):
        super().__init__(page, nth)
        self.desk = self.root.locator(".inb-desk")

    @property
    def id(self) -> int:
        return int(self.desk.get_attribute("data-id"))

    def press(self, key):
        """Press a key, and wait for the answer."""
        turn = self.desk.get_attribute("data-turn")
        self.page.keyboard.press(key)
        self.until(self.desk, "(e, turn) => e.dataset.turn !== turn && !e.dataset.waiting", turn)

    def tab_to(self, element):
        """Go on with Tab until an element has the focus."""
        for _ in range(40):
            if element.evaluate("(e) => e === document.activeElement"):
                return
            self.page.keyboard.press("Tab")
        raise AssertionError("not reached in 40 steps")


@pytest.fixture(scope="module")
def page(browser, server):
    server.write("audit.ipynb", CELLS)
    with opened(browser, server, "audit.ipynb") as found:
        yield found


@pytest.fixture
def desk(page):
    """The audit with nothing decided, the focus on its menu: (desk, kernel). Then: no error, no request elsewhere."""
    view, kernel, watch = Desk(page[0]), *page[1:]
    kernel.ask("None", before="audit.state.write([]); audit.score.value = 'loss'; audit.history.clear(); "
                              "audit._seen(last, torch.arange(300).numpy()); audit._rank()")
    view.shows(view.desk, id=kernel.ask("audit.state.order[0]"), decision="")
    view.control("Suspicion").focus()
    yield view, kernel
    watch.check()


def test_a_session_by_keyboard_fixes_ten_flips_and_takes_one_back(desk, server, shots):
    view, kernel = desk
    for _ in range(2):                                      # in the menu, to random: labels that are right come, too
        view.page.keyboard.press("ArrowDown")
    kernel.becomes("audit.by", "random")
    truth = dict(kernel.ask("list(zip(planted.rows.tolist(), planted.old.tolist()))"))
    given, order = kernel.ask("[flipped.y, audit.state.order]")
    view.shows(view.desk, id=order[0])
    view.tab_to(view.desk)
    view.root.screenshot(path=shots / f"{server.frontend}-audit-start.png")
    fixed, kept = [], []
    for place, i in enumerate(order):
        if len(fixed) == 10:
            break
        view.shows(view.desk, id=i, place=place + 1, label=given[i])
        (fixed if i in truth else kept).append(i)
        view.press(str(truth[i]) if i in truth else "k")
    assert len(fixed) == 10 < len(kept)
    view.press("r")                                         # one is removed,
    removed = order[len(fixed) + len(kept)]
    view.press("u")                                         # and taken back, and with it the last decision before it
    assert view.id == removed
    view.press("u")
    last = fixed.pop()
    view.shows(view.desk, id=last, decision="", label=given[last])
    corrected, decisions = kernel.ask("[audit.corrected().y, audit.decisions]")
    assert len(fixed) == 9 and corrected == [truth[i] if i in fixed else label for i, label in enumerate(given)]
    assert decisions == [{"id": i, "decision": "fix" if i in fixed else "keep", "label": corrected[i]}
                         for i in order[:len(decisions)]]
    assert kernel.ask("LabelAudit(task, {'loss': labels.loss}, path='decisions.json').decisions") == decisions
    view.press("ArrowLeft")
    view.shows(view.desk, id=order[len(decisions) - 1])
    expect(view.desk.locator(".inb-decided")).not_to_be_empty()
    expect(view.desk.locator(".inb-headline")).to_have_text(
        f"{9 + len(kept)} of 300 labels checked: {len(kept)} kept, 9 fixed.")
    view.tab_to(view.button("Retrain"))
    view.page.keyboard.press("Enter")
    line = view.desk.locator(".inb-line div")
    expect(line).to_have_count(1)
    before, after = kernel.ask("""[float((each.predict() == test.y).double().mean()) for each in
                               (last, labels.last_layer(Task(task.model, audit.corrected(), test, l2=1e-3)))]""")
    assert after > before
    expect(line).to_contain_text(f"9 labels fixed: test accuracy {100 * before:.1f} % \u2192 {100 * after:.1f} %")
    view.root.screenshot(path=shots / f"{server.frontend}-audit-done.png")


def test_a_second_key_does_not_fall_on_an_example_that_is_not_yet_seen(desk):
    view, kernel = desk
    view.tab_to(view.desk)
    first, turn = view.id, view.desk.get_attribute("data-turn")
    view.desk.evaluate("""(desk) => ["k", "r", "3"].forEach(
        (key) => desk.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})))""")
    view.until(view.desk, "(e, turn) => e.dataset.turn !== turn", turn)
    view.press("ArrowRight")                                # asked after the three: they are all answered
    (only,) = kernel.ask("audit.decisions")
    assert (only["id"], only["decision"]) == (first, "keep")


def test_menu_buttons_and_neighbours(desk, server, shots):
    view, kernel = desk
    view.page.keyboard.press("ArrowDown")                   # in the menu
    kernel.becomes("audit.by", "margin")
    view.shows(view.desk, id=kernel.ask("audit.state.order[0]"))
    expect(view.desk.locator(".inb-example .inb-score")).to_contain_text("margin")
    for side in ("helpful", "harmful"):
        cards = view.desk.locator(f".inb-{side} [data-id]").evaluate_all("all => all.map((e) => Number(e.dataset.id))")
        i = view.id
        mine = [j for j in kernel.ask(f"scores.top({i}, 6).{side}") if j != i][:5]
        assert cards == mine and cards
    view.tab_to(view.desk.get_by_role("button", name="r remove"))
    first = view.id
    view.press("Enter")
    kernel.becomes("audit.decisions", [{"id": first, "decision": "remove", "label": None}])
    view.desk.get_by_role("button", name="u undo").click()
    kernel.becomes("audit.decisions", [])
    bright = "(e, light) => light === (Number(getComputedStyle(e).color.match(/\\d+/)[0]) < 128)"  # dark ink on light
    for theme in ("Dark", "Light"):
        themed(view.page, server.frontend, theme)
        view.until(view.desk, bright, theme == "Light")
        view.root.screenshot(path=shots / f"{server.frontend}-audit-{theme.lower()}.png")


def test_text_of_the_data_is_never_markup(page):
    view, kernel, watch = Desk(page[0], nth=1), *page[1:]
    view.desk.scroll_into_view_if_needed()
    expect(view.desk.locator(".inb-example .inb-text")).to_have_text(kernel.ask("read.text[sentences.shown]"))
    assert view.desk.locator("img, script, i").count() == 0
    view.desk.focus()
    first = view.id
    view.press("b")                                         # the letters go on where the numbers end: class 11
    assert kernel.ask("sentences.decisions[0]") == {
        "id": first, "decision": "keep" if kernel.ask(f"int(read.y[{first}])") == 11 else "fix", "label": 11}
    assert view.page.evaluate("window.broken") is None
    watch.check()
