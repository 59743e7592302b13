"""Fixtures of the browser tests: a front end's server, Chromium, explorers to play with, a place for screenshots."""

import os
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from .browse import FRONTENDS, Server, launched, opened
from .problems import DIGITS, SENTENCES, START
from .view import View


def pytest_addoption(parser):
    parser.addoption("--frontend", default="lab", choices=[*FRONTENDS, "all"],
                     help="where the browser tests run: lab (default), notebook, voila or all")


def pytest_generate_tests(metafunc):
    if "server" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--frontend", "lab")
        frontends = list(FRONTENDS) if chosen == "all" else [chosen]
        metafunc.parametrize("server", frontends, indirect=True, scope="package")


@pytest.fixture(scope="package")
def browser():
    with sync_playwright() as playwright, launched(playwright) as browser:
        yield browser


@pytest.fixture(scope="package")
def server(request, tmp_path_factory):
    server = Server(request.param, tmp_path_factory.mktemp(request.param))
    yield server
    server.close()


@pytest.fixture(scope="package")
def digits(browser, server):
    """An explorer of 400 training and 60 test digits, and below it one of sentences: (view, kernel, watch)."""
    server.write("explorers.ipynb", DIGITS + SENTENCES)
    with opened(browser, server, "explorers.ipynb") as (page, kernel, watch):
        yield View(page), kernel, watch


@pytest.fixture
def explorer(digits):
    """The explorer as at the start, test point 3 asked about: (view, kernel). Then: no error, no request elsewhere."""
    view, kernel, watch = digits
    view.page.mouse.move(5, 5)
    kernel.ask("None", before="explorer.controls.lasso.value = False; explorer.select(59)")
    view.asked(59)
    kernel.ask("None", before="explorer.state.from_json(start)")  # that of a fresh explorer, with nothing asked
    view.asked(None)
    kernel.ask("None", before=f"explorer.select({START}); explorer.state.forget()")
    view.asked(START)
    yield view, kernel
    watch.check()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where screenshots go, for a person to look at: $SCREENSHOTS, or the temporary folder of this run."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
