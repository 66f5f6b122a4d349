# Everything that matters about a host, in one round trip: lines of `key<TAB>value`.
# Reads only. POSIX sh and coreutils; what is missing is simply not said.
# Before it stand: port, model_path, files, packages, lock, server_unit.
export LC_ALL=C
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
say() { [ -z "$2" ] || printf '%s\t%s\n' "$1" "$2"; }
first() { sed -n 1p "$1" 2>/dev/null; }
have() { command -v "$1" >/dev/null 2>&1; }

say uid "$(id -u)"
say hostname "$(first /proc/sys/kernel/hostname)"
say arch "$(uname -m)"
say kernel "$(first /proc/sys/kernel/osrelease)"
[ ! -r /etc/os-release ] || sed -n 's/^\(ID\|VERSION_ID\|VERSION_CODENAME\|PRETTY_NAME\)=/os.\1\t/p' \
    /etc/os-release | tr -d '"'"'"
[ ! -e /dev/dxg ] || say dxg yes
[ ! -d /run/systemd/system ] || say systemd_running yes
have systemctl && say systemd_version "$(systemctl --version 2>/dev/null | sed -n '1s/^systemd \([0-9]*\).*/\1/p')"
have systemd-detect-virt && say virtualization "$(systemd-detect-virt 2>/dev/null)"

say cores "$(nproc 2>/dev/null)"
sed -n 's/^MemTotal: *\([0-9]*\) kB/memory_kib\t\1/p; s/^MemAvailable: *\([0-9]*\) kB/memory_available_kib\t\1/p' \
    /proc/meminfo 2>/dev/null
say cpu_model "$(sed -n 's/^model name[^:]*: *//p' /proc/cpuinfo 2>/dev/null | sed -n 1p)"
for place in /opt/llama.cpp /var/lib/llamastead /var/cache/llamastead /usr; do
    # A disk of its own may be mounted there; before the first deploy the parent's counts.
    folder=$place
    [ -d "$folder" ] || folder=${place%/*}
    df -P -B1 "$folder" 2>/dev/null | {
        read -r _
        read -r _ _ _ free _ mount && say disk "$place $free $mount"
    }
done

for folder in /opt/llama.cpp /opt/llama.cpp/releases /var/lib/llamastead /var/cache/llamastead /etc/llamastead \
    /usr/local/lib/llamastead; do
    [ -d "$folder" ] && say folder "$folder $(stat -L -c '%a %U' "$folder")"
done
[ ! -e /opt/llama.cpp/.git ] || say checkout /opt/llama.cpp
say unprivileged_port "$(first /proc/sys/net/ipv4/ip_unprivileged_port_start)"

say glibc "$(getconf GNU_LIBC_VERSION 2>/dev/null | sed 's/^glibc //')"
for gxx in /usr/bin/g++ /usr/bin/g++-[0-9]*; do
    [ -x "/usr/bin/gcc${gxx#/usr/bin/g++}" ] || continue
    say compiler "${gxx#/usr/bin/} $("$gxx" -dumpfullversion 2>/dev/null)"
done
# What the compiler makes of this CPU. /proc/cpuinfo names more with each kernel, which changes no build.
case $(uname -m) in aarch64) native=-mcpu=native ;; *) native=-march=native ;; esac
have g++ && say cpu_target "$(g++ "$native" -Q --help=target 2>/dev/null | sha256sum | cut -d' ' -f1)"
for tool in cmake ninja git curl ccache; do
    have "$tool" && say tool "$tool $("$tool" --version 2>/dev/null | sed -n 1p)"
done
if have dpkg-query; then
    set -f # patterns are for dpkg, not for the files around here
    # shellcheck disable=SC2086  # a list of names and patterns
    dpkg-query -W -f='${db:Status-Abbrev}\t${Package}\t${Version}\n' $packages 2>/dev/null |
        sed -n 's/^h.*\t\(.*\)\t.*$/held\t\1\n&/; s/\(^\|\n\).i.*\t\(.*\)\t\(.*\)$/\1package\t\2 \3/p'
    dpkg-query -W -f='${db:Status-Abbrev}\t${Package}\n' 2>/dev/null |
        sed -n 's/^.[UFHWt].*\t\(.*\)$/dpkg_broken\t\1/p; s/^..R.*\t\(.*\)$/dpkg_broken\t\1/p'
    set +f
fi

for device in /sys/bus/pci/devices/*; do
    class=$(first "$device/class")
    case $class in 0x03*) ;; *) continue ;; esac
    driver=$(readlink "$device/driver" 2>/dev/null)
    bar1=
    if [ -r "$device/resource" ]; then
        while read -r start end _; do
            # Addresses beyond 2^63 do not occur; a window that is not there is 0 to 0.
            [ "$end" = 0x0000000000000000 ] && continue
            size=$((end - start + 1))
            [ "$size" -le "${bar1:-0}" ] || bar1=$size
        done <"$device/resource"
    fi
    say gpu "${device##*/} $(first "$device/vendor") $(first "$device/device") $class ${driver##*/}|$bar1|$(first "$device/subsystem_vendor")|$(first "$device/subsystem_device")"
done
seen=
for nvcc in /usr/local/cuda*/bin/nvcc /opt/cuda/bin/nvcc /usr/bin/nvcc; do
    [ -x "$nvcc" ] || continue
    # NVIDIA's packages make links for the newest one of each kind; another may be the newest tomorrow.
    root=$(readlink -f "${nvcc%/bin/nvcc}")
    case "$seen " in *" $root "*) continue ;; esac
    seen="$seen $root"
    say toolkit "$root $("$nvcc" --version 2>/dev/null | sed -n 's/.*, V\([0-9.]*\).*/\1/p')"
    [ -e "$root/include/cublas_v2.h" ] || say toolkit_without_cublas "$root"
