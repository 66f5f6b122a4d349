"""What comes from outside: an address as it may be printed, and JSON that may be anything."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import urlsplit, urlunsplit


def shown(url: str) -> str:
    """A URL that may be printed: without credentials, and without the query that may sign it."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def json_object(text: str | bytes) -> dict[str, Any] | None:
    """An object in JSON; None for everything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
