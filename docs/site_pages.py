"""The site's pages that lie beside docs/: README.md is its home, and links to them are mended."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "examples/README.md": "examples.md"} | {
    name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
}
SOURCES = {page: name for name, page in PAGES.items()}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie beside docs/."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        file = File.generated(config, page, content=text)
        file.edit_uri = name
        files.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the site's pages; a link to another file of the repository is its text."""
    uri = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(uri, f"docs/{uri}"))

    def mended(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        path = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(path) is None and link[0][0] != "!":
            return text
        start = posixpath.dirname(uri) or "."
        return f"[{text}]({posixpath.relpath(path, start)}{anchor})"

    markdown = markdown.replace('<img src="docs/', '<img src="')
    return re.sub(r"(?<!`)\[([^\]]*)\]\(([^)#:\s]+)((?:#[^)\s]*)?)\)", mended, markdown)
