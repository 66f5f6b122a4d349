#!/bin/sh
# ExecStartPost of llama-server.service: returns 0 once the server answers 200 at the given URL,
# 1 as soon as its process is gone. systemd's TimeoutStartSec bounds the wait.
# (A signal reaches the server, but its folder in /proc is hidden: this runs in a user namespace
# of its own, and ProtectProc shows nothing of another.)
while kill -0 "$MAINPID" 2>/dev/null; do
    code=$(curl -s -o /dev/null -w '%{http_code}' --noproxy '*' --max-time 5 "$1")
    [ "$code" = 200 ] && exit 0
    sleep 0.2
done
echo "llama-server stopped before it was ready" >&2
exit 1
