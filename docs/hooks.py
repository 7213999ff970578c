"""What the site needs beyond its plugins: pages that live beside the code, and formulae.

Pages and figures outside docs/ are taken in, and links to them, which begin with ../ in a checkout,
go to their place on the site. Formulae become MathML when the site is built:
browsers draw it by themselves, where MathJax would be fetched from elsewhere.
"""

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/*.md", "experiments/**/*.md")
BESIDE += ("experiments/figures/*.png", "experiments/figures/*.gif")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Takes in what lives beside the code."""
    root = Path(config["config_file_path"]).parent
    for path in sorted(path for pattern in BESIDE for path in root.glob(pattern)):
        name = path.relative_to(root).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Lets links of a page in docs/ itself lead to what was taken in."""
    return markdown if "/" in page.file.src_uri else markdown.replace("](../", "](")


def on_page_content(content, **_):
    """Turns formulae, as arithmatex leaves them, into MathML."""

    def formula(found):
        display = "block" if found[1] == "div" else "inline"
        return convert(html.unescape(found[2]).strip(), display=display)

    return FORMULA.sub(formula, content)
