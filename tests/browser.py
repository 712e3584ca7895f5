"""A real browser without a window, Debian's Chromium, for tests of pages. It reaches this machine alone."""

import importlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def browser(profile: Path, width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A driver of selenium's; skips the test where there is no browser to drive."""
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, place in programs.items() if place is None]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)} here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium here: pip install -r requirements-dev.txt")
    service = importlib.import_module("selenium.webdriver.chrome.service").Service(programs["chromedriver"])
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    sealed = ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--disable-background-networking", "--no-first-run"]
    plain = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--autoplay-policy=no-user-gesture-required"]
    for argument in (*sealed, *plain, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=service)
    try:
        driver.set_page_load_timeout(60)
        yield driver
    finally:
        driver.quit()


def waited(driver: Any, script: str, seconds: float = 30) -> Any:
    """What a script returns as soon as that is true; raises TimeoutException."""
    wait = importlib.import_module("selenium.webdriver.support.ui").WebDriverWait
    return wait(driver, seconds, 0.1).until(lambda page: page.execute_script(script))


def requested(driver: Any) -> tuple[set[str], set[str]]:
    """(all addresses that the pages asked for so far, those of them that answered). May be called once."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = {e["params"]["requestId"]: e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    answered = {e["params"]["requestId"] for e in events if e["method"] == "Network.responseReceived"}
    return set(sent.values()), {url for number, url in sent.items() if number in answered}
