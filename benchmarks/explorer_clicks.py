"""Click a test point in JupyterLab: how long until its neighbours are highlighted, and does every aimed click hit?

    python benchmarks/explorer_clicks.py

Real clicks of a headless Chromium on the 24 test points of an explorer, in random order. Times in ms from the release
of the mouse button (the event's own time stamp): "redrawn" until the map names the new neighbours, which it does right
after painting them; "on screen" until the frame with them has been painted; "scatter" until the scatter has the new
test point's distances and scores. 5,500 points are the MNIST images that come with the project; 60,000 are the same
images tiled, with noise. The model is a softmax regression, the scores are products of gradients: to a click, they
are just numbers.
"""

import random
import sys
import tempfile
from pathlib import Path
from statistics import median

from playwright.sync_api import TimeoutError, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from browser.browse import Server, Watch, launched, opened  # noqa: E402
from browser.view import View  # noqa: E402

TEST_POINTS = 24
NOTEBOOK = ["""
import time
import torch
from influence_nb import Scores, Split, Task, data
from influence_nb.widgets import Explorer
torch.manual_seed(0)
train, test = data.load("mnist-5500")
tiles = -(-{n} // len(train))
x = train.x.repeat(tiles, 1, 1, 1)[:{n}]
x = (x + 0.1 * (tiles > 1) * torch.randn_like(x)).clamp(0, 1)
train = Split(x, train.y.repeat(tiles)[:{n}], train.classes)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(30):
    loss = torch.nn.functional.cross_entropy(model(train.x[:5500]), train.y[:5500])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
task = Task(model, train, test)
asked = task.test.take(task.mistakes()[:{shown}])
def parts(split):
    errors = model(split.x).softmax(1) - torch.nn.functional.one_hot(split.y, 10)
    return errors.detach(), split.x.flatten(1)
(e, a), (f, b) = parts(asked), parts(train)
products = (e @ f.T) * (a @ b.T) / len(train)
scores = Scores(products, "products of gradients", task.fingerprint(), asked.ids, torch.arange({n}))
axes = torch.pca_lowrank(b, 2, niter=4)[2]
places = b @ axes, task.test.x.flatten(1) @ axes
explorer = Explorer(task, {{"influence": scores}}, places, asked.ids.tolist(), preload={preload})
""", "explorer"]

METER = """([map, scatter]) => {
    let up = null;
    window.addEventListener("pointerup", (event) => { up = event.timeStamp; }, true);
    const look = () => {
        const click = window.click;
        if (!click || up === null) return;
        const {testId, helpful, answered} = map.dataset;
        if (click.redrawn === undefined && Number(testId) === click.id && helpful) {
            click.redrawn = performance.now() - up;
            const after = new MessageChannel();
            after.port1.onmessage = () => { click.painted = performance.now() - up; };
            requestAnimationFrame(() => after.port2.postMessage(null));
        }
        click.own = Number(answered);
        if (click.redrawn !== undefined && click.scatter === undefined && Number(scatter.dataset.testId) === click.id
            && !scatter.classList.contains("inb-stale")) click.scatter = performance.now() - up;
    };
    const observer = new MutationObserver(look);
    for (const element of [map, scatter]) observer.observe(element, {attributes: true});
    window.aim = (id) => { up = null; window.click = {id}; };
}"""


def clicks(view, ids) -> list[dict]:
    """Aim at each test point once, in random order: {id, redrawn, painted, scatter, own} of each click that hit."""
    view.page.evaluate(METER, [view.map.element_handle(), view.scatter.element_handle()])
    order, times = list(ids), []
    random.Random(0).shuffle(order)
    if str(order[0]) == view.map.get_attribute("data-test-id"):  # a click on what is shown already would change nothing
        order.reverse()
    for test_id in order:
        x, y = view.xy("test", test_id)
        view.page.evaluate("(id) => window.aim(id)", test_id)
        view.page.mouse.click(x, y)
        try:
            view.page.wait_for_function("() => window.click.painted && window.click.scatter", timeout=10_000)
        except TimeoutError:
            continue
        times.append(view.page.evaluate("() => window.click"))
    return times


def row(where, n, how, times, note=""):
    """One line of the table: median and greatest of each time."""
    cells = []
    for name in ("redrawn", "painted", "scatter"):
        values = [click[name] for click in times]
        cells.append(f"{median(values):7.1f} {max(values):7.1f}" if values else " " * 15)
    print(f"{where:<9}{n:>7}  {how:<11}{len(times):>3}/{TEST_POINTS:<3} " + "  ".join(cells) + f"  {note}", flush=True)


def main():
    print(f"{'':<36}{'redrawn':>15}  {'on screen':>15}  {'scatter':>15}")
    print(f"{'page':<9}{'points':>7}  {'answered by':<11}{'hits':<7} " + "  ".join(["median     max"] * 3))
    with tempfile.TemporaryDirectory() as home, sync_playwright() as playwright, launched(playwright) as browser:
        server = Server("lab", Path(home))
        try:
            for n in (5_500, 60_000):
                for preload in (True, False):
                    measure(browser, server, n, preload, Path(home) / "page.html")
        finally:
            server.close()


def measure(browser, server, n, preload, path):
    name = f"{n}_{preload}.ipynb"
    server.write(name, [cell.format(n=n, shown=TEST_POINTS, preload=preload) for cell in NOTEBOOK])
    with opened(browser, server, name) as (page, kernel, watch):
        view, ids = View(page), kernel.ask("explorer.test_ids")
        row("Lab", n, "the page" if preload else "the kernel", clicks(view, ids))
        watch.check()
        if not preload:
            return
        export = f"start = time.perf_counter(); explorer.export_html('{path}')"
        written = kernel.ask("time.perf_counter() - start", before=export)
    page = browser.new_page(viewport={"width": 1400, "height": 1200})
    watch = Watch(page)
    page.goto(path.as_uri())
    view = View(page)
    view.shows(view.map, ready=1)
    times = clicks(view, ids)
    row("exported", n, "the page", times, f"{path.stat().st_size / 1e6:.2f} MB, written in {written:.1f} s, "
        f"requests after the page itself: {len(watch.requests) - 1}, errors: {len(watch.errors)}")
    page.close()


if __name__ == "__main__":
    main()
