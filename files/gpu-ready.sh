#!/bin/sh
# ExecStart of llama-gpu.service: loads NVIDIA's modules, waits for the given number of cards, for at most the given
# number of seconds, and makes the device nodes that udev has not made.
count=$1
seconds=$2

# Loaded already where the kernel is another's, as in a container.
[ -e /proc/driver/nvidia/version ] || modprobe nvidia || {
    echo "the kernel does not load the nvidia module: see dmesg, dkms status, and whether Secure Boot refuses it" >&2
    exit 1
}
grep -q ' nvidia-uvm$' /proc/devices || modprobe nvidia-uvm || exit 1

cards() { find /proc/driver/nvidia/gpus -mindepth 1 -maxdepth 1 2>/dev/null | grep -c .; }
waited=0
while [ "$(cards)" -lt "$count" ] && [ "$waited" -lt "$seconds" ]; do
    sleep 1
    waited=$((waited + 1))
done
[ "$(cards)" -ge "$count" ] || echo "after $seconds s the driver shows $(cards) of $count cards" >&2

# What udev would do; see NVIDIA's driver installation guide, device nodes.
parameter() { sed -n "s/^$1: *//p" /proc/driver/nvidia/params 2>/dev/null; }
major() { sed -n "s/^ *\([0-9]*\) $1\$/\1/p" /proc/devices | head -n 1; }
node() {
    [ -e "$1" ] || [ -z "$2" ] || mknod "$1" c "$2" "$3" || return
    chown "$(parameter DeviceFileUID):$(parameter DeviceFileGID)" "$1"
    chmod "$(printf '%o' "$(parameter DeviceFileMode)")" "$1"
}
if [ "$(parameter ModifyDeviceFiles)" != 0 ]; then
    control=$(major nvidiactl)
    [ -n "$control" ] || control=$(major nvidia-frontend)
    node /dev/nvidiactl "$control" 255
    uvm=$(major nvidia-uvm)
    node /dev/nvidia-uvm "$uvm" 0
    node /dev/nvidia-uvm-tools "$uvm" 1
    for card in /proc/driver/nvidia/gpus/*/information; do
        minor=$(sed -n 's/^Device Minor: *//p' "$card" 2>/dev/null)
        [ -z "$minor" ] || node "/dev/nvidia$minor" "${control}" "$minor"
    done
fi
[ "$(cards)" -ge "$count" ]
