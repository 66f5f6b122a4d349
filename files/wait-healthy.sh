#!/bin/sh
# ExecStartPost of llama-server.service: returns 0 once the server at the given URL is healthy, and as a router has loaded
# as many models as the second argument says; 1 as soon as its process is gone, or a model cannot be loaded. systemd's
# TimeoutStartSec bounds the wait.
# (A signal reaches the server, but its folder in /proc is hidden: this runs in a user namespace
# of its own, and ProtectProc shows nothing of another.)
url=$1
models=${2:-0}
key=${CREDENTIALS_DIRECTORY:+$CREDENTIALS_DIRECTORY/api-key}

ask() {
    { [ ! -r "$key" ] || printf 'header = "Authorization: Bearer %s"\n' "$(cat "$key")"; } |
        curl -K - -s --noproxy '*' --max-time 5 "$@"
}
count() { printf '%s' "$told" | grep -oF "$1" | grep -c .; }

while kill -0 "$MAINPID" 2>/dev/null; do
    if [ "$(ask -o /dev/null -w '%{http_code}' "$url/health")" = 200 ]; then
        [ "$models" -gt 0 ] || exit 0
        told=$(ask "$url/models")
        [ "$(count '"value":"loaded"')" -lt "$models" ] || exit 0
        if [ "$(count '"failed":true')" -gt 0 ]; then
            echo "llama-server could not load every model" >&2
            exit 1
        fi
    fi
    sleep 0.2
done
echo "llama-server stopped before it was ready" >&2
exit 1
