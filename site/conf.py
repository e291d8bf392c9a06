"""Settings of the website: Sphinx, myst-nb and sphinx-book-theme over the tree that prepare.py
makes. Nothing is executed, nothing is fetched."""

from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

cfg = ConfigParser(delimiters=["="])
cfg.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]

project, author, release, html_title = cfg["lib_name"], cfg["author"], cfg["version"], cfg["title"]
project_copyright, language = cfg["copyright"], "en"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
root_doc, exclude_patterns = "index", ["_build"]
source_suffix = {".ipynb": "myst-nb", ".md": "myst-nb"}

html_theme, html_css_files, html_js_files = "sphinx_book_theme", ["course.css"], ["course.js"]
MATHJAX = next(
    f for f in distribution("sphinx-mathjax-offline").files if f.name == "tex-svg-full.js"
)  # one file, works without a network
html_static_path = ["static", str(MATHJAX.locate())]
html_theme_options = {
    "repository_url": cfg["git_url"],
    "repository_branch": cfg["branch"],
    "path_to_docs": cfg["nbs_path"],
    "use_repository_button": True,
    "use_download_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "home_page_in_toc": True,
    "show_navbar_depth": 2,
    "show_toc_level": 1,
    "navbar_persistent": [],
}
html_show_sourcelink = False  # the download button leads to the notebook
html_copy_source = True

nb_execution_mode = "off"  # notebooks carry the outputs of real runs
myst_enable_extensions = ["dollarmath", "amsmath", "html_image", "colon_fence"]
myst_heading_anchors = 3
mathjax_path = MATHJAX.name
nb_ipywidgets_js = {}
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "myst.xref_missing"]