done

for release in /opt/llama.cpp/releases/*/release.json; do
    [ -x "${release%/*}/bin/llama-server" ] && [ -r "$release" ] && say release "$(tr -d '\n' <"$release")"
done
for link in current previous; do
    target=$(readlink "/opt/llama.cpp/$link" 2>/dev/null)
    [ ! -d "/opt/llama.cpp/$link/" ] || say "$link" "${target##*/}"
done
for blob in /var/lib/llamastead/models/blobs/*; do
    [ -f "$blob" ] && say blob "${blob##*/} $(stat -c %s "$blob")"
done
find /var/lib/llamastead/models -type l -printf 'link\t%p\t%l\n' 2>/dev/null
for part in /var/lib/llamastead/incoming/*.part; do
    [ -f "$part" ] && name=${part##*/} && say partial "${name%.part} $(stat -c %s "$part")"
done
for record in /var/lib/llamastead/models/records/*.json; do
    [ -f "$record" ] && say record "$record $(stat -c %Y "$record") $(first "$record")"
done
if [ -n "$model_path" ]; then
    if [ -f "$model_path" ]; then
        say model_path "exists"
        say model_size "$(stat -L -c %s "$model_path")"
        say model_mode "$(stat -L -c %a "$model_path")"
        say model_magic "$(od -An -N4 -tx1 "$model_path" 2>/dev/null | tr -d ' \n')"
        key=$(printf '%s' "$model_path" | sha256sum | cut -d' ' -f1)
        verified=$(first "/var/lib/llamastead/verified/$key")
        now=$(stat -L -c '%s %Y %i' "$model_path")
        [ "${verified#* }" != "$now" ] || say model_verified "${verified%% *}"
    else
        say model_path "missing"
    fi
fi
for file in $files; do
    [ -f "$file" ] && say file "$file $(sha256sum <"$file" | cut -d' ' -f1) $(stat -c '%a %U %G' "$file")"
done
for user in llama llamastead; do
    id "$user" >/dev/null 2>&1 && say user "$user"
done

main_pid=0
if [ -d /run/systemd/system ] && have systemctl; then
    # Only where the unit is there: asking for an unknown one costs a bus call and says nothing.
    if [ -e "/etc/systemd/system/$server_unit" ]; then
        systemctl show "$server_unit" -p ActiveState,SubState,UnitFileState,MainPID,NeedDaemonReload \
            2>/dev/null | sed 's/^\([A-Za-z]*\)=/server.\1\t/'
        main_pid=$(systemctl show "$server_unit" -p MainPID --value 2>/dev/null)
        if [ "${main_pid:-0}" -gt 0 ]; then
            executable=$(readlink "/proc/$main_pid/exe" 2>/dev/null)
            releases=$(readlink -f /opt/llama.cpp/releases) # /opt may be a link to a larger disk
            case $executable in
                "${releases:-none}"/*) executable=/opt/llama.cpp/releases/${executable#"$releases"/} ;;
            esac
            say server.executable "$executable"
            say server.anonymous_kib "$(sed -n 's/^RssAnon: *\([0-9]*\) kB/\1/p' "/proc/$main_pid/status" 2>/dev/null)"
            say server.digest "$(tr '\0' '\n' <"/proc/$main_pid/environ" 2>/dev/null | sed -n 's/^LLAMASTEAD_DIGEST=//p')"
        fi
    fi
    systemctl list-units --all --plain --no-legend 'llamastead-*.service' 2>/dev/null |
        sed -n 's/^\(llamastead-[^ ]*\) *[^ ]* *[^ ]* *\([^ ]*\) .*/job\t\1 \2/p'
fi

if [ "${port:-0}" -gt 0 ]; then
    hex=$(printf '%04X' "$port")
    inode=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
        sed -n "s/^ *[0-9]*: [0-9A-F]*:$hex [0-9A-F]*:[0-9A-F]* 0A \([^ ]* *\)\{5\}\([0-9]*\).*/\2/p" | sed -n 1p)
    if [ -n "$inode" ]; then
        if [ "${main_pid:-0}" -gt 0 ] &&
            find "/proc/$main_pid/fd" -maxdepth 1 -lname "socket:\[$inode\]" 2>/dev/null | grep -q .; then
            say listener "ours $main_pid"
        else
            holder=$(find /proc/[0-9]*/fd -maxdepth 1 -lname "socket:\[$inode\]" 2>/dev/null | sed -n 1p)
            holder=${holder#/proc/}
            holder=${holder%%/*}
            say listener "other $holder $(first "/proc/${holder:-none}/comm")"
        fi
    fi
fi

if [ -e "$lock" ] && have flock && ! flock -w 2 "$lock" true 2>/dev/null; then
    say locked_by "$(first "$lock")"
fi
