"""The controls without a kernel, in a real browser: keyboard, mouse, menus, play, a click into the
picture, a picture of the reader's own.

The live face is tested in notebook 90, and moved in JupyterLab in test_lab."""

import io
import re
import shutil
import time
from html import escape

import pytest
import torch
from PIL import Image

from ddpm_course.widgets import Explore, attention_viewer, noise_slider, still_html

CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))),
    None,
)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):  # opened(control) -> a page with nothing else; an error on it fails the test
    context, wrong = browser.new_context(), []

    def open_(e):
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on(
            "request",
            lambda r: (
                wrong.append(r.url) if not r.url.startswith(("data:", "about:", "blob:")) else None
            ),
        )
        page.set_content(
            "<!doctype html><html"
            f" lang=en><title>control</title><main><h1>control</h1>{still_html(e)}</main></html>"
        )
        return page

    yield open_
    context.close()
    assert not wrong


def outputs(e, monkeypatch) -> list:
    "What a cell that ends with this control shows where a kernel runs: MIME type -> content."
    from IPython.core.formatters import DisplayFormatter

    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.delenv("DDPM_COURSE_STILL", raising=False)
    assert DisplayFormatter().format(e) == ({}, {})  # all has been shown already
    return shown


def frame_of_outputs(browser, shown: list):
    """A page that holds the outputs of a cell as Colab does: in a sandboxed frame, where nothing
    answers to a widget. Returns the page and the frame."""
    # the model of a widget is no HTML
    html = "".join(f"<div>{data.get('text/html', '')}</div>" for data in shown)
    page = browser.new_page()
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.set_content(f'<iframe sandbox="allow-scripts" srcdoc="{escape(html)}"></iframe>')
    return page, page.frame_locator("iframe")


def shows(page, e, **settings):  # waits until the picture is that of these settings
    import base64

    wanted = "data:image/png;base64," + base64.b64encode(e.picture(**settings)).decode()
    page.wait_for_function(
        "wanted => document.querySelector('figure img').src === wanted", arg=wanted, timeout=20_000
    )
    assert all(f"{k} = " in page.locator("figure img").get_attribute("alt") for k in settings)


def levels(level, colour="grey"):
    return torch.full((1, 1 if colour == "grey" else 3, 8, 8), level) + torch.linspace(
        0, 0.4 if colour == "grey" else 0.2, 8
    )


@pytest.fixture
def simple():
    return Explore(
        levels,
        level=[-1.0, -0.5, 0.0, 0.5],
        colour=["grey", "rgb"],
        start=dict(level=-0.5),
        play=True,
    )


def test_the_same_settings_show_the_same_picture_on_both_faces(opened, simple):
    page = opened(simple)
    slider, menu = page.locator("input[type=range]"), page.locator("select")
    shows(page, simple, level=-0.5, colour="grey")
    slider.focus()
    page.keyboard.press("ArrowRight")
    shows(page, simple, level=0.0, colour="grey")
    assert slider.get_attribute("aria-valuetext") == "0" == page.locator("output").inner_text()
    page.keyboard.press("End")
    shows(page, simple, level=0.5, colour="grey")
    menu.select_option(label="rgb")
    shows(page, simple, level=0.5, colour="rgb")
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    shows(page, simple, level=-1.0, colour="rgb")


def test_without_a_widget_manager_the_other_face_appears_and_moves(browser, simple, monkeypatch):
    live, other = outputs(simple, monkeypatch)
    assert live.keys() == {"text/plain", "application/vnd.jupyter.widget-view+json"}
    assert other.keys() == {"text/html", "image/png"}
    page, frame = frame_of_outputs(browser, [live, other])
    figure, began = frame.locator("figure"), time.monotonic()
    figure.wait_for(state="attached")
    assert figure.is_hidden()
    figure.wait_for(state="visible", timeout=20_000)
    assert 1.0 < time.monotonic() - began < 10  # two seconds, later on a busy machine
    before = frame.locator("figure img").get_attribute("src")
    frame.locator("input[type=range]").focus()
    page.keyboard.press("End")
    frame.locator("figure img[alt^='level = 0.5']").wait_for(timeout=20_000)
    assert frame.locator("figure img").get_attribute("src") != before
    # the live control comes late: it takes over
    mark = re.search(r"'\.(explore-\w+)'", other["text/html"])[1]
    frame.locator("body").evaluate("(body, mark) => body.classList.add(mark)", mark)
    figure.wait_for(state="hidden", timeout=20_000)
    page.close()


