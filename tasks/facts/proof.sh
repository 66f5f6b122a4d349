# Asks the running server what it is and lets it work, as lines of `key<TAB>value`; answers
# are JSON on one line. Before it stand: url, key_file, unit, props and question (paths), request.
tab=$(printf '\t')
# The key goes in by a pipe: a process list would show it.
ask() {
    path=$1
    shift
    { [ -z "$key_file" ] || printf 'header = "Authorization: Bearer %s"\n' "$(cat "$key_file")"; } |
        curl -K - -sS --noproxy '*' --max-time 300 "$@" "$url$path" 2>&1 | tr -d '\n\t'
}
printf 'health\t%s\n' "$(curl -s -o /dev/null -w '%{http_code}' --noproxy '*' --max-time 10 "$url/health")"
printf 'props\t%s\n' "$(ask "$props")"
printf 'answer\t%s\n' "$(ask "$question" -H 'Content-Type: application/json' -d "$request")"
pid=$(systemctl show "$unit" -p MainPID --value)
pids=$(printf '%s ' "$pid" "$(cat "/proc/$pid/task/"*/children 2>/dev/null)" | sed 's/ *$//') # a router has several
printf 'executable\t%s\n' "$(readlink "/proc/$pid/exe")"
for each in $pids; do
    sed -n "s/^VmRSS: *\([0-9]*\) kB/memory_kib$tab\1/p" "/proc/$each/status" 2>/dev/null
done
# The log may be gone after weeks; what the process holds of the GPU is not.
printf 'gpu_handles\t%s\n' "$(for each in $pids; do find "/proc/$each/fd" -lname '/dev/nvidia*' -o -lname /dev/dxg 2>/dev/null; done | grep -c .)"
command -v nvidia-smi >/dev/null 2>&1 &&
    nvidia-smi --query-compute-apps=pid,used_gpu_memory --format=csv,noheader,nounits 2>/dev/null |
    sed -n "s/^ *\($(printf %s "$pids" | sed 's/  */\\|/g')\), *\([0-9]*\).*/gpu_memory_mib$tab\2/p"
invocation=$(systemctl show "$unit" -p InvocationID --value)
journalctl -q --no-pager -o cat "_SYSTEMD_INVOCATION_ID=$invocation" 2>/dev/null |
    grep -E 'offloaded [0-9]+/[0-9]+ layers|found [0-9]+ CUDA devices|using device |  Device [0-9]+: |model buffer size|KV buffer size|compute buffer size|n_layer ' |
    tail -n 60 | sed "s/^/log$tab/"
printf 'exposure\t%s\n' "$(systemd-analyze security "$unit" --no-pager 2>/dev/null | sed -n 's/.*Overall exposure level for [^:]*: \([0-9.]*\).*/\1/p')"
printf 'end\t1\n'
