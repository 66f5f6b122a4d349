"""This machine itself."""

import os

local = [
    (
        "@local",
        {
            # As anybody but root, through sudo; where it wants a password, pyinfra asks for it.
            "_sudo": os.geteuid() != 0,
            # The model to serve, and its SHA-256. On the command line:
            #   --data model=https://.../model.gguf --data model_sha256=...
            # docs/settings.md lists everything else that can be set here.
        },
    )
]
