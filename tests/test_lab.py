"""Lessons in a real JupyterLab in a real browser: run top to bottom, controls moved by keyboard and
by mouse, nothing red anywhere. Each kind of control is moved in JupyterLab 4 with ipywidgets 8, and
in JupyterLab 3 with the ipywidgets 7 that Colab has."""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from colab_env import colab_environment  # noqa: E402

LESSONS = ["00_first_taste", "02_forward"]
CONTROLS = """
import IPython, ipywidgets, torch
print("with", IPython.__version__, ipywidgets.__version__)
from tqdm.auto import tqdm
from ddpm_course.widgets import explore, noise_slider
for _ in tqdm(range(3), desc="counting"): pass

def drawn(level, ink, row=0):
    image = torch.full((1, 1, 8, 8), level) + torch.linspace(0, 0.2, 8)
    return image + row / 10 + dict(thin=0.0, thick=0.3)[ink]
explore(drawn, level=[-1.0, -0.6, -0.2, 0.2, 0.6], ink=["thin", "thick"], play=True, name="moved")

explore(
    lambda row, col: drawn(col / 4, "thin", row),
    row=range(4), col=range(4), click=("col", "row"), name="clicked",
)

noise_slider(torch.zeros(1, 1, 16, 16), ("linear",), ts=[0, 500], t=0, name="uploaded")
""".strip()  # cells, with an empty line between them
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
LAB = "(window.jupyterapp ?? window.jupyterlab)"  # 4, 3
READY = f"""() => {{
  const kernel = {LAB}?.shell.currentWidget?.sessionContext?.session?.kernel;
  return kernel && kernel.connectionStatus === "connected" && kernel.status === "idle";
}}"""
CODE = f"""{LAB}.shell.currentWidget.content.widgets.map((w) => w.model)
  .filter((m) => m.type === "code" && m.sharedModel.getSource().trim())"""
FAILED = '(o) => o.output_type === "error"'
DONE = f"""() => {{
  const cells = {CODE};
  return cells.every((m) => m.executionCount)
    || cells.some((m) => m.outputs.toJSON().some({FAILED}));
}}"""
ERRORS = f"""() => {CODE}.flatMap((m) => m.outputs.toJSON().filter({FAILED})
  .map((o) => m.sharedModel.getSource() + "\\n" + o.traceback.join("\\n")))"""
