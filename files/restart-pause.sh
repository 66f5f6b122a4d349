#!/bin/sh
# ExecStartPre of llama-server.service where systemd (before 254) has no RestartSteps: pauses
# longer with each restart in a row, 2, 4, 8 ... 256 s, so that a broken server does not spin.
restarts=$(systemctl show -p NRestarts --value "$1" 2>/dev/null)
pause=0
step=2
while [ "${restarts:-0}" -gt 0 ] && [ "$step" -le 256 ]; do
    pause=$step
    step=$((step * 2))
    restarts=$((restarts - 1))
done
exec sleep "$pause"
