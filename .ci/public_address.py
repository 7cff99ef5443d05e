"""Make the README's relative links absolute, and name the repository in the package, for a build.

python .ci/public_address.py https://github.com/OWNER/NAME v0.1.0

PyPI shows the README, where a relative link leads nowhere. README.md and pyproject.toml of the
current folder are rewritten; release.yml does so before it builds.
"""

import re
import sys
from pathlib import Path


def absolute_links(text: str, address: str, tag: str) -> str:
    """The README with links to files of a repository, at a tag, in place of relative ones."""
    text = re.sub(r"\]\((?![a-z]+:|#)", f"]({address}/blob/{tag}/", text)
    return re.sub(r'src="(?![a-z]+:)', f'src="{address}/raw/{tag}/', text)


def with_urls(text: str, address: str, tag: str) -> str:
    """pyproject.toml with the addresses that PyPI shows beside the package."""
    lines = [
        "[project.urls]",
        f'Repository = "{address}"',
        f'Documentation = "{address}/tree/{tag}/docs"',
        f'Changelog = "{address}/blob/{tag}/CHANGELOG.md"',
    ]
    return text.replace("[project.scripts]", "\n".join([*lines, "", "[project.scripts]"]), 1)


def main(address: str, tag: str) -> None:
    for name, rewritten in (("README.md", absolute_links), ("pyproject.toml", with_urls)):
        file = Path(name)
        text = file.read_text(encoding="utf-8")
        file.write_text(rewritten(text, address.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
