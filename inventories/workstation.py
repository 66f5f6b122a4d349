"""This machine: an Ubuntu 24.04 workstation with a GeForce RTX 5090 that serves its network.

    ./run pyinfra inventories/workstation.py check.py -y
    ./run pyinfra inventories/workstation.py deploy.py -y

It needs the model, on the command line (--data model=user/repo:Q4_K_M) or below.
What is left out is chosen for the host; docs/settings.md lists all of it.
"""

import os
import subprocess

# Root needs no sudo; who may use it without a password is not asked for one.
_root = os.geteuid() == 0
_sudo = ["sudo", "-n", "true"]
_passwordless = _root or subprocess.run(_sudo, capture_output=True, check=False).returncode == 0

workstation = [
    (
        "@local",
        {
            "_sudo": not _root,
            "_use_sudo_password": not _passwordless,
            # The card must be there: without it this is an error, not a server on the CPU.
            "llama_cpp_backend": "cuda",
            # The driver: Blackwell takes the open modules of branch 570 and newer. One that is
            # there and suffices stays; else it is 580, which gets fixes until 2028 and which
            # Ubuntu has with signed modules, so that Secure Boot may stay on.
            "driver_source": "auto",
            # What CUDA needs of it. With "desktop" the screen is driven by it too.
            "driver_flavour": "compute",
            # The toolkit: 12.8 is the first that knows the card, 12.9 the last of its line, and
            # every driver for the card runs what it compiles. (13.2.0 and 13.2.1 miscompile IQ
            # quants for it.) Leave this out on Debian 13 and Ubuntu 26.04, whose C library is too
            # new for 12.9: there it is 13.2.2 or newer.
            "cuda_version": "12.9",
            # Only what compiling llama.cpp takes: about 1 GB to download instead of 3.5.
            "cuda_packages": "minimal",
            # What llama.cpp is compiled with follows from the card and needs no setting: 120a with
            # its FP4 instructions, and no GGML_CUDA_FORCE_CUBLAS, which would switch those off.
            #
            # gpt-oss-20b in 4 bits takes 13 GB of the card's 32, and its cache for 65,536 tokens
            # 1.6 GB, since half of its layers look back 128 tokens only.
            "server_alias": "gpt-oss-20b",
            "server_ctx_size": 65536,
            # One request at a time. With n of them each has server_ctx_size tokens, and the cache
            # is n times as large.
            "server_parallel": 1,
            # Prompts are read in pieces of 2048 tokens, of which the GPU works on 512 at a time.
            "server_batch_size": 2048,
            "server_ubatch_size": 512,
            # Every layer on the card: the CPU only feeds it, one thread as well as many.
            "server_gpu_layers": "all",
            "server_threads": 1,
            "server_threads_batch": 1,
            # Requests are taken and answered by four.
            "server_threads_http": 4,
            # Measured on an H200: 13 to 19 % more tokens a second than without.
            "server_flash_attn": "on",
            # What is kept in the machine's own memory is never swapped out.
            "server_load_mode": "mlock",
            # The first request warms it up, not the start.
            "server_extra_args": ["--no-warmup"],
            # The fastest card alone, should there be a second one for the screen.
            "server_environment": {"CUDA_VISIBLE_DEVICES": "0"},
            # For the whole network, which takes an API key: it is made at the first deploy and
            # lies in /etc/llamastead/api-key. With 127.0.0.1 the machine serves only itself.
            "server_host": "0.0.0.0",
            "server_port": 8004,
            # Numbers for Prometheus at /metrics.
            "server_metrics": True,
        },
    )
]
