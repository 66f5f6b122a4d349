"""The running kernel as if it were the distribution's: installed, with headers to be had.

A host's kernel is this machine's, which the host has no files of. A package by the name that the
headers of such a kernel would have leads to the headers of the distribution's own kernel: modules
are compiled with those, and say all that `modinfo` asks, but cannot be loaded.
"""

from __future__ import annotations

import platform

from .deb import Package, build, index
from .hosts import LabHost
from .outside import Outside

_FOLDER = "kernel"


def offer_headers(outside: Outside, host: LabHost) -> str:
    """Let the host's archive have the headers of the running kernel; return their package."""
    kernel = platform.release()
    modules = f"/lib/modules/{kernel}"
    package = Package(
        f"linux-headers-{kernel}",
        "1-1",
        ["linux-headers-amd64"],
        scripts={
            "postinst": f"ln -sfn /usr/src/linux-headers-*-amd64 {modules}/build\n"
            f"ln -sfn /usr/src/linux-headers-*-common {modules}/source",
            "prerm": f"rm -f {modules}/build {modules}/source",
        },
    )
    folder = outside.files / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    build(package, folder)
    index(folder, "lab")
    source = f"Types: deb\nURIs: {outside.url(_FOLDER)}/\nSuites: ./\nTrusted: yes\n"
    host.run("cat >/etc/apt/sources.list.d/lab-kernel.sources", stdin=source)
    host.run(
        f"mkdir -p {modules} && touch {modules}/modules.builtin {modules}/modules.order && "
        f"depmod {kernel}; "
        # Each of the many kernel hooks makes an initramfs: quicker with nothing in it.
        "mkdir -p /etc/initramfs-tools/conf.d && echo MODULES=list >/etc/initramfs-tools/conf.d/lab"
    )
    return package.name
