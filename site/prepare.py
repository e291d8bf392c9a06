"""Write the source tree of the website from the notebooks and the package.

usage: python site/prepare.py FOLDER
then:  sphinx-build -W -b html -c site FOLDER OUT        (make site does both)

It holds the lessons with their stored outputs, an API reference, and a syllabus.
"""

import ast
import html
import io
import re
import shutil
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CFG = ConfigParser(delimiters=["="])
CFG.read(ROOT / "settings.ini", encoding="utf-8")
CFG = CFG["DEFAULT"]
NBS = ROOT / CFG["nbs_path"]
BLOB = f"{CFG['git_url']}/blob/{CFG['branch']}/"
DIRECTIVE = re.compile(r"^\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$")
BADGE = re.compile(r"\[!\[Open In Colab\]\([^)]*\)\]\((\S+?)\)")  # its picture lies on another host
PARTS = {  # page -> title, lessons, what it is about
    "part-1": (
        "Part I: from noise to digits",
        range(0, 10),
        (
            "Told twice. First with the *exact* denoiser, which is known for a finite set of points"
            " or images: so noise, prediction, sampling and guidance are seen to be right before"
            " anything is trained. Then with a learned one, up to a model of handwritten digits and"
            " the question how good it is."
        ),
    ),
    "part-2": (
        "Part II: one equation, many names",
        range(10, 17),
        (
            "Diffusion came from three traditions and was found again as EDM and flow matching."
            " Each is built in about thirty lines on the parts of Part I, and trained on the same"
            " images with the same network and loop."
        ),
    ),
    "rooms": (
        "Rooms behind the lessons",
        range(70, 100),
        (
            "Workshops and references: what the lessons use, and what a library needs that a lesson"
            " need not show. Look things up here."
        ),
    ),
}


def number(path: Path) -> int:
    return int(re.match(r"(\d+)", path.name)[1])


def lessons() -> list:
    return sorted(p for p in NBS.glob("[0-9]*.ipynb"))


def markdown(text: str) -> str:
    "What reads differently on a page than in a notebook."
    text = BADGE.sub(r"[Open in Colab](\1)", text)
    # files that are no pages
    return re.sub(r"\]\(\.\./([\w./-]+)\)", lambda m: f"]({BLOB}{m[1]})", text)


def converted(path: Path) -> nbformat.NotebookNode:
    "A notebook without the cells and lines that only nbdev reads."
    nb, cells = nbformat.read(path, 4), []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = markdown(cell.source)
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            found = {m[1] for line in lines if (m := DIRECTIVE.match(line))}
            if found & {"hide", "default_exp"} or "nbdev_export(" in cell.source:
                continue
            cell.source = "\n".join(line for line in lines if not DIRECTIVE.match(line)).strip("\n")
            if not cell.source and not cell.outputs:
                continue
            if "solution" in found:  # a fold: the reader writes it first
                cell.metadata.setdefault("tags", []).append("hide-input")
            for o in cell.outputs:
                data = o.get("data", {})
                data.pop("application/vnd.jupyter.widget-view+json", None)
                if said := re.search("<title>(.*?)</title>", data.get("image/svg+xml", "")):
                    cell.metadata["mystnb"] = dict(image=dict(alt=html.unescape(said[1])))
                    cell.metadata.setdefault("tags", []).append("remove-input")
        cells.append(cell)
    nb.cells = cells
    return nb


def texts(path: Path) -> list:
    return ["".join(c.source) for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]


def title(path: Path) -> str:
    return next(m[1] for t in texts(path) if (m := re.match(r"# (.+)", t)))


def told(path: Path) -> tuple:
    "What a lesson says about itself: promise, needs, cost."
    first = texts(path)[0]
    promise, needs, cost = (
        next((m[1] for m in re.finditer(p, first, re.M)), "")
        for p in (r"^(?:\*\*|> )(.+?)(?:\*\*)?$", r"^(You need .*)$", r"^\| `cpu` \| *(.+?) *\|$")
    )
    return promise, markdown(needs), re.sub(r" *[|] *", ", ", cost)


def part(page: str) -> str:
    "What a part is about, and its lessons."
    name, numbers, about = PARTS[page]
    mine, out = [p for p in lessons() if number(p) in numbers], [f"# {name}", "", about, ""]
    for path in mine:
        promise, _, cost = told(path)
        out += [
            f"## [{title(path)}]({path.name})",
            "",
            promise + (f" *On a CPU: {cost}.*" if cost else ""),
            "",
        ]
    return "\n".join([*out, toctree([p.stem for p in mine], hidden="")])


def syllabus() -> str:
    """For teachers: what each lesson promises, needs, costs, and how many exercises it has. Read
    from the lessons."""
    out = [
        "# Syllabus",
        "",
        (
            "For teachers and for whoever plans a course: what a lesson promises, what it needs,"
            " what it costs on a laptop without a GPU, and what is practised. The times are those"
            " of the stored runs."
        ),
        "",
    ]
    for name, numbers, _ in list(PARTS.values())[:2]:
        out += [f"## {name}", ""]
        for path in (p for p in lessons() if number(p) in numbers):
            (promise, needs, cost), whole = told(path), "\n".join(texts(path))
            goals = re.search(r"^## (?:\d+\. )?Summary.*\n+((?:(?:\d\.|\*|-) .*\n?)+)", whole, re.M)
            exercises = len(re.findall(r"<summary>Solution", whole))
            out += [f"### [{title(path)}]({path.name})", "", promise, ""] + (
                [f"*Before:* {needs}", ""] if needs else []
            )
            out += [f"*Cost:* {cost}. *Exercises:* {exercises}, with checks and solutions.", ""]
            if goals:
                out += ["*Afterwards they can say:*", "", goals[1].strip(), ""]
    return "\n".join(out)


