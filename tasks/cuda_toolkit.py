"""The CUDA toolkit that llama.cpp is compiled with, where the host has none that fits."""

from __future__ import annotations

from pyinfra.api import deploy

from tasks.operations import apt_get, local_installer
from tasks.rules.plan import Plan


@deploy("CUDA toolkit")
def install(plan: Plan) -> None:
    """The toolkit that was chosen, under /usr/local/cuda-X.Y."""
    toolkit, settings = plan.installation.toolkit, plan.settings
    if toolkit is None:
        return
    environment = settings.apt_environment
    if toolkit.local is not None:
        local_installer.unpacked(
            name="Unpack the local installer", local=toolkit.local, environment=environment
        )
    apt_get.installed(
        name=f"Install {toolkit.packages.what}",
        packages=toolkit.packages,
        environment=environment,
        brings=f"{toolkit.root}/bin/nvcc",
    )
    if toolkit.mark is not None:
        apt_get.marked(name="Remember which release it is", mark=toolkit.mark, root=toolkit.root)
    if toolkit.local is not None and not toolkit.local.keep:
        local_installer.removed(
            name="Remove the local installer", local=toolkit.local, environment=environment
        )
