"""What lies on a host that a model is to be made from."""

from __future__ import annotations

import base64
import binascii
import shlex

from pyinfra.api import FactBase

from tasks.rules.making import Folder, Listed
from tasks.rules.outside import json_object

_SCRIPT = r"""
if [ -d "$path" ]; then
    printf 'folder\t%s\n' "$path"
    find -L "$path" -maxdepth 2 -type f -printf 'file\t%s\t%T@\t%P\n' 2>/dev/null | head -n 5000
    [ ! -f "$path/config.json" ] ||
        printf 'config\t%s\n' "$(head -c 1000000 "$path/config.json" | base64 -w 0)"
elif [ -f "$path" ]; then
    printf 'folder\t%s\n' "${path%/*}"
    for file in "$@"; do
        [ ! -f "$file" ] ||
            printf 'file\t%s\t%s\n' "$(stat -L --printf '%s\t%Y' "$file")" "${file##*/}"
    done
fi
true
"""


class SourceFolder(FactBase["Folder | None"]):
    """A folder's files with their sizes and times, and its config.json; or a file and its parts.

    None where there is nothing. Exits 0 whatever happens.
    """

    shell_executable = "sh"

    def command(self, path: str, parts: tuple[str, ...] = ()) -> str:
        """The listing; parts are the files of which path is the first."""
        return f"path={shlex.quote(path.rstrip('/') or '/')}\nset -- {shlex.join(parts)}\n{_SCRIPT}"

    def process(self, output: list[str]) -> Folder | None:
        """Folder from lines of `key<TAB>value`."""
        path, config = None, None
        files = []
        for line in output:
            key, _, rest = line.partition("\t")
            if key == "folder":
                path = rest
            elif key == "file":
                size, time, name = rest.split("\t", 2)
                files.append(Listed(name, int(size), int(float(time))))
            elif key == "config":
                config = _config(rest)
        return Folder(path, tuple(files), config) if path is not None else None


def _config(told: str) -> dict[str, object] | None:
    try:
        return json_object(base64.b64decode(told, validate=True))
    except binascii.Error:
        return None
