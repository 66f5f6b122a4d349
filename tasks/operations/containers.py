"""GPUs for containers: Docker told of NVIDIA's runtime, Podman of what GPUs there are."""

from __future__ import annotations

from collections.abc import Generator, Sequence

from pyinfra import host, state
from pyinfra.api import operation
from pyinfra.api.command import PyinfraCommand

from tasks.operations import shell
from tasks.operations.driver import hold
from tasks.rules import tables

_REFRESH = "systemctl enable --quiet --now nvidia-cdi-refresh.path nvidia-cdi-refresh.service"


@operation()
def held(packages: Sequence[str]) -> Generator[PyinfraCommand, None, None]:
    """Packages that apt leaves as they are: other repositories have them in other versions."""
    yield shell.command(hold(packages))


@operation()
def docker_configured() -> Generator[PyinfraCommand, None, None]:
    """Docker knows NVIDIA's runtime; containers that run go on running.

    Docker reads runtimes anew on a reload (docs.docker.com/reference/cli/dockerd, configuration
    reload behaviour). It is restarted only if that did not do.
    """
    yield shell.command("nvidia-ctk runtime configure --runtime=docker")
    yield shell.command(
        """
! systemctl is-active --quiet docker || {
  systemctl reload docker
  n=0
  until docker info --format '{{json .Runtimes}}' 2>/dev/null | grep -q '"nvidia"'; do
    n=$((n + 1)); [ $n -lt 20 ] || { systemctl restart docker; break; }; sleep 0.2
  done
}
"""
    )


@operation()
def gpus_described(refreshed: bool) -> Generator[PyinfraCommand, None, None]:
    """A CDI specification of the GPUs, which Podman reads. It takes a driver that is loaded."""
    if state.is_executing:
        is_loaded, _ = shell.run(host, "[ -e /sys/module/nvidia/version ] || [ -e /dev/dxg ]")
        if not is_loaded:
            host.noop("the driver is not loaded yet")
            return
    if refreshed:
        yield shell.command(_REFRESH)
    cdi = tables.container_toolkit().cdi
    # Without the units nobody would write it again after a boot.
    path = cdi.output if refreshed else "/etc/cdi/nvidia.yaml"
    yield shell.command(
        f"mkdir -p {path.rpartition('/')[0]} && nvidia-ctk cdi generate --output={path}"
    )


@operation()
def shown() -> Generator[PyinfraCommand, None, None]:
    """nvidia-smi answers in a container, where an engine, an image and a driver are there.

    Nothing is pulled. Changes nothing.
    """
    if not state.is_executing:
        return
    _, output = shell.run(host, _TRY)
    outcome, _, said = output.stdout.partition(" ")
    if outcome == "works":
        shell.say(host, f"a container sees the GPU: {said.strip()}")
    elif outcome == "fails":
        yield shell.failure(f"Error: containers do not see the GPU: {said.strip()}")
    else:
        shell.say(host, f"whether containers see the GPU was not tried: {said.strip()}")


_TRY = """
skip() { echo "skipped $1"; exit 0; }
[ -e /sys/module/nvidia/version ] || [ -e /dev/dxg ] || skip "the driver is not loaded"
if command -v podman >/dev/null; then
  engine=podman options="--device nvidia.com/gpu=all --security-opt=label=disable"
elif command -v docker >/dev/null; then
  engine=docker options="--runtime=nvidia --gpus all"
else skip "there is no engine"; fi
image=$($engine images -q 2>/dev/null | head -n 1)
[ -n "$image" ] || skip "$engine has no image"
set -- run --rm --network=none --entrypoint= $options "$image" nvidia-smi -L
said=$(timeout 60 $engine "$@" 2>&1) &&
  { printf 'works %s\\n' "$said" | head -n 1; exit 0; }
printf 'fails %s\\n' "$said" | tail -n 1 | sed 's/^fails //; s/^/fails /'
"""
