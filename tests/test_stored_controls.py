"""The controls that the lessons store: each works where no kernel answers, and every lesson has
one."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ddpm_course.widgets import LIMIT

CONTROL = re.compile(
    r"^(explore|noise_slider|schedule_designer|scrubber|guidance_grid|particles|attention_viewer|ema_horizon)\(",
    re.M,
)
LESSONS = sorted(
    p
    for p in (Path(__file__).resolve().parent.parent / "nbs").glob("[0-9]*.ipynb")
    if int(p.stem[:2]) < 17
)


class Page(HTMLParser):
    """The parts of a control: its picture, where each setting stands, how many values each has, and
    the data."""

    def __init__(self, html):
        super().__init__()
        self.image, self.at, self.counts, self.text, self.hosts = {}, [], [], "", []
        self.feed(html)
        self.data = json.loads(self.text)

    def handle_starttag(self, tag, attrs):
        a, self.inside = dict(attrs), tag
        self.hosts += [
            v for k, v in attrs if k in ("src", "href") and not (v or "").startswith("data:")
        ]
        if tag == "img":
            self.image = a
        if tag == "select" and "data-setting" in a:
            self.at.append(0)
            self.counts.append(0)
        if tag == "input" and "data-setting" in a:
            self.at.append(int(a["value"]))
            self.counts.append(int(a["max"]) + 1)
        if tag == "option":
            if "selected" in a:
                self.at[-1] = self.counts[-1]
            self.counts[-1] += 1

    def handle_data(self, data):
        if self.inside == "script":
            self.text += data

    def handle_endtag(self, tag):
        self.inside = None


def faults(html):
    "What is wrong with a stored control, in words."
    page, found = Page(html), []
    names, values, order, frames = (page.data[k] for k in ("names", "values", "order", "frames"))
    if len(html) > LIMIT:
        found.append(f"{len(html) / 1e6:.2f} MB")
    if page.hosts:
        found.append(f"needs {page.hosts}")
    if page.counts != [len(v) for v in values] or len(names) != len(values):
        found.append(f"controls with {page.counts} values for {[len(v) for v in values]}")
    if len(order) != math.prod(len(v) for v in values) or set(order) != set(range(len(frames))):
        found.append("settings without a picture, or pictures without settings")
    if len(set(frames)) < 2:
        found.append("nothing changes")
    if any(len(set(v)) < len(v) for v in values):
        found.append("two values look the same")
    images = [Image.open(io.BytesIO(base64.b64decode(f)), formats=["PNG"]) for f in frames]
    for image in images:
        image.load()
    if len({i.size for i in images}) > 1:
        found.append(f"pictures of sizes {sorted({i.size for i in images})}")
    if any(i.convert("RGB").getcolors(1) for i in images):  # None if there are more
        found.append("an empty picture")
    first = 0
    for v, i in zip(values, page.at):
        first = first * len(v) + i
    if not found and page.image["src"] != "data:image/png;base64," + frames[order[first]]:
        found.append("the first picture is not that of the first settings")
    if page.image.get("alt") != ", ".join(
        f"{k} = {v[i]}" for k, v, i in zip(names, values, page.at)
    ):
        found.append("the picture's description is not that of the first settings")
    return found


def controls(notebook):
    "Cells that show a control, and the pages stored for them."
    cells = [
        c
        for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code" and CONTROL.search("".join(c["source"]))
    ]
    pages = [
        "".join(o["data"]["text/html"])
        for c in cells
        for o in c["outputs"]
        if 'class="explore"' in "".join(o.get("data", {}).get("text/html", ""))
    ]
    return cells, pages


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_a_lesson_has_controls_that_work_without_a_kernel(lesson):
    cells, pages = controls(lesson)
    assert cells, "nothing to move: end a cell with explore(...)"
    assert len(pages) == len(
        cells
    ), f"{len(cells)} controls, {len(pages)} stored: make outputs NB=nbs/{lesson.name}"
    found = [faults(page) for page in pages]
    assert not any(found), found


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_one_kind_of_control(lesson):
    assert "ipywidgets" not in lesson.read_text(
        encoding="utf-8"
    ), "explore of widgets makes both faces"


@pytest.fixture
def page():
    import torch

    from ddpm_course.widgets import Explore, still_html

    def draw(level, ink, form):
        return torch.cat(
            [
                torch.full((1, 1, 8, 8), level),
                torch.full((1, 1, 8, 8), dict(full=1.0, half=0.5)[ink]),
            ]
        ).repeat(form, 1, 1, 1)

    return still_html(
        Explore(
            draw,
            level=[-1.0, 0.0, 0.25],
            ink=["full", "half"],
            form=[1, 2],
            still=dict(form=[1]),
            start=dict(level=0.25, ink="half"),
            name="faultless",
        )
    )


def test_a_good_control_has_no_faults(page):
    assert faults(page) == []
    assert Page(page).at == [2, 1, 0] and Page(page).counts == [3, 2, 1]


def change(page, **parts):
    data = Page(page).data
    return page.replace(json.dumps(data), json.dumps(data | {k: f(data) for k, f in parts.items()}))


def blank(size):
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "said, spoil",
    {
        "1.0": lambda p: p + " " * LIMIT,
        "needs": lambda p: p.replace("<img", '<img src="https://example.org/a.png"><img'),
        "controls with": lambda p: p.replace('max="2"', 'max="3"'),
        "without a picture": lambda p: change(p, order=lambda d: d["order"][:-1]),
        "nothing changes": lambda p: change(
            p, order=lambda d: [0] * 6, frames=lambda d: d["frames"][:1]
        ),
        "look the same": lambda p: change(p, values=lambda d: [["0", "0", "1"], *d["values"][1:]]),
        "of sizes": lambda p: change(p, frames=lambda d: [blank((3, 3)), *d["frames"][1:]]),
        "an empty picture": lambda p: change(
            p,
            frames=lambda d: [
                blank(Image.open(io.BytesIO(base64.b64decode(d["frames"][1]))).size),
                *d["frames"][1:],
            ],
        ),
        "the first picture": lambda p: change(p, order=lambda d: d["order"][::-1]),
        "description": lambda p: p.replace('alt="level', 'alt="ink'),
    }.items(),
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_each_fault_is_found(page, said, spoil):
    spoiled = spoil(page)
    assert spoiled != page and any(said in f for f in faults(spoiled))
