"""What the build adds to the metadata: addresses, and a README whose links lead somewhere on a package index.

A README in a repository links to its neighbours. A package index has no neighbours, so such links become addresses of
the repository at the tag of the version. ``repository`` in ``pyproject.toml`` says where that is; as long as it is
empty, the text of such links stays and the links go.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCE = re.compile(r"^(```.*?^```|~~~.*?^~~~)$", re.MULTILINE | re.DOTALL)
RELATIVE = r"(?![a-z][a-z+.-]*:|//|#)([^)\s\"'>]+)"


class ReadmeAndAddresses(MetadataHookInterface):
    """Sets ``readme`` and ``urls``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add them to the metadata of ``pyproject.toml``."""
        root, repository = Path(self.root), self.config["repository"].rstrip("/")
        scope: dict[str, Any] = {}
        exec((root / "ahn_layers" / "version.py").read_text(encoding="utf-8"), scope)
        text = on_an_index((root / "README.md").read_text(encoding="utf-8"), repository, scope["__version__"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        paper = {"Paper": "https://arxiv.org/abs/2510.07318"}
        ours = {"Changelog": f"{repository}/blob/main/CHANGELOG.md", "Issues": f"{repository}/issues"}
        metadata["urls"] = {"Repository": repository, **ours, **paper} if repository else paper


def on_an_index(text: str, repository: str, version: str) -> str:
    """A README without relative links.

    Args:
        text: Markdown, with HTML for pictures.
        repository: its address, without a slash at the end; empty if there is none yet.
        version: whose tag is ``v`` and the version.
    """
    parts = FENCE.split(text)  # fenced blocks at odd places
    parts[::2] = [_prose(part, repository, version) for part in parts[::2]]
    return "".join(parts)


def _prose(text: str, repository: str, version: str) -> str:
    if repository:
        raw, page = (f"{repository}/{kind}/v{version}/" for kind in ("raw", "blob"))
        text = re.sub(rf"(!\[[^\]]*\]\(){RELATIVE}", rf"\1{raw}\2", text)
        text = re.sub(rf"(\]\(){RELATIVE}", rf"\1{page}\2", text)
        text = re.sub(rf"(\b(?:src|srcset)=[\"']){RELATIVE}", rf"\1{raw}\2", text)
        return re.sub(rf"(\bhref=[\"']){RELATIVE}", rf"\1{page}\2", text)
    text = re.sub(rf"!\[([^\]]*)\]\({RELATIVE}[^)]*\)", r"*\1*", text)
    text = re.sub(rf"\[([^\[\]]*)\]\({RELATIVE}[^)]*\)", r"\1", text)
    text = re.sub(rf"<(source|img)\b[^>]*\b(?:src|srcset)=[\"']{RELATIVE}[\"'][^>]*>\s*", "", text)
    return re.sub(rf"<a\b[^>]*\bhref=[\"']{RELATIVE}[\"'][^>]*>(.*?)</a>", r"\2", text, flags=re.DOTALL)
