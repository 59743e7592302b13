"""Fixtures of the browser tests: a front end's server, Chromium, and a place for screenshots."""

import os
from pathlib import Path

import pytest
from browse import FRONTENDS, Server, launched
from playwright.sync_api import sync_playwright


def pytest_addoption(parser):
    parser.addoption("--frontend", default="lab", choices=[*FRONTENDS, "all"],
                     help="where the browser tests run: lab (default), notebook, voila or all")


def pytest_generate_tests(metafunc):
    if "server" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--frontend", "lab")
        metafunc.parametrize("server", list(FRONTENDS) if chosen == "all" else [chosen], indirect=True, scope="module")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright, launched(playwright) as browser:
        yield browser


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    server = Server(request.param, tmp_path_factory.mktemp(request.param))
    yield server
    server.close()


@pytest.fixture(scope="session")
def shots(tmp_path_factory) -> Path:
    """Where screenshots go, for a person to look at: $SCREENSHOTS, or the temporary folder of this run."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
