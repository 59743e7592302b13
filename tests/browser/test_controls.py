"""The explorer's controls, by mouse and keyboard: what they change is what Python says; what Python sets is shown."""

import numpy as np
from playwright.sync_api import expect

from .problems import START, K, top


def test_the_method_is_changed_by_keyboard(explorer):
    view, kernel = explorer
    before = view.asked(START)
    view.control("Method").focus()
    view.page.keyboard.press("ArrowDown")
    kernel.becomes("explorer.state.method", "nearness")
    expected = top(kernel, START, "nearness")
    view.shows(view.map, helpful=",".join(map(str, expected[0])))
    assert view.asked(START) == expected != before
    view.page.keyboard.press("ArrowUp")
    view.shows(view.map, helpful=",".join(map(str, before[0])))


def test_a_method_that_must_be_asked_answers_through_the_kernel(explorer):
    view, kernel = explorer
    view.control("Method").select_option("asked")
    view.shows(view.map, helpful=",".join(map(str, top(kernel, START)[1])))    # its sign is the other one
    view.click("test", 21)
    helpful, harmful = top(kernel, 21)
    assert view.asked(21) == (harmful, helpful)


def test_hidden_points_are_neither_picked_nor_lassoed(explorer):
    view, kernel = explorer
    wrong = kernel.ask("task.mistakes()")
    right = next(i for i in range(60) if i not in wrong and i != START)
    view.control("misclassified only").check()
    kernel.becomes("explorer.state.misclassified_only", True)
    view.hides("test", right)
    assert view.visible("test", range(60)) == wrong
    view.click("test", right)
    assert view.asked(START) == top(kernel, START) and kernel.ask("explorer.test_id") == START
    view.click("test", wrong[0])
    assert view.asked(wrong[0]) == top(kernel, wrong[0])

    view.control("misclassified only").uncheck()
    view.control("Class").select_option("four")
    labels = np.array(kernel.ask("train.y"))
    view.hides("train", int(np.flatnonzero(labels != 4)[0]))
    assert view.visible("train", range(400)) == np.flatnonzero(labels == 4).tolist()
    corners = view.kidney()
    view.drag(corners, key="Shift")
    kernel.becomes("explorer.selected", [i for i in view.within(kernel.ask("train_xy"), corners) if labels[i] == 4])


def test_search_finds_ids_and_classes(explorer):
    view, kernel = explorer
    view.control("Search ids, classes, text").fill("seven")
    view.page.keyboard.press("Enter")
    labels = np.array(kernel.ask("train.y"))
    view.hides("train", int(np.flatnonzero(labels != 7)[0]))
    assert view.visible("train", range(400)) == np.flatnonzero(labels == 7).tolist()
    view.control("Search ids, classes, text").fill("#33")
    view.page.keyboard.press("Enter")
    assert view.asked(33) == top(kernel, 33)
    assert view.visible("train", range(400)) == [33]


def test_undo_takes_back_a_click_and_redo_does_it_again(explorer):
    view, kernel = explorer
    for test_id in (11, 12):
        view.click("test", test_id)
        view.asked(test_id)
        kernel.becomes("explorer.test_id", test_id)
    for test_id in (11, START):
        view.button("Undo").click()
        assert view.asked(test_id) == top(kernel, test_id)
    expect(view.button("Undo")).to_be_disabled()
    view.button("Redo").click()
    assert view.asked(11) == top(kernel, 11)
    kernel.becomes("explorer.test_id", 11)


def test_a_pinned_point_stays_beside_the_next_one(explorer):
    view, kernel = explorer
    view.button("Pin").click()
    kernel.becomes("explorer.state.pinned", START)
    view.click("test", 44)
    view.asked(44)
    blocks = view.gallery.locator(".inb-block")
    expect(blocks).to_have_count(2)
    for block, test_id in zip(blocks.all(), (44, START)):
        for side, expected in zip(("helpful", "harmful"), top(kernel, test_id)):
            cards = block.locator(f".inb-{side} [data-id]")
            expect(cards).to_have_count(len(expected))
            assert [int(i) for i in cards.evaluate_all("all => all.map((card) => card.dataset.id)")] == expected
    view.button("Unpin").click()
    expect(blocks).to_have_count(1)


def test_the_number_of_neighbours_is_changed_by_keyboard(explorer):
    view, kernel = explorer
    view.root.locator(".inb-toolbar [role=slider]").focus()
    view.page.keyboard.press("ArrowLeft")
    kernel.becomes("explorer.state.k", K - 1)
    helpful, harmful = top(kernel, START)
    view.shows(view.map, helpful=",".join(map(str, helpful[:K - 1])), harmful=",".join(map(str, harmful[:K - 1])))


def test_the_last_word_of_python_counts(explorer):
    view, kernel = explorer
    kernel.ask("None", before="for i in (4, 5, 6, 7): explorer.select(i)")
    kernel.becomes("explorer.test_id", 7)
    assert view.asked(7) == top(kernel, 7)
    kernel.ask("None", before="explorer.select(8); explorer.select(None)")
    assert view.asked(None) == ([], [])
    kernel.becomes("[explorer.test_id, explorer.helpful]", [None, []])
