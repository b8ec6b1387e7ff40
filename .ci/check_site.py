#!/usr/bin/env python3
"""Fail if a page of the built site loads a script, style, font or image from another host.

.ci/check_site.py SITE
"""

import re
import sys
from pathlib import Path

LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b(?=[^>]*rel=["']?(?:stylesheet|preconnect|preload))"""
    r"""[^>]*\shref=["']?(?:https?:)?//|@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//""",
    re.IGNORECASE,
)


def main(site: Path) -> str | None:
    pages = [p for p in sorted(site.rglob("*")) if p.suffix in (".html", ".css")]
    if not pages:
        return f"{site} has no pages; build the site first"
    found = [f"{p}: {match[0][-120:]}" for p in pages for match in LOADED.finditer(p.read_text())]
    return "\n".join(["the site loads files from other hosts:", *found]) if found else None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
