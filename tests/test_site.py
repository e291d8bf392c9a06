"""The website: complete, without a request to another host, readable on a phone, and with controls
that move without a kernel."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LESSONS = sorted(p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb"))
PAGES = ["index", "part-1", "02_forward", "97_pretrained", "glossary", "syllabus", "api/process"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    for command in (
        ["site/prepare.py", out / "source"],
        ["-m", "sphinx", "-q", "-W", "-b", "html", "-c", "site", out / "source", out / "html"],
    ):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


def test_every_notebook_and_module_has_a_page(site):
    modules = {p.stem for p in (ROOT / "ddpm_course").glob("[a-z]*.py")}
    assert all((site / f"{stem}.html").exists() for stem in LESSONS)
    assert {p.stem for p in (site / "api").glob("*.html")} - {"index"} >= modules - {"cli"}
    assert "c_skip" in (site / "api/denoiser.html").read_text(encoding="utf-8")


def test_no_page_needs_another_host(site):
    for page in site.rglob("*.html"):
        wanted = re.findall(
            r'<(?:script|img|link|iframe)[^>]*(?:src|href)="(https?:[^"]+)"',
            page.read_text(encoding="utf-8"),
        )
        assert [w for w in wanted if "rel=" not in w] == [], page.name


def test_links_within_the_site_lead_somewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r'<a[^>]*href="([^"#?]+)[^"]*"', text):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_what_only_nbdev_reads_is_gone(site):
    text = (site / "02_forward.html").read_text(encoding="utf-8")
    assert (
        "default_exp" not in text
        and "nbdev_export" not in text
        and "the solutions pass their checks" not in text
    )


def test_diagrams_say_what_they_show_and_solutions_are_folded(site):
    text = (site / "02_forward.html").read_text(encoding="utf-8")
    assert 'alt="Small arrows lead from x_0 over x_1 and x_2 to x_t.' in text
    assert "ddpm_course.diagrams" not in text
    text = (site / "04b_first_images.html").read_text(encoding="utf-8")
    hidden = re.findall(r"<details.*?</details>", text, re.S)
    assert any("alpha" in h and "make_example" in h for h in hidden)
    assert text.count("make_example") > sum(h.count("make_example") for h in hidden)


def test_the_syllabus_knows_every_lesson(site):
    text = (site / "syllabus.html").read_text(encoding="utf-8")
    for stem in LESSONS:
        if int(stem[:2]) < 17:
            assert f'href="{stem}.html"' in text, stem
    assert "Cost:</em> ." not in text  # each says what it costs


def test_every_name_in_the_glossary_exists():
    text = (ROOT / "site/pages/glossary.md").read_text(encoding="utf-8")
    names = re.findall(r"`([a-z_]+)\.([A-Za-z_]+)`", text)
    assert len(names) > 30
    for module, name in names:
        assert hasattr(import_module(f"ddpm_course.{module}"), name), f"{module}.{name}"
    for lesson in re.findall(r"\]\((\w+\.ipynb)\)", text):
        assert (ROOT / "nbs" / lesson).exists(), lesson


def opened(browser, site, name, width=1200, scheme="light"):
    page, asked = (
        browser.new_context(viewport=dict(width=width, height=900), color_scheme=scheme).new_page(),
        [],
    )
    page.on("request", lambda r: asked.append(r.url))
    page.on("pageerror", lambda e: asked.append(f"error: {e}"))
    page.goto((site / f"{name}.html").as_uri())
    page.wait_for_timeout(500)
    return page, lambda: [a for a in asked if not a.startswith(("file:", "data:", "blob:"))]


def barriers(page) -> list:
    "What a reader with a screen reader or weak eyes would stumble over."
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    bad = [v for v in found if v["impact"] in ("serious", "critical")]
    return [(v["id"], v["nodes"][0]["html"][:200]) for v in bad]


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1200, 375])
def test_a_page_fits_the_screen_has_no_barrier_and_asks_nobody(site, browser, shots, name, width):
    page, asked = opened(browser, site, name, width)
    for scheme in ("light", "dark"):  # the theme follows the system while the page is open
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"document.documentElement.dataset.theme === '{scheme}'")
        page.wait_for_timeout(500)  # colours fade over
        assert page.evaluate("document.documentElement.scrollWidth") <= width + 1, scheme
        page.screenshot(path=shots / f"site-{name.replace('/', '-')}-{width}-{scheme}.png")
        assert width < 1000 or not (found := barriers(page)), (scheme, found)
    assert asked() == []
    page.context.close()


def test_formulas_are_set(site, browser):
    page, _ = opened(browser, site, "02_forward")
    page.wait_for_selector("mjx-container svg", timeout=20_000)
    page.context.close()


def test_a_control_moves_by_keyboard_without_a_kernel(site, browser):
    page, _ = opened(browser, site, "02_forward")
    control = page.locator("figure.explore").first
    if not control.count():
        pytest.fail("lesson 02 stores no control: make outputs NB=nbs/02_forward.ipynb")
    image, before = control.locator("img"), control.locator("img").get_attribute("src")
    control.locator("input[type=range]").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([e, before]) => e.src !== before", arg=[image.element_handle(), before]
    )
    assert "t = " in image.get_attribute("alt")
    page.context.close()


def test_the_film_runs_stops_and_waits_where_less_motion_is_wanted(site, browser):
    page, _ = opened(browser, site, "index")
    film, button = page.locator("#film figure img"), page.locator("#film button")

    def moves(within=10_000):  # a film shows another picture eight times a second
        before, left = film.get_attribute("src"), within
        while film.get_attribute("src") == before and left > 0:
            page.wait_for_timeout(100)
            left -= 100
        return film.get_attribute("src") != before

    assert moves() and button.inner_text() == "pause"
    button.focus()
    page.keyboard.press("Enter")
    assert not moves(1000) and button.inner_text() == "play"
    page.context.close()
    page = browser.new_context(reduced_motion="reduce").new_page()
    page.goto((site / "index.html").as_uri())
    film = page.locator("#film figure img")
    assert not moves(1000)
    page.locator("#film button").click()
    assert moves()
    page.context.close()


def test_the_site_can_be_walked_with_the_keyboard(site, browser):
    page, _ = opened(browser, site, "02_forward")
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate(
                "(() => { const e = document.activeElement; return e.innerText?.trim() ||"
                " e.getAttribute('aria-label') || e.title || e.placeholder || e.tagName })()"
            )
        )
    # nothing holds the focus
    assert len(set(seen)) > 20 and any("Skip to main content" in s for s in seen), seen
    assert page.locator("a.left-prev").count() and page.locator("a.right-next").count()
    page.context.close()
