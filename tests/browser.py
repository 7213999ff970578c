"""Loads pages in headless Chromium, for tests that are skipped where it is not installed."""

import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def in_browser(address, milliseconds=3000):
    """Loads a page and returns its HTML after this many milliseconds of virtual time."""
    options = ("--headless", "--no-sandbox", "--disable-gpu")
    options += (f"--virtual-time-budget={milliseconds}",)
    command = [CHROMIUM, *options, "--dump-dom", address]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(document, name):
    """Returns the text, without tags, of the element with an id."""
    content = re.search(rf'<(\w+)[^>]* id="{name}"[^>]*>(.*?)</\1>', document, re.DOTALL)[2]
    return re.sub("<.*?>", "", content)
