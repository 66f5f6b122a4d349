#!/bin/sh
# ExecStartPre of llama-server.service: exits 0 if llama-server, in the sandbox that it will run in, sees as many GPUs as
# it has to. What it saw is kept beside its cache, for the next check of this host.
server=$1
wanted=$2

saw=$("$server" --list-devices 2>&1)
[ -z "${CACHE_DIRECTORY-}" ] || printf '%s\n' "$saw" >"$CACHE_DIRECTORY/gate.log"
found=$(printf '%s\n' "$saw" | grep -cE '^ *CUDA[0-9]+: ')
[ "$found" -lt "$wanted" ] || exit 0

[ "$found" -gt 0 ] && slower="with fewer" || slower="from the CPU"
echo "llama-server sees $found of $wanted GPUs and would serve $slower: it is not started. It said:" >&2
printf '%s\n' "$saw" >&2
if [ ! -d /sys/module/nvidia ] && [ ! -e /dev/dxg ]; then # the sandbox hides /proc/driver
    echo "The NVIDIA driver is not loaded: systemctl status llama-gpu, dmesg" >&2
fi
exit 1
