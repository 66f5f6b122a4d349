"""A chat model, an embedding model and a ranking model on one machine.

./run pyinfra inventories/instances.py check.py -y
"""

import os

instances = [
    (
        "@local",
        {
            "_sudo": os.geteuid() != 0,
            "model": "user/chat-model:Q4_K_M",
            "server_instances": {
                "embed": {
                    "model": "user/embedding-model:Q8_0",
                    "server_port": 8081,
                    "server_purpose": "embed",
                },
                "rerank": {
                    "model": "user/ranking-model:Q8_0",
                    "server_port": 8082,
                    "server_purpose": "rerank",
                },
            },
        },
    )
]
