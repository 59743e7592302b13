"""An explorer on a page: where its points are, what it shows, and a hand that clicks, drags and types."""

from playwright.sync_api import expect


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

    def xy(self, layer, id, cloud=None):
        """Where a point is on the page now, in pixels; its plot is scrolled into view first."""
        canvas = self.canvas(cloud or self.map)
        canvas.scroll_into_view_if_needed()
        return canvas.evaluate("(canvas, [layer, id]) => canvas.__pointcloud.clientXY(layer, id)", [layer, id])

    def all_xy(self, layer, ids, cloud=None):
        canvas = self.canvas(cloud or self.map)
        canvas.scroll_into_view_if_needed()
        ask = "(canvas, [layer, ids]) => ids.map((id) => canvas.__pointcloud.clientXY(layer, id))"
        return canvas.evaluate(ask, [layer, list(ids)])

    def visible(self, layer, id, cloud=None) -> bool:
        canvas = self.canvas(cloud or self.map)
        return canvas.evaluate("(canvas, [layer, id]) => canvas.__pointcloud.visible(layer, id)", [layer, id])

    def click(self, layer, id, cloud=None, **how):
        """A real click of the mouse on a point."""
        self.page.mouse.click(*self.xy(layer, id, cloud), **how)

    def drag(self, corners):
        """A real drag of the mouse through `corners`, in pixels of the page."""
        self.page.mouse.move(*corners[0])
        self.page.mouse.down()
        for x, y in corners[1:]:
            self.page.mouse.move(x, y)
        self.page.mouse.up()

    def shows(self, element, **data):
        """Wait until data attributes of an element have these values."""
        for name, value in data.items():
            expect(element).to_have_attribute(f"data-{name.replace('_', '-')}", str(value))

    def asked(self, test_id):
        """Wait until map, gallery and scatter show this test point; the ids on the map: (helpful, harmful)."""
        for element in (self.map, self.gallery, self.scatter):
            self.shows(element, test_id="" if test_id is None else test_id)
        helpful, harmful = (self.map.get_attribute(f"data-{side}") for side in ("helpful", "harmful"))
        self.shows(self.gallery, helpful=helpful, harmful=harmful)
        return ids(helpful), ids(harmful)

    def cards(self, side) -> list[int]:
        """The ids on the cards of one side of the gallery, as a reader sees them in order."""
        return [int(i) for i in self.gallery.locator(f".inb-{side} [data-id]").evaluate_all("all => all.map(e => e.dataset.id)")]

    def card(self, layer, id):
        return self.gallery.locator(f"[data-layer={layer}][data-id='{id}']").first

    def control(self, label):
        """The select, slider, box or button with this label."""
        return self.root.locator(".inb-toolbar").get_by_label(label, exact=True)

    def button(self, name):
        return self.root.locator(".inb-toolbar").get_by_role("button", name=name, exact=True)
