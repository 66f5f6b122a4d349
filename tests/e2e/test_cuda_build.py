"""The real CUDA toolkit, installed by apt out of NVIDIA's repository and used on llama.cpp.

The RTX 5090 and its driver are pretended: what is compiled here is looked at, not run. One kernel
instead of llama.cpp's 144 files of them shows in minutes how things are compiled and linked.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tasks import probe as at
from tasks.rules import tables
from tests.e2e import deploys
from tests.e2e.conftest import new_host
from tests.e2e.deploys import Run
from tests.lab import RTX_5090, Lab, LabHost, cuda_wheels, pretences
from tests.lab.llama_source import LLAMA_CPP_COMMIT
from tests.lab.nvidia_repository import NvidiaRepository

pytestmark = [pytest.mark.lab, pytest.mark.slow]

SCRIPT = "tests/e2e/nvidia_build.py"
KERNELS = "ggml/src/ggml-cuda"
ONE_KERNEL = """\
// In the place of all of ggml-cuda: a kernel, cuBLAS and libcuda, and no device.
#include "ggml-cuda.h"
#include "ggml-backend-impl.h"
#include <cublas_v2.h>
#include <cuda.h>

static __global__ void twice(float * x) { x[threadIdx.x] *= 2.0f; }

static const char * name(ggml_backend_reg_t) { return "CUDA"; }

static size_t count(ggml_backend_reg_t) {
    CUdevice device;
    cublasHandle_t handle;
    if (cuInit(0) == CUDA_SUCCESS && cuDeviceGet(&device, 0) == CUDA_SUCCESS &&
        cublasCreate(&handle) == CUBLAS_STATUS_SUCCESS) {
        twice<<<1, 1>>>(nullptr);
    }
    return 0;
}

static ggml_backend_dev_t device(ggml_backend_reg_t, size_t) { return nullptr; }
static void * address(ggml_backend_reg_t, const char *) { return nullptr; }