def described(thing) -> str:
    "Signature with the comment beside each argument, and docstring, without nbdev's heading."
    from nbdev.showdoc import BasicMarkdownRenderer, show_doc

    try:
        text = show_doc(thing, renderer=BasicMarkdownRenderer, title_level=2)._repr_markdown_()
    except NameError:  # the arguments are those of a class of torch
        return f"*{' '.join(thing.__doc__.split())}*"
    text = re.sub(r"\{target=[^}]*\}", "", text)
    text = re.sub(r"^(---|\[source\].*|#+ .*)$", "", text, flags=re.M)
    _, signature, words = text.split("```", 2)
    # a comment of several lines comes without its indentation: such lines belong to the one before
    signature = re.sub(r"\n(?!python|def |class |\)| |\n)", " ", signature.strip())
    first, *rest = (thing.__doc__ or "").strip().split("\n\n")
    words = "\n\n".join([f"*{' '.join(first.split())}*", *rest])
    return re.sub(r"\n{3,}", "\n\n", f"```{signature}\n```\n\n{words}").strip()


def api() -> dict:
    "module -> page: every public name with its signature and the comment beside each argument."
    pages = {}
    for path in sorted((ROOT / CFG["lib_path"]).glob("[a-z]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = next(
            (
                ast.literal_eval(n.value)
                for n in tree.body
                if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"
            ),
            [],
        )
        module = import_module(f"{CFG['lib_name']}.{path.stem}")
        made = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", path.read_text(encoding="utf-8"))
        out = [
            f"# {path.stem}",
            "",
            f"`from {CFG['lib_name']}.{path.stem} import ...`"
            + (f", written in [{made[1]}](../{made[1]})." if made else ""),
            "",
        ]
        for name in names:
            thing = getattr(module, name)
            if (
                not callable(thing)
                or not getattr(thing, "__doc__", None)
                or not hasattr(thing, "__qualname__")
            ):
                continue
            out += [f"## {name}", "", described(thing), ""]
        if len(out) > 5:
            pages[path.stem] = "\n".join(out)
    return pages


def toctree(names: list, caption: str = "", **options) -> str:
    lines = [
        "```{toctree}",
        *([f":caption: {caption}"] if caption else []),
        ":maxdepth: 1",
        *(f":{k}: {v}" for k, v in options.items()),
        "",
        *names,
        "```",
    ]
    return "\n".join(lines)


def film() -> nbformat.NotebookNode:
    """The readme's animation with a control: play, pause, or a picture at a time. course.js starts
    it, unless less motion was asked for."""
    from PIL import Image, ImageSequence

    from ddpm_course.widgets import Explore, still_html

    frames = []
    with Image.open(ROOT / "assets/forward_reverse.png") as image:
        for frame in ImageSequence.Iterator(image):
            file = io.BytesIO()
            frame.convert("L").quantize(33).save(file, "PNG", optimize=True)
            frames.append(file.getvalue())
    player = still_html(
        Explore(
            lambda picture: frames[picture],
            name="from digits to noise, and from noise to digits",
            picture=range(len(frames)),
            play=True,
        )
    )
    said = (
        "Noise is mixed into ten digits; then a network takes it away again, and other digits"
        " appear."
    )
    html = f'<div id="film">{player}<p>{said}</p></div>'
    return nbformat.v4.new_code_cell(
        "film",
        metadata=dict(tags=["remove-input"]),
        outputs=[nbformat.v4.new_output("display_data", {"text/html": html})],
    )


def prepare(out: Path):
    shutil.rmtree(out, ignore_errors=True)
    (out / "api").mkdir(parents=True)
    for path in [*lessons(), NBS / "index.ipynb"]:
        nb = converted(path)
        if path.stem == "index":
            groups = [
                toctree(list(PARTS), "Lessons", hidden=""),
                toctree(["glossary", "syllabus", "api/index"], "To look things up", hidden=""),
            ]
            nb.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(groups)))
            nb.cells.insert(1, film())
        nbformat.write(nb, out / path.name)
    for page in (ROOT / "site/pages").glob("*.md"):
        shutil.copy(page, out / page.name)
    for page in PARTS:
        (out / f"{page}.md").write_text(part(page), encoding="utf-8")
    (out / "syllabus.md").write_text(syllabus(), encoding="utf-8")
    pages = api()
    for name, text in pages.items():
        (out / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    (out / "api/index.md").write_text(
        "# The package, name by name\n\nWritten from the signatures, docstrings and comments of the"
        " code.\n\n"
        + toctree(list(pages)),
        encoding="utf-8",
    )
    if (ROOT / "assets").is_dir():
        shutil.copytree(ROOT / "assets", out / "assets")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    prepare(Path(sys.argv[1]))
