"""Lessons in a real JupyterLab in a real browser: run top to bottom, controls moved by keyboard and
by mouse, nothing red anywhere."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ["00_first_taste", "02_forward"]
# the badge, the one picture of another host; nothing else may be said
HARMLESS = [r"colab\.research\.google\.com/assets/colab-badge\.svg"]
LAB_SETTINGS = {  # no pop-up over the page, and every cell in the page, also those out of sight
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    "notebook-extension/tracker": {"windowingMode": "none"},
}
READY = """() => {
    const k = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
    return k && k.connectionStatus === "connected" && k.status === "idle" }"""
CODE = """window.jupyterapp.shell.currentWidget.content.widgets.map((w) => w.model)
    .filter((m) => m.type === "code" && m.sharedModel.getSource().trim())"""
FAILED = """m.outputs.toJSON().filter((o) => o.output_type === "error")"""
DONE = f"""() => {{
    const cells = {CODE};
    return cells.every((m) => m.executionCount) || cells.some((m) => {FAILED}.length) }}"""
ERRORS = f"""() => {CODE}.flatMap((m) => {FAILED}
    .map((o) => m.sharedModel.getSource() + "\\n" + o.traceback.join("\\n")))"""
SUM = """async (image) => {
    const bytes = await (await fetch(image.src)).arrayBuffer();
    const sum = await crypto.subtle.digest("SHA-256", bytes);
    return [...new Uint8Array(sum)].map((b) => b.toString(16).padStart(2, "0")).join("") }"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_lab() -> list:
    "What `make lab` gives to Python."
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.search(r"^lab:.*\n\t.*\$\(PY\) (.+?) \$\(ARGS\)$", makefile, re.M)[1].split()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """JupyterLab as `make lab` starts it, over copies of some notebooks (it saves by itself); its
    state in a folder of its own."""
    if os.name == "nt":
        pytest.skip("the server is stopped by its process group")
    root = tmp_path_factory.mktemp("lab")
    (root / "nbs").mkdir()
    for name in ("index", *LESSONS):
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", root / "nbs")
    state, port = root / ".state", free_port()
    for name, settings in LAB_SETTINGS.items():
        path = state / "settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings), encoding="utf-8")
    drop = ("IN_TEST", "JUPYTER", "PYTHONDONTWRITEBYTECODE")
    env = {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {
        "JUPYTER_CONFIG_DIR": str(state / "config"),
        "JUPYTER_DATA_DIR": str(state / "data"),
        "JUPYTER_RUNTIME_DIR": str(state / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(state / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(state / "workspaces"),
        "IPYTHONDIR": str(state / "ipython"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "DDPM_COURSE_TIER": "ci",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        *make_lab(),
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(root / "server.log", "w") as log:
        server = subprocess.Popen(
            command, cwd=root, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=1).read()
                except OSError:
                    assert server.poll() is None and time.monotonic() < end, (
                        root / "server.log"
                    ).read_text()
                    time.sleep(0.1)
                else:
                    break
            yield f"http://127.0.0.1:{port}", state
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # the server and its kernels
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def opened(browser, url: str):
    "A page of the lab with a notebook in it, and the list in which complaints gather."
    page, complaints = browser.new_context(viewport=dict(width=1280, height=900)).new_page(), []
    page.on("pageerror", lambda e: complaints.append(f"exception: {e}"))
    page.on(
        "console",
        lambda m: (
            complaints.append(f"console: {m.text} ({m.location.get('url', '')})")
            if m.type == "error"
            else None
        ),
    )
    page.on(
        "request",
        lambda r: (
            complaints.append(f"asked another host: {r.url}")
            if re.match(r"\w+://(?!127\.0\.0\.1)", r.url)
            else None
        ),
    )
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
    return page, complaints


def serious(complaints: list) -> list:
    return [c for c in complaints if not any(re.search(h, c) for h in HARMLESS)]


def test_make_lab_opens_the_table_of_contents(lab, browser, shots):
    url, state = lab
    said = "".join(
        p.read_text(encoding="utf-8") for p in (state / "runtime").glob("jpserver-*-open.html")
    )  # where a browser is sent
    assert "/lab/tree/index.ipynb" in said, said
    page, complaints = opened(browser, f"{url}/lab/tree/index.ipynb")
    page.locator(".jp-RenderedMarkdown h1", has_text="ddpm_course").wait_for(timeout=30_000)
    lessons = page.locator(".jp-RenderedMarkdown a", has_text=re.compile(r"^\d\d"))
    assert lessons.count() >= len(list((ROOT / "nbs").glob("[01]*.ipynb")))
    page.screenshot(path=shots / "lab-index.png")
    lessons.first.click()  # a link to a lesson opens it here
    page.wait_for_function(
        "() => window.jupyterapp.shell.currentWidget?.title.label.startsWith('00_')", timeout=30_000
    )
    assert not serious(complaints), serious(complaints)
    page.context.close()


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_its_control_moves(lab, browser, shots, name):
    page, complaints = opened(browser, f"{lab[0]}/lab/tree/{name}.ipynb?reset")
    page.wait_for_function(READY, timeout=60_000)  # too early, and a dialog asks for a kernel
    # not awaited
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
    page.wait_for_function(DONE, timeout=180_000, polling=200)
    assert page.evaluate(ERRORS) == []

    control = (
        page.locator(".jp-OutputArea-output", has=page.locator(".noUi-handle"))
        .filter(has=page.locator("img"))
        .first
    )
    control.scroll_into_view_if_needed()
    handle, slider, image = (
        control.locator(".noUi-handle").first,
        control.locator(".noUi-target").first,
        control.locator("img"),
    )
    said = control.locator(".widget-readout").first
    image.first.wait_for(timeout=30_000)

    def changes(how):
        "Do it, and wait until another picture is there."
        before, text, end = image.first.evaluate(SUM), said.inner_text(), time.monotonic() + 20
        how()
        while image.first.evaluate(SUM) == before:
            assert time.monotonic() < end, (
                f"{how.__name__}: the readout went from {text} to {said.inner_text()}, the picture"
                " did not change"
            )
            page.wait_for_timeout(20)
        assert said.inner_text() != text and image.count() == 1  # pictures do not pile up

    def by_keyboard():
        handle.focus()
        page.keyboard.press("ArrowRight")

    def by_mouse():
        box, all_ = handle.bounding_box(), slider.bounding_box()
        y = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] / 2, y)
        page.mouse.down()
        page.mouse.move(all_["x"] + 0.8 * all_["width"], y, steps=5)
        page.mouse.up()

    changes(by_keyboard)
    changes(by_mouse)
    assert page.evaluate(ERRORS) == []
    page.screenshot(path=shots / f"lab-{name}.png")
    assert not serious(complaints), serious(complaints)
    page.context.close()
