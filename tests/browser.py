"""Pages in headless Chromium, for tests that are skipped where there is none."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def in_browser(address, milliseconds=3000):
    """A page as a browser leaves it, once it thinks that so much time has passed: as HTML."""
    options = ("--headless", "--no-sandbox", "--disable-gpu")
    options += (f"--virtual-time-budget={milliseconds}",)
    command = [CHROMIUM, *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(document, name):
    """The text of the element with an id, without its tags."""
    inside = re.search(rf'<(\w+)[^>]* id="{name}"[^>]*>(.*?)</\1>', document, re.DOTALL)[2]
    return re.sub("<.*?>", "", inside)
