"""deploy.py as far as compiling goes: no driver can be loaded in the lab, and nothing served."""

from tasks import cuda_toolkit, driver, llama_cpp, nvidia, packages, preflight

plan = preflight.plan()
preflight.lock()
packages.prepare(plan)
nvidia.prepare(plan)
packages.install(plan)
driver.install(plan)
cuda_toolkit.install(plan)
llama_cpp.install(plan)
