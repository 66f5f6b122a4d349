"""Throwaway hosts on this machine, which this file brings up, to try a deploy on.

    ./run pyinfra inventories/lab.py deploy.py -y

needs root. `./run python -m tests.lab down` takes them away again. LAB_DISTRIBUTION (debian-13) and
LAB_HOSTS (1) say what they are and how many.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.operations.release import WORK
from tests import lab as _lab


def _hosts():
    count = os.environ.get("LAB_HOSTS", "1")
    if not count.isdigit() or not 1 <= int(count) <= 100:
        raise _lab.LabError(f"LAB_HOSTS={count}: a number from 1 to 100, please")
    lab = _lab.Lab()
    hosts = lab.host_group(
        int(count),
        os.environ.get("LAB_DISTRIBUTION", "debian-13"),
        binds={_lab.compiler_cache(): f"{WORK}/ccache"},
    )
    outside = lab.outside
    data = {
        "ssh_user": "root",
        "ssh_key": str(lab.ssh_key),
        "ssh_known_hosts_file": str(lab.known_hosts),
        "ssh_strict_host_key_checking": "yes",
        "ssh_allow_agent": False,
        "ssh_look_for_keys": False,
        "llama_cpp_repo": outside.git_url,
        "llama_cpp_version": outside.llama_cpp_commit,
        "model": outside.model_url,
        "model_sha256": outside.model_sha256,
        "server_ctx_size": 2048,
        "proxy_http": outside.proxy_url,
        "proxy_https": outside.proxy_url,
    }
    return [(host.name, {"ssh_hostname": host.address, **data}) for host in hosts]


try:
    lab = _hosts()
except _lab.LabError as error:
    sys.exit(f"error: {error}")