SUM = """async (image) => {
  const bytes = await (await fetch(image.src)).arrayBuffer();
  const sum = await crypto.subtle.digest("SHA-256", bytes);
  return [...new Uint8Array(sum)].map((b) => b.toString(16).padStart(2, "0")).join("");
}"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def make_lab() -> list:
    "What `make lab` gives to Python."
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.search(r"^lab:.*\n\t.*\$\(PY\) (.+?) \$\(ARGS\)$", makefile, re.M)[1].split()


def notebook(cells: str) -> str:
    import nbformat

    code = [nbformat.v4.new_code_cell(source) for source in cells.split("\n\n")]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return nbformat.writes(nbformat.v4.new_notebook(cells=code, metadata=dict(kernelspec=kernel)))


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    "JupyterLab as `make lab` starts it, over copies of some notebooks (it saves by itself)."
    root = tmp_path_factory.mktemp("lab")
    with served(root, sys.executable, LAB_SETTINGS) as url:
        yield url


@pytest.fixture(scope="module")
def colab(browser, tmp_path_factory):
    "JupyterLab 3 with Colab's ipywidgets, IPython and ipykernel; torch and the rest from here."
    try:
        python = colab_environment()
    except ConnectionError as e:
        pytest.skip(str(e))
    root = tmp_path_factory.mktemp("colab")
    startup = root / ".state/ipython/profile_default/startup"
    startup.mkdir(parents=True)
    # behind what that environment has itself
    here = [str(ROOT), sysconfig.get_path("purelib")]
    (startup / "here.py").write_text(f"import sys; sys.path += {here}", encoding="utf-8")
    with served(root, str(python), {}) as url:
        yield url


@contextlib.contextmanager
def served(root: Path, python: str, lab_settings: dict):
    "JupyterLab over this folder; its state in a folder of its own. Gives its address, and that."
    if os.name == "nt":
        pytest.skip("the server is stopped by its process group")
    (root / "nbs").mkdir()
    for name in ("index", *LESSONS):
        shutil.copy(ROOT / "nbs" / f"{name}.ipynb", root / "nbs")
    (root / "nbs/controls.ipynb").write_text(notebook(CONTROLS), encoding="utf-8")
    state, port = root / ".state", free_port()
    written = {
        f"settings/@jupyterlab/{name}.jupyterlab-settings": settings
        for name, settings in lab_settings.items()
    }
    written["config/labconfig/page_config.json"] = {"exposeAppInBrowser": True}
    for name, content in written.items():
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text(json.dumps(content), encoding="utf-8")
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
        python,
        *make_lab(),
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
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
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
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


def run_all(browser, url: str, name: str):
    "A page with this notebook, run, and the list of complaints."
    page, complaints = opened(browser, f"{url}/lab/tree/{name}.ipynb?reset")
    page.wait_for_function(READY, timeout=60_000)  # too early, and a dialog asks for a kernel
    # not awaited
    page.evaluate(f"() => {{ {LAB}.commands.execute('notebook:run-all-cells') }}")
    page.wait_for_function(DONE, timeout=180_000, polling=200)
    assert page.evaluate(ERRORS) == []
    return page, complaints


class Control:
    "A live control on a page, and what a reader does with it."

    def __init__(self, page, output):
        self.page = page
        self.image = output.locator("img.widget-image")
        self.handles = output.locator(".noUi-handle, .ui-slider-handle")  # ipywidgets 8, 7
        self.sliders = output.locator(".noUi-target, .ui-slider")
        self.readouts = output.locator(".widget-readout")
        self.output = output
        self.image.first.wait_for(timeout=30_000)

    def changes(self, how):
        "Do it, and wait until another picture is there."
        before, end = self.image.evaluate(SUM), time.monotonic() + 20
        how()
        while self.image.evaluate(SUM) == before:
            assert time.monotonic() < end, f"{how.__name__}: the picture did not change"
            self.page.wait_for_timeout(20)
        assert self.image.count() == 1  # pictures do not pile up

    def slides(self, how):
        "Do it; the picture and what stands beside the slider change."
        before = self.readouts.first.inner_text()
        self.changes(how)
        assert self.readouts.first.inner_text() != before

    def by_keyboard(self):
        self.handles.first.focus()
        self.page.keyboard.press("ArrowRight")

    def by_mouse(self):
        self.sliders.first.scroll_into_view_if_needed()
        box, all_ = self.handles.first.bounding_box(), self.sliders.first.bounding_box()
        y = box["y"] + box["height"] / 2
        self.page.mouse.move(box["x"] + box["width"] / 2, y)
        self.page.mouse.down()
        self.page.mouse.move(all_["x"] + 0.8 * all_["width"], y, steps=5)
        self.page.mouse.up()

    def by_menu(self):
        self.output.locator("select").select_option(label="thick")

    def by_play(self):
        self.output.locator(".widget-play button").first.click()

    def by_click(self):
        self.image.scroll_into_view_if_needed()
        box = self.image.bounding_box()
        self.page.mouse.click(box["x"] + 0.9 * box["width"], box["y"] + 0.6 * box["height"])

    def by_file(self):
        file = io.BytesIO()
        Image.new("RGB", (90, 50), (200, 100, 50)).save(file, "PNG")
        self.choose("photo.png", file.getvalue())

    def choose(self, name: str, data: bytes):
        with self.page.expect_file_chooser() as chooser:
            self.output.get_by_role("button", name="a picture of your own").click()
        chooser.value.set_files(dict(name=name, mimeType="image/png", buffer=data))


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_runs_and_its_control_moves(lab, browser, shots, name):
    page, complaints = run_all(browser, lab[0], name)
    output = page.locator(".jp-OutputArea-output", has=page.locator(".noUi-handle"))
    control = Control(page, output.filter(has=page.locator("img")).first)
    control.slides(control.by_keyboard)
    control.slides(control.by_mouse)
    assert page.evaluate(ERRORS) == []
    page.screenshot(path=shots / f"lab-{name}.png")
    assert not serious(complaints), serious(complaints)
    page.context.close()


@pytest.mark.parametrize(
    "which, versions",
    [("lab", r"with \d+\.\S+ 8\."), ("colab", r"with 7\.34\.0 7\.7\.1")],
    ids=["lab", "colab"],
)
def test_every_kind_of_control(which, versions, request, browser, shots):
    page, complaints = run_all(browser, request.getfixturevalue(which)[0], "controls")
    assert re.search(versions, page.locator(".jp-OutputArea-output").first.inner_text())
    bar = page.locator(".widget-hbox", has=page.locator(".widget-hprogress")).first
    bar.wait_for(timeout=30_000)
    assert re.search(r"counting.*100%.*3/3", bar.inner_text().replace("\n", " "))

    outputs = page.locator(".jp-OutputArea-output", has=page.locator(".explore-live"))
    moved, clicked, uploaded = (Control(page, outputs.nth(i)) for i in range(3))
    moved.slides(moved.by_keyboard)
    moved.slides(moved.by_mouse)
    moved.changes(moved.by_menu)
    moved.changes(moved.by_play)
    clicked.changes(clicked.by_click)
    assert clicked.readouts.all_inner_texts() == ["2", "3"]
    uploaded.changes(uploaded.by_file)
    uploaded.choose("notes.png", b"no picture")
    uploaded.output.locator("[role=alert]", has_text="not a picture").wait_for(timeout=20_000)

    page.wait_for_timeout(2500)  # by now the other face would be there
    waiting = page.locator(".jp-OutputArea-child", has=page.locator("figure.explore"))
    assert waiting.count() == 3
    assert [waiting.nth(i).bounding_box()["height"] for i in range(3)] == [0] * 3
    page.screenshot(path=shots / f"{which}-controls.png")
    assert not serious(complaints), serious(complaints)
    page.context.close()
