"""Packaging of an nbdev 2 project: all values come from settings.ini. No pkg_resources (gone in
setuptools 82)."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_namespace_packages, setup

HERE = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
pkg, url, branch = cfg["lib_path"], cfg["git_url"], cfg["branch"]
STATUSES = [
    "1 - Planning",
    "2 - Pre-Alpha",
    "3 - Alpha",
    "4 - Beta",
    "5 - Production/Stable",
    "6 - Mature",
    "7 - Inactive",
]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def long_description() -> str:
    "The readme with absolute links: on PyPI there is nothing beside it."
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"]
    raw = url.replace("https://github.com/", "https://raw.githubusercontent.com/")

    def absolute(m):
        picture = m[2].lower().endswith((".png", ".gif", ".jpg", ".svg"))
        return m[1] + (f"{raw}/{branch}/" if picture else f"{url}/blob/{branch}/") + m[2]

    return re.sub(
        r"(\]\(|\bsrc=\"|\bsrcset=\"|\bhref=\")(?!https?:|mailto:|#)(?:\./)?([^)\s\"]+)",
        absolute,
        text,
    )


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"] or None,
    url=url,
    project_urls={
        "Source": url,
        "Changelog": f"{url}/blob/{branch}/CHANGELOG.md",
        "Issues": f"{url}/issues",
    },
    # SPDX; no "License ::" classifier (PEP 639)
    license_expression={"apache2": "Apache-2.0", "mit": "MIT"}[cfg["license"]],
    license_files=["LICENSE", "LICENSE-docs"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: " + STATUSES[int(cfg["status"]) - 1],
        "Intended Audience :: " + cfg["audience"].title(),
        "Natural Language :: " + cfg["language"].title(),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        *(
            "Programming Language :: Python :: " + v
            for v in PYTHONS[PYTHONS.index(cfg["min_python"]) :]
        ),
    ],
    # namespace: data folders need no __init__.py
    packages=find_namespace_packages(
        include=[pkg, pkg + ".*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"": cfg.get("package_data", "").split()},
    include_package_data=True,
    python_requires=">=" + cfg["min_python"],
    install_requires=cfg.get("requirements", "").split(),
    extras_require={
        name: cfg.get(f"{name}_requirements", "").split()
        for name in ("dev", "bench", "stream", "export", "video")
    },
    entry_points={
        "console_scripts": cfg.get("console_scripts", "").split(),
        "nbdev": [f"{pkg}={pkg}._modidx:d"],
    },
    zip_safe=False,
)
