"""A Jupyter server on loopback, a notebook of it in Chromium, and its kernel: what a reader meets."""

import ast
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from jupyter_client import BlockingKernelClient

ROOT = Path(__file__).parents[2]
# limits in ms, of the first widget, an answer, a page, and all cells of a notebook
FIRST, ROUND_TRIP, NAVIGATION, RUN = 90_000, 30_000, 60_000, 300_000
FLAGS = ["--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]

# front end -> how it starts, where it shows a notebook, and what it is known to do itself, with no notebook's doing
SERVER = ["--no-browser", "--ServerApp.allow_root=True", "--ServerApp.ip=127.0.0.1", "--ServerApp.password=",
          "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", "--ServerApp.port={port}",
          "--ServerApp.root_dir={folder}"]
FRONTENDS = {
    "lab": (["jupyterlab", "--LabApp.expose_app_in_browser=True", *SERVER], "lab/tree/{name}?reset"),
    "notebook": (["notebook", "--JupyterNotebookApp.expose_app_in_browser=True", *SERVER], "notebooks/{name}"),
    "voila": (["voila", "--no-browser", "--Voila.ip=127.0.0.1", "--port={port}",
               "--Voila.connection_dir_root={runtime}",
               # this extension of Notebook 7 has no place in Voila, and complains of it on every page
               "--VoilaConfiguration.extension_denylist=@jupyter-notebook/lab-extension", "{folder}"],
              "voila/render/{name}"),
}
OWN_ERRORS = {"notebook": "reading 'schema'"}  # Notebook 7.6.5 throws this once at load, with a clean config too
OWN_REQUESTS = {"voila": "cdn.jsdelivr.net"}   # Voila's page template asks there for Font Awesome; harmless offline


def chromium() -> str:
    """The path of Chromium: $CHROMIUM, the one on the path, or Debian's."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
    if not os.access(path, os.X_OK):
        raise FileNotFoundError(f"the browser tests need Chromium, expected at {path}: `apt install chromium`, or set "
                                "CHROMIUM to the path of one installed elsewhere")
    return path


@contextmanager
def launched(playwright):
    """Chromium without a head, with a fresh profile, that can resolve no name but loopback."""
    browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
    yield browser
    browser.close()


class Server:
    """A Jupyter server of one front end over `folder`, with settings, data and runtime files of its own in `home`."""

    def __init__(self, frontend, home):
        self.frontend, self.folder, self.runtime = frontend, home / "notebooks", home / "runtime"
        for name in ("notebooks", "runtime", "config/labconfig"):
            (home / name).mkdir(parents=True)
        news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}  # a pop-up over the page
        (home / "config/labconfig/page_config.json").write_text(json.dumps(news))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/", home / "server.log"
        own = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
               "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
               "IPYTHONDIR": "ipython", "MPLCONFIGDIR": "matplotlib"}
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, **{key: str(home / name) for key, name in own.items()}, "PYTHONPATH": python_path}
        command = [part.format(port=port, folder=self.folder, runtime=self.runtime) for part in FRONTENDS[frontend][0]]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen([sys.executable, "-m", *command], env=environment, cwd=self.folder,
                                            stdout=log, stderr=log, start_new_session=True)
        self.wait()

    def wait(self):
        deadline = time.monotonic() + NAVIGATION / 1000
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                return urllib.request.urlopen(self.url, timeout=5).close()
            except OSError:
                time.sleep(0.1)
        raise RuntimeError(f"the {self.frontend} server did not come up:\n{self.log.read_text()[-2000:]}")

    def close(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)

    def write(self, name, cells) -> Path:
        """Write a notebook of `cells` (strings of code) for this server to show."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.folder / name)
        return self.folder / name

    def kernels(self) -> set:
        return set(self.runtime.rglob("kernel-*.json"))


class Kernel:
    """A second client of the kernel that a page talks to, so that Python is asked behind the browser's back."""

    def __init__(self, connection_file):
        self.client = BlockingKernelClient(connection_file=str(connection_file))
        self.client.load_connection_file()
        self.client.start_channels(hb=False, iopub=False, stdin=False)

    def ask(self, expression, before="pass"):
        """The value of a Python `expression` in the kernel, by way of JSON, after the statements `before`."""
        answer = {"answer": f"__import__('json').dumps({expression}, default=lambda a: a.tolist())"}
        reply = self.client.execute(before, store_history=False, user_expressions=answer, reply=True,
                                    timeout=ROUND_TRIP / 1000)["content"]
        if reply["status"] != "ok" or reply["user_expressions"]["answer"]["status"] != "ok":
            raise RuntimeError(f"{expression}: {reply.get('evalue') or reply['user_expressions']['answer']['evalue']}")
        return json.loads(ast.literal_eval(reply["user_expressions"]["answer"]["data"]["text/plain"]))

    def becomes(self, expression, value):
        """Ask until the answer is `value`: what the browser says reaches the kernel by another way than this."""
        deadline = time.monotonic() + ROUND_TRIP / 1000
        while (answer := self.ask(expression)) != value:
            assert time.monotonic() < deadline, f"{expression} is {answer}, expected {value}"
            time.sleep(0.03)  # each question makes the page busy too


class Watch:
    """Every error of a page, and every request that it makes to anywhere but loopback."""

    def __init__(self, page, frontend=None):
        self.errors, self.elsewhere, self.requests = [], [], []
        self.own_error, self.own_request = OWN_ERRORS.get(frontend), OWN_REQUESTS.get(frontend)
        page.on("pageerror", lambda error: self.error(f"page error: {error}", ""))
        page.on("console", lambda said: said.type == "error" and self.error(f"console: {said.text}",
                                                                            said.location.get("url", "")))
        page.on("request", lambda request: self.request(request.url))
        page.on("websocket", lambda socket: self.request(socket.url))

    def error(self, text, url):
        own_error = self.own_error and self.own_error in text
        own_request = self.own_request and urlsplit(url).hostname == self.own_request
        if not (own_error or own_request):
            self.errors.append(f"{text} {url}".strip())

    def request(self, url):
        self.requests.append(url)
        host = urlsplit(url).hostname
        if urlsplit(url).scheme in ("http", "https", "ws", "wss") and host not in ("127.0.0.1", self.own_request):
            self.elsewhere.append(url)

    def check(self):
        """Raise AssertionError where the page, since the last check, threw, complained or asked off this computer."""
        errors, self.errors = self.errors, []
        assert not errors, "\n".join(errors)
        assert not self.elsewhere, f"requests off loopback: {self.elsewhere}"


RUN_ALL = """async (limit) => {
    const app = window.jupyterapp, panel = app.shell.currentWidget;
    const late = new Promise((_, reject) => setTimeout(() => reject(new Error(`runs for over ${limit} ms`)), limit));
    await Promise.race([app.commands.execute("notebook:run-all-cells"), late]);
    return panel.content.model.toJSON().cells.flatMap(cell => cell.outputs || [])
        .filter(output => output.output_type === "error").map(output => output.ename + ": " + output.evalue);
}"""
IDLE = """() => {
    const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return kernel?.status === "idle" && kernel.connectionStatus === "connected";
}"""


@contextmanager
def opened(browser, server, name, size=(1400, 1200)):
    """Open the notebook `name` of `server`, run all its cells, and yield (page, kernel, watch) with no error so far."""
    before, context = server.kernels(), browser.new_context(viewport=dict(zip(("width", "height"), size)))
    page = context.new_page()
    page.set_default_timeout(ROUND_TRIP)
    watch = Watch(page, server.frontend)
    page.goto(server.url + FRONTENDS[server.frontend][1].format(name=name), timeout=NAVIGATION, wait_until="commit")
    if server.frontend != "voila":
        page.wait_for_function(IDLE, timeout=NAVIGATION)
        failed = page.evaluate(RUN_ALL, RUN)
        assert not failed, failed
    limit = RUN if server.frontend == "voila" else FIRST  # Voila runs the cells itself, and shows the page when it has
    page.wait_for_selector(":is(.inb-cloud, .inb-desk)[data-ready='1']", state="attached", timeout=limit)
    kernel = Kernel((server.kernels() - before).pop())
    yield page, kernel, watch
    kernel.client.stop_channels()
    context.close()


def themed(page, frontend, theme):
    """Change the page's theme; Voila, which has one only when it makes the page, is given the colours of the other."""
    if frontend != "voila":
        change = "(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})"
        page.evaluate(change, f"JupyterLab {theme}")
        # JupyterLab covers the page while it changes, and throws where the next change begins before the cover is off
        return page.wait_for_function("""(theme) => document.body.dataset.jpThemeName === theme
            && !document.getElementById("jupyterlab-splash")""", arg=f"JupyterLab {theme}", timeout=ROUND_TRIP)
    ground, ink = ("#111111", "#eeeeee") if theme == "Dark" else ("#ffffff", "#111111")
    page.evaluate("""([ground, ink]) => {
        document.documentElement.style.setProperty("--jp-layout-color0", ground);
        document.documentElement.style.setProperty("--jp-content-font-color1", ink);
        document.body.style.background = ground;
        document.body.dataset.jpThemeLight = ground === "#ffffff";
    }""", [ground, ink])
