"""This distribution inside Windows Subsystem for Linux. docs/wsl.md says what Windows needs first.

    ./run pyinfra inventories/wsl.py check.py -y
    ./run pyinfra inventories/wsl.py deploy.py -y

It needs the model, on the command line (--data model=user/repo:Q4_K_M) or below.
What is left out is chosen for the host; docs/settings.md lists all of it.
"""

import os
import subprocess

# Root needs no sudo; who may use it without a password is not asked for one.
_root = os.geteuid() == 0
_sudo = ["sudo", "-n", "true"]
_passwordless = _root or subprocess.run(_sudo, capture_output=True, check=False).returncode == 0

wsl = [
    (
        "@local",
        {
            "_sudo": not _root,
            "_use_sudo_password": not _passwordless,
            # If Windows shows no NVIDIA card, this is an error instead of a server on the CPU.
            # The driver is that of Windows, and nothing of one is ever installed inside WSL. The
            # toolkit is the best that fits the distribution and runs on the Windows driver.
            "llama_cpp_backend": "cuda",
            # Windows reaches the server at http://localhost:8080, and nobody else does.
            "server_host": "127.0.0.1",
            "server_port": 8080,
        },
    )
]
