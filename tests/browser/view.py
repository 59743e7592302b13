"""An explorer on a page: where its points are, what it shows, and a hand that clicks, drags and types."""

import numpy as np
from matplotlib.path import Path as Polygon
from playwright.sync_api import TimeoutError


def ids(text) -> list[int]:
    """The ids in a data attribute."""
    return [int(i) for i in (text or "").split(",") if i]


class View:
    """The `nth` explorer of a page, found by what its elements say of themselves in data attributes."""

    def __init__(self, page, nth=0):
        self.page, self.root = page, page.locator(".inb-explorer").nth(nth)
        self.map, self.scatter = (self.root.locator(f".inb-cloud[data-name={name}]") for name in ("map", "scatter"))
        self.gallery = self.root.locator(".inb-gallery")

    def canvas(self, cloud):
        return cloud.locator("canvas.inb-over")

    def all_xy(self, layer, ids, cloud=None) -> list:
        """Where points are on the page now, in pixels; their plot is scrolled into view first."""
        canvas = self.canvas(cloud or self.map)
        canvas.scroll_into_view_if_needed()
        ask = "(canvas, [layer, ids]) => ids.map((id) => canvas.__pointcloud.clientXY(layer, id))"
        return canvas.evaluate(ask, [layer, list(ids)])

    def xy(self, layer, id, cloud=None) -> list:
        return self.all_xy(layer, [id], cloud)[0]

    def visible(self, layer, ids) -> list[int]:
        """Those of `ids` whose points on the map are not filtered away."""
        ask = "(canvas, [layer, ids]) => ids.filter((id) => canvas.__pointcloud.visible(layer, id))"
        return self.canvas(self.map).evaluate(ask, [layer, list(ids)])

    def click(self, layer, id, cloud=None):
        """A real click of the mouse on a point."""
        self.page.mouse.click(*self.xy(layer, id, cloud))

    def drag(self, corners, key=None):
        """A real drag of the mouse through `corners`, in pixels of the page, with a key held."""
        if key:
            self.page.keyboard.down(key)
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        for x, y in corners[1:]:
            self.page.mouse.move(x, y)
        self.page.mouse.up()
        if key:
            self.page.keyboard.up(key)

    def until(self, element, condition, value=None):
        """Wait until the JavaScript function `condition` of (element, value) is true, looked at every frame."""
        test = f"([element, value]) => ({condition})(element, value)"
        self.page.wait_for_function(test, arg=[element.element_handle(), value])

    def shows(self, element, **data):
        """Wait until data attributes of an element have these values."""
        data = {"data-" + name.replace("_", "-"): str(value) for name, value in data.items()}
        equal = "(e, data) => Object.entries(data).every(([name, value]) => e.getAttribute(name) === value)"
        try:
            self.until(element, equal, data)
        except TimeoutError as error:
            found = {name: element.get_attribute(name) for name in data}
            raise AssertionError(f"expected {data}, got {found}") from error

    def hides(self, layer, id):
        """Wait until a point of the map is filtered away."""
        gone = "(canvas, [layer, id]) => !canvas.__pointcloud.visible(layer, id)"
        self.until(self.canvas(self.map), gone, [layer, id])

    def asked(self, test_id):
        """Wait until map, gallery and scatter show this test point; the ids on the map: (helpful, harmful)."""
        for element in (self.map, self.gallery, self.scatter):
            self.shows(element, test_id="" if test_id is None else test_id)
        helpful, harmful = (self.map.get_attribute(f"data-{side}") for side in ("helpful", "harmful"))
        self.shows(self.gallery, helpful=helpful, harmful=harmful)
        return ids(helpful), ids(harmful)

    def cards(self, side) -> list[int]:
        """The ids on the cards of one side of the gallery, as a reader sees them in order."""
        cards = self.gallery.locator(f".inb-{side} [data-id]")
        return [int(i) for i in cards.evaluate_all("all => all.map((card) => card.dataset.id)")]

    def card(self, layer, id):
        return self.gallery.locator(f"[data-layer={layer}][data-id='{id}']").first

    def control(self, label):
        """The select, box or slider with this label."""
        return self.root.get_by_label(label, exact=True)

    def button(self, name):
        return self.root.get_by_role("button", name=name, exact=True)

    def kidney(self, turn=0.0, cloud=None) -> list:
        """Corners of a loop in the middle of the map, in pixels of the page; not convex, so that a box is no answer."""
        canvas = self.canvas(cloud or self.map)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        radius = 0.22 + 0.1 * np.cos(angle + turn)
        x = box["x"] + box["width"] * (0.5 + radius * np.cos(angle))
        y = box["y"] + box["height"] * (0.5 + radius * np.sin(angle))
        return np.stack([x, y], 1).round(1).tolist()

    def within(self, train_xy, corners, cloud=None) -> list[int]:
        """Training points in a loop of the page's pixels, by the coordinates train_xy [n_train, 2] that Python holds.

        Five points say how the map, or another cloud, lies on the page.
        """
        points = np.column_stack([train_xy, np.ones(len(train_xy))])
        some = np.linspace(0, len(train_xy) - 1, 5).astype(int)
        lie, *_ = np.linalg.lstsq(points[some], np.array(self.all_xy("train", some.tolist(), cloud)), rcond=None)
        return np.flatnonzero(Polygon(corners).contains_points(points @ lie)).tolist()
