"""The process that serves the outside of one lab, until it is ended with the lab.

Started by `Lab.up` as `python -m tests.lab.supervisor`, in a process group of the lab's own.
"""

from __future__ import annotations

import argparse
import logging
import os
import threading
from pathlib import Path

from werkzeug.serving import make_server

from .access import AccessLog
from .faults import FaultFile
from .hub import Hub, HubStore
from .network import CDN_PORT, PROXY_PORT, WEB_PORT
from .proxy import Destination, Policy, Proxy
from .roots import apt_proxies
from .web import Web


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="the lab's folder")
    parser.add_argument("--address", required=True, help="address of this machine in the lab")
    parser.add_argument("--packages", type=Path, required=True, help="where to keep packages")
    options = parser.parse_args()

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # there is a log of our own
    for scheme, proxy_url in apt_proxies().items():
        os.environ.setdefault(f"{scheme}_proxy", proxy_url)
    directory: Path = options.directory
    subnet = options.address.rpartition(".")[0] + "."
    log = AccessLog(directory / "access.jsonl")
    faults = FaultFile(directory / "faults.json")
    store = HubStore(directory / "hub.json", directory / "www")
    hub = Hub(store, f"http://{options.address}:{CDN_PORT}")
    web = Web(directory / "www", directory / "git", hub, faults, log, subnet)
    own = [Destination(options.address, port) for port in (WEB_PORT, CDN_PORT)]
    policy = Policy(subnet, directory / "allowed_hosts", own)
    proxy = Proxy((options.address, PROXY_PORT), policy, log, options.packages)
    servers = [
        make_server(options.address, port, web, threaded=True) for port in (WEB_PORT, CDN_PORT)
    ]
    for serve in (proxy.serve_forever, *(server.serve_forever for server in servers)):
        threading.Thread(target=serve).start()


if __name__ == "__main__":
    main()
