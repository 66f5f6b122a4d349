"""From bare metal to a proven llama-server.

./run pyinfra INVENTORY deploy.py
"""

from tasks import (
    container_toolkit,
    cuda_toolkit,
    driver,
    llama_cpp,
    llama_server,
    models,
    nvidia,
    packages,
    preflight,
    verify,
)

plan = preflight.plan()
preflight.lock()
packages.prepare(plan)
nvidia.prepare(plan)
packages.install(plan)
driver.install(plan)
cuda_toolkit.install(plan)
llama_cpp.install(plan)
models.fetch(plan)
container_toolkit.install(plan)
driver.ready(plan)
llama_server.serve(plan)
verify.prove(plan)
models.clean(plan)
