"""A host's disk: a base root that all share, and over it what this host has written."""

from __future__ import annotations

import shutil
from pathlib import Path

from .tools import LabError, run


class Disk:
    """An overlay where the kernel can do that on this file system, else a copy.

    With an overlay a host costs no time and no space but for its changes; the latter matters most
    when it is thrown away, as freeing blocks can take longer than writing them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        self._base_file = directory / "base"

    @classmethod
    def make(cls, directory: Path, base: Path) -> Disk:
        """Make a disk that holds what the base root holds, mounted."""
        disk = cls(directory)
        for name in ("root", "upper", "work"):
            (directory / name).mkdir(parents=True)
        disk._base_file.write_text(str(base))
        try:
            disk.mount()
        except LabError:  # for instance on an overlay, in a container
            for name in ("root", "upper", "work"):
                (directory / name).rmdir()
            disk._base_file.unlink()
            run(["cp", "--archive", "--reflink=auto", base, disk.root])
        return disk

    def mount(self) -> None:
        """Make the root accessible, unless it is."""
        if not self._base_file.exists() or self.root.is_mount():
            return
        layers = {
            "lowerdir": Path(self._base_file.read_text()),
            "upperdir": self.directory / "upper",
            "workdir": self.directory / "work",
        }
        if any(set(str(path)) & set(",:\\") for path in layers.values()):
            raise LabError("mount takes commas and colons in paths for separators")
        options = ",".join(f"{name}={path}" for name, path in layers.items())
        run(["mount", "-t", "overlay", "-o", options, "lab", self.root])

    def unmount(self) -> None:
        """Make the root inaccessible; what is on the disk stays."""
        if self.root.is_mount():
            # Lazily, as a process that has just been killed may still hold it for a moment.
            run(["umount", "--lazy", self.root])

    def throw_away(self) -> None:
        """Remove the disk."""
        self.unmount()
        shutil.rmtree(self.directory)
