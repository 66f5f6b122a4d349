"""deploy.py as far as NVIDIA's part of it goes.

Without compilers: the lab's packages have nothing to compile with.
"""

from tasks import container_toolkit, cuda_toolkit, driver, nvidia, packages, preflight

plan = preflight.plan()
preflight.lock()
packages.prepare(plan)
nvidia.prepare(plan)
driver.install(plan)
cuda_toolkit.install(plan)
container_toolkit.install(plan)
driver.ready(plan)
