"""What tests share: the same random numbers in every run, Chromium for the browser tests, a folder
for their screenshots, and the order of the files: the longest first."""

import importlib.util
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import times  # noqa: E402

CHROMIUM = next(
    (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))),
    None,
)
ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-sync",
    "--disable-component-update",
    "--no-first-run",
]


def pytest_addoption(parser):
    parser.addoption(
        "--shots", metavar="FOLDER", help="keep the screenshots of the browser tests here"
    )
    parser.addoption(
        "--keep-times", action="store_true", help="write down how long each test took"
    )
    parser.addoption(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help=(
            "every test starts from these random numbers; another N looks for tests that pass by"
            " luck"
        ),
    )
    parser.addoption(
        "--families",
        metavar="FILE",
        action="append",
        default=[],
        help="a file of yours that enters processes: the tests over all families run on them, too",
    )


def pytest_configure(config):
    for path in map(Path, config.getoption("--families")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def pytest_collection_modifyitems(config, items):
    "The longest files first, where several workers share them."
    if hasattr(config, "workerinput"):
        files = dict.fromkeys(item.path.name for item in items)
        order = times.longest_first(files, "files")
        items.sort(key=lambda item: order.index(item.path.name))


TOOK = Counter()  # seconds of each test, with its fixtures


def pytest_runtest_logreport(report):
    TOOK[report.nodeid] += report.duration


def pytest_sessionfinish(session):
    config = session.config
    if config.getoption("--keep-times") and not hasattr(config, "workerinput"):
        files = Counter()
        for test, seconds in TOOK.items():
            files[Path(test.split("::")[0]).name] += seconds
        times.keep("files", files, replace=True)
        times.keep("tests", TOOK, replace=True)


@pytest.fixture(autouse=True)
def seeded(request):
    "A test that fails in one run of twenty tells nobody anything."
    for seed in random.seed, np.random.seed, torch.manual_seed:
        seed(request.config.getoption("--seed"))


@pytest.fixture(scope="session")
def shots(request, tmp_path_factory) -> Path:
    "Where screenshots go: outside git."
    folder = Path(request.config.getoption("--shots") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")  # as long as it is open, no other test can run an event loop
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield chromium
        chromium.close()
