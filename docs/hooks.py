"""Adds to the site what its plugins do not: pages that live beside the code, and formulae.

The site includes pages and figures outside docs/. Links to them begin with ../ in a checkout; the
hooks point them to the place on the site. The build turns formulae into MathML, which browsers
draw by themselves; MathJax would have to be fetched from elsewhere.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

INCLUDED = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/*.md", "experiments/**/*.md")
INCLUDED += ("experiments/figures/*.png", "experiments/figures/*.gif")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds the pages and figures that live beside the code to the files of the site."""
    root = Path(config["config_file_path"]).parent
    for path in sorted(path for pattern in INCLUDED for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Points the links of a page in docs/ itself to the pages and figures that were added."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](")


def on_page_content(content, **_):
    """Turns formulae, in the markup that arithmatex leaves, into MathML."""

    def mathml(match):
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return FORMULA.sub(mathml, content)
