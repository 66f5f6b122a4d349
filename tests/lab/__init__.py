"""A world in a box: throwaway hosts with a real systemd, and the outside that they reach.

with Lab("example") as lab:
    host = lab.host("debian-13")
    print(host.ssh("systemctl is-system-running").stdout)
"""

from .faults import Fault
from .hosts import H200, RTX_5090, LabHost, PciDevice
from .lab import Lab, labs
from .machine import obstacle
from .roots import DISTRIBUTIONS, Distribution, Variant
from .tools import LabError, cache_directory, compiler_cache

__all__ = [
    "DISTRIBUTIONS",
    "H200",
    "RTX_5090",
    "Distribution",
    "Fault",
    "Lab",
    "LabError",
    "LabHost",
    "PciDevice",
    "Variant",
    "cache_directory",
    "compiler_cache",
    "labs",
    "obstacle",
]