ggml_backend_reg_t ggml_backend_cuda_reg() {
    static ggml_backend_reg reg = {
        GGML_BACKEND_API_VERSION, { name, count, device, address }, nullptr
    };
    return &reg;
}
"""


@dataclass(frozen=True)
class Site:
    """A host with a card and a driver, and no toolkit yet."""

    lab: Lab
    host: LabHost
    data: dict[str, Any]
    folder: Path

    def run(self, **data: Any) -> Run:
        """Deploy as far as compiling goes."""
        inventory = deploys.write_inventory(self.folder, {self.host.name: {**self.data, **data}})
        return deploys.run(inventory, SCRIPT, timeout=4 * 3600)

    def release(self) -> str:
        """Folder of the newest release."""
        return self.host.run(f"ls -dt {at.RELEASES}/* | head -n 1").stdout.strip()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    lab = Lab("cuda-build")
    lab.down()  # what a killed run left
    with lab:
        yield lab


@pytest.fixture(scope="module")
def site(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Site:
    host = new_host(lab, "cuda")
    host.plug_in_pci([RTX_5090])
    pretences.have_driver(host, "595.99.02")
    nvidia = NvidiaRepository(lab.outside).publish()
    nvidia.bring_real_toolkit("debian13")
    data = {
        **deploys.access(lab, host),
        **deploys.wanted(lab),
        **nvidia.settings,
        "llama_cpp_backend": "cuda",
    }
    return Site(lab, host, data, tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="module")
def one_kernel(site: Site) -> Run:
    """The site with the toolkit, and a llama.cpp of one kernel compiled with it."""
    repository = site.lab.outside.repository
    listed = repository.git("ls-tree", "-r", "--name-only", LLAMA_CPP_COMMIT, KERNELS).split()
    changes: dict[str, str | None] = {path: None for path in listed if path.endswith(".cu")}
    for pair in tables.fa_quants().default:  # named in its CMake files
        changes[f"{KERNELS}/template-instances/fattn-vec-instance-{pair}.cu"] = "// none\n"
    changes[f"{KERNELS}/ggml-cuda.cu"] = ONE_KERNEL
    commit = repository.commit(changes, tag="one-kernel", parent=LLAMA_CPP_COMMIT)
    site.data["llama_cpp_version"] = commit
    run = site.run()
    assert run.code == 0, run.said[-6000:]
    proxy = f"-o Acquire::http::Proxy={site.lab.outside.proxy_url}"
    site.host.run(f"apt-get -qq -y {proxy} install cuda-cuobjdump-13-2")
    return run


def test_the_toolkit_lies_where_nvidias_packages_put_it(site: Site, one_kernel: Run) -> None:
    root = cuda_wheels.ROOT
    assert f"Install CUDA {cuda_wheels.RELEASE}" in one_kernel.said
    said = site.host.run(
        f"{root}/bin/nvcc --version; readlink -f /usr/local/cuda-13 {root}/lib64 {root}/include; "
        "dpkg-query -W -f '${Version} ' libcublas-dev-13-2 cuda-nvcc-13-2"
    ).stdout
    assert f"V{cuda_wheels.NVCC}" in said
    target = f"{root}/targets/x86_64-linux"
    assert said.split()[-5:-2] == [root, f"{target}/lib", f"{target}/include"]
    assert set(said.split()[-2:]) == {f"{cuda_wheels.CUBLAS}-1", f"{cuda_wheels.NVCC}-1"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("[sm_120a]", {"ELF sm_120a"}),  # as CMake tells nvcc with 120a-real
        ("[compute_120a,sm_120a]", {"ELF sm_120a", "PTX sm_120a"}),
    ],
)
def test_nvcc_compiles_for_the_card(
    site: Site, one_kernel: Run, code: str, expected: set[str]
) -> None:
    assert one_kernel.code == 0
    site.host.run("cat >/tmp/k.cu", stdin="__global__ void k(int * x) { *x = 1; }\n")
    site.host.run(
        f"cd /tmp && {cuda_wheels.ROOT}/bin/nvcc --generate-code=arch=compute_120a,code={code} "
        "-shared -Xcompiler -fPIC k.cu -o k.so"
    )
    assert set(machine_code(site.host, "/tmp/k.so")) == expected


def test_one_kernel_is_linked_as_it_should_be(site: Site, one_kernel: Run) -> None:
    assert one_kernel.code == 0
    library = f"{site.release()}/lib/libggml-cuda.so"
    assert set(machine_code(site.host, library)) == {"ELF sm_120a"}
    assert_linked(site)


def test_a_second_run_changes_nothing(site: Site, one_kernel: Run) -> None:
    assert one_kernel.code == 0
    again = site.run()
    assert (again.code, again.changed) == (0, [])


@pytest.mark.timeout(4 * 3600)
def test_the_whole_of_llama_cpp(site: Site, one_kernel: Run) -> None:
    """Without the kernels of flash attention, which take most of the time."""
    assert one_kernel.code == 0
    data = {
        "llama_cpp_version": LLAMA_CPP_COMMIT,
        "llama_cpp_cmake_args": {"GGML_CUDA_FA": "OFF"},
    }
    run = site.run(**data)
    assert run.code == 0, run.said[-6000:]
    found = machine_code(site.host, f"{site.release()}/lib/libggml-cuda.so")
    assert set(found) == {"ELF sm_120a"}
    assert found["ELF sm_120a"] > 100
    assert_linked(site)
    again = site.run(**data)
    assert (again.code, again.changed) == (0, [])


def machine_code(host: LabHost, library: str) -> Counter[str]:
    """How many pieces of code a library has, by kind and GPU; PTX is for later."""
    tool = f"{cuda_wheels.ROOT}/bin/cuobjdump"
    said = host.run(f"{tool} --list-elf {library}; {tool} --list-ptx {library}", check=False)
    found = re.findall(r"^(ELF|PTX) file .*\.(sm_\w+)\.(?:cubin|ptx)$", said.stdout, re.MULTILINE)
    return Counter(f"{kind} {gpu}" for kind, gpu in found)


def assert_linked(site: Site) -> None:
    """A release that finds everything on a host with a driver, and knows nothing of stubs."""
    host, release = site.host, site.release()
    library = f"{release}/lib/libggml-cuda.so"
    dynamic = host.run(f"objdump -p {library}").stdout
    needed = set(re.findall(r"NEEDED +(\S+)", dynamic))
    assert {"libcuda.so.1", "libcudart.so.13", "libcublas.so.13"} <= needed
    expected = f"$ORIGIN/../lib:$ORIGIN:{cuda_wheels.ROOT}/lib64"
    for file in (library, f"{release}/bin/llama-server"):
        paths = re.findall(r"(?:RUNPATH|RPATH) +(\S+)", host.run(f"objdump -p {file}").stdout)
        assert paths == [expected], file
    found = dict(re.findall(r"(\S+) => (.+?)(?: \(0x\w+\))?\n", host.run(f"ldd {library}").stdout))
    assert found["libcublas.so.13"] == f"{cuda_wheels.ROOT}/lib64/libcublas.so.13"
    assert found["libcudart.so.13"] == f"{cuda_wheels.ROOT}/lib64/libcudart.so.13"
    # The driver brings it, and there is none: what was linked with was a stub.
    assert [name for name, path in found.items() if path == "not found"] == ["libcuda.so.1"]
    told = json.loads(host.run(f"cat {release}/release.json").stdout)
    assert told["toolkit"] == f"nvcc {cuda_wheels.NVCC}"
    assert told["architectures"] == ["120a-real"]