def test_where_the_live_control_answers_the_other_face_stays_hidden(browser, simple, monkeypatch):
    shown = outputs(simple, monkeypatch)
    mark = re.search(r"'\.(explore-\w+)'", shown[1]["text/html"])[1]
    page, frame = frame_of_outputs(browser, [{"text/html": f"<p class={mark}>live</p>"}, *shown])
    frame.locator("p").wait_for()
    page.wait_for_timeout(2500)
    assert frame.locator("figure").is_hidden()
    page.close()


@pytest.mark.parametrize(
    "name, face", [("IN_TEST", "image/png"), ("DDPM_COURSE_STILL", "text/html")]
)
def test_one_output_where_no_reader_is(simple, monkeypatch, name, face):
    from IPython.core.formatters import DisplayFormatter

    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.delenv("DDPM_COURSE_STILL", raising=False)
    monkeypatch.setenv(name, "1")
    assert face in DisplayFormatter().format(simple)[0]


def test_play_runs_and_pauses(opened, simple):
    page = opened(simple)
    slider, button = page.locator("input[type=range]"), page.get_by_role("button", name="play")
    before = slider.input_value()
    button.click()
    page.wait_for_function(
        "before => document.querySelector('input').value !== before", arg=before, timeout=20_000
    )
    page.get_by_role("button", name="pause").click()
    stopped = slider.input_value()
    page.wait_for_timeout(400)
    assert slider.input_value() == stopped


def test_a_click_into_the_picture_chooses_a_pixel(opened):
    weights = torch.rand(2, 4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    e = attention_viewer(
        torch.linspace(-1, 1, 256).view(16, 16), {"4 x 4": weights}, name="clicked"
    )
    page = opened(e)
    box = page.locator("figure img").bounding_box()
    for part in (0, 0.5):  # in either of the two pictures
        for row, col in ((2, 14), (10, 6)):
            page.mouse.click(
                box["x"] + box["width"] * (part + (col + 0.5) / 32),
                box["y"] + box["height"] * (row + 0.5) / 16,
            )
            shows(page, e, level="4 x 4", head=0, row=row, col=col)


def test_a_picture_of_ones_own_is_noised_on_the_page(opened):
    e = noise_slider(
        torch.zeros(2, 1, 16, 16), ts=[0, 500, 1000], still=[0, 500, 1000], t=0, name="own"
    )
    page = opened(e)
    choose, canvas, said = (
        page.locator("input[type=file]"),
        page.locator("canvas"),
        page.locator("[role=status]"),
    )
    choose.set_input_files(dict(name="notes.txt", mimeType="text/plain", buffer=b"no picture"))
    page.wait_for_function("document.querySelector('[role=status]').textContent")
    assert re.search("not a picture", said.inner_text()) and canvas.is_hidden()
    file = io.BytesIO()
    Image.new("RGB", (90, 50), (200, 100, 50)).save(file, "PNG")
    choose.set_input_files(dict(name="photo.png", mimeType="image/png", buffer=file.getvalue()))
    canvas.wait_for(state="visible")
    pixels = (
        "() => { const c = document.querySelector('canvas'), d = c.getContext('2d').getImageData(0,"
        " 0, c.width, c.height).data; return [...d] }"
    )

    def rgb():
        return torch.tensor(page.evaluate(pixels)).view(-1, 4)[:, :3].float()

    assert (
        said.inner_text() == "" and (rgb() - torch.tensor([200.0, 100, 50])).abs().max() <= 1
    )  # t = 0: nothing is added
    page.locator("input[type=range]").focus()
    page.keyboard.press("End")
    for _ in range(200):  # as long as a busy machine needs
        if rgb().std() > 60:
            break
        page.wait_for_timeout(50)
    # t = 1000: the picture is gone
    assert rgb().std() > 60 and (rgb().mean(0) - 127.5).abs().max() < 8


def test_no_serious_barrier(opened):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(noise_slider(torch.zeros(2, 1, 16, 16), still=[0, 500, 1000], name="axe"))
    found = [
        v for v in Axe().run(page).response["violations"] if v["impact"] in ("serious", "critical")
    ]
    assert not found, [(v["id"], v["nodes"][0]["html"][:200]) for v in found]
