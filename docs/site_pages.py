"""Hook of mkdocs: pages of the site that lie at the top of the repository, and links that leave ``docs/``.

README.md, CONTRIBUTING.md and CHANGELOG.md stay where GitHub looks for them and become pages here. Links are
written for GitHub; those to files that are no pages (records, scripts) are shown as plain text.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}


def on_files(files, config):
    """Add the pages from the top of the repository."""
    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            text = (ROOT / source).read_text("utf-8")
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrite the links of a page from the repository's folders to the site's."""
    source = next((name for name, uri in PAGES.items() if uri == page.file.src_uri), None)
    folder = posixpath.dirname(source or f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri) or "."

    def rewrite(link: re.Match) -> str:
        image, text, target = link.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", target):
            return link[0]
        path = posixpath.normpath(posixpath.join(folder, path))
        uri = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(uri) is None and (ROOT / path).exists():
            return text
        uri = posixpath.relpath(uri, here)
        return f"{image}[{text}]({uri}{'#' + anchor if anchor else ''})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else re.sub(r"(!?)\[([^]]*)\]\(([^)\s]+)\)", rewrite, part)
        for part in parts
    )
