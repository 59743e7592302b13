"""The explorer's controls: stock ipywidgets bound to its state."""

from types import SimpleNamespace

import ipywidgets as w
from traitlets import dlink, link

from influence_nb.widgets.state import DEPTH


def button(label, tip, act, width="64px"):
    """A button that calls `act()`."""
    control = w.Button(description=label, tooltip=tip, layout={"width": width})
    control.on_click(lambda _: act())
    return control


def toolbar(state, cancel):
    """A row of labelled controls for `state`, and each by name; `cancel` is called to give up a computation."""
    def choice(trait, label, width, options=None):
        control = w.Dropdown(options=options or state.choices[trait], description=label, layout={"width": width})
        link((state, trait), (control, "value"))
        if len(control.options) == 1:
            control.layout.display = "none"  # nothing to choose
        return control

    every = [("all classes", ""), *((name, name) for name in state.classes)]
    c = SimpleNamespace(
        method=choice("method", "Method", "150px"),
        k=w.IntSlider(description="Neighbours a side", min=1, max=DEPTH, layout={"width": "170px"}),
        metric=choice("metric", "Distance", "150px"),
        layer=choice("layer", "Layer", "150px"),
        projection=choice("projection", "Projection", "110px"),
        near={projection: near(state, projection) for projection in state.ranges},
        colour_by=choice("colour_by", "Colour by", "110px"),
        class_filter=choice("class_filter", "Class", "120px", every),
        search=w.Text(description="Search ids, classes, text", placeholder="6558, or a word", continuous_update=False,
                      layout={"width": "170px"}),
        misclassified_only=w.Checkbox(description="misclassified only", indent=False, layout={"width": "150px"},
                                      tooltip="Show only the test points that the model gets wrong"),
        ellipses=w.Checkbox(description="class ellipses", indent=False, layout={"width": "115px"}, tooltip="Draw the "
                            "centre of each colour's points on the map, and the ellipse of two standard deviations"),
        lasso=w.ToggleButton(description="Lasso", layout={"width": "64px"}, tooltip="Drag round training points, with "
                             "Ctrl to add, with Alt to remove; stays on. Or hold Shift and drag once"),
        pin=button("Pin", "Keep this test point, to compare it with another", lambda: pin(state)),
        undo=button("Undo", "Take back the last step", state.undo),
        redo=button("Redo", "Do again what was taken back", state.redo),
        clear=button("Clear", "Drop selection, pin, filters and search", lambda: clear(state)),
        cancel=button("Cancel", "Give up the computation of the map", cancel, "72px"),
    )
    for trait in ("k", "search", "misclassified_only", "ellipses"):
        link((state, trait), (getattr(c, trait), "value"))
    dlink((state, "pinned"), (c.pin, "description"), lambda pinned: "Pin" if pinned is None else "Unpin")
    c.cancel.layout.display = "none"
    dlink((state, "undoable"), (c.undo, "disabled"), lambda possible: not possible)
    dlink((state, "redoable"), (c.redo, "disabled"), lambda possible: not possible)
    box = w.HBox([one for each in vars(c).values() for one in (each.values() if isinstance(each, dict) else [each])])
    box.add_class("inb-toolbar")
    return box, c


def near(state, projection):
    """A slider for the neighbours that a projection looks at, there while it is chosen; it counts when let go of."""
    name, low, high, default = state.ranges[projection]
    slider = w.IntSlider(default, low, high, description=f"{name.capitalize()} of {projection}",
                         continuous_update=False, layout={"width": "150px"})

    def show(_=None):
        slider.value = state.near.get(projection, default)
        slider.layout.display = None if state.projection == projection else "none"

    def ask(change):
        if change.new != state.near.get(projection, default):
            state.near = {**state.near, projection: change.new}

    state.observe(show, ["near", "projection"])
    slider.observe(ask, "value")
    show()
    return slider


def pin(state):
    """Pin the test point shown, or take the pin away."""
    state.pinned = state.test_id if state.pinned is None else None


def clear(state):
    """Drop selection, pin, filters and search, in one step of undo."""
    with state.one_step():
        state.selected, state.pinned = [], None
        state.class_filter, state.search, state.misclassified_only = "", "", False
