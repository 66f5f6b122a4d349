# Everything that matters about a host, in one round trip: lines of `key<TAB>value`.
# Reads only. POSIX sh and coreutils; what is missing is simply not said.
# Before it stand: ports, model_paths (one on each line), files (patterns), packages, lock.
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
        # Of several mounts in one place the last is what is seen.
        last=
        while read -r _ at _ options _; do
            [ "$at" != "$mount" ] || last=$options
        done </proc/mounts
        case ,$last, in *,noexec,*) say noexec "$place" ;; esac
    } 2>/dev/null
done
printf '%s\n' /opt/llama.cpp /var/lib/llamastead/models "$model_paths" | while IFS= read -r path; do
    [ -n "$path" ] || continue
    real=$(readlink -m "$path" 2>/dev/null)
    [ "${real:-$path}" = "$path" ] || printf 'real\t%s\t%s\n' "$path" "$real"
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
find -H /var/lib/llamastead/models -mindepth 1 -type l -printf 'link\t%p\t%l\n' 2>/dev/null
for part in /var/lib/llamastead/incoming/*.part; do
    [ -f "$part" ] && name=${part##*/} && say partial "${name%.part} $(stat -c %s "$part")"
done
for record in /var/lib/llamastead/models/records/*.json; do
    [ -f "$record" ] && say record "$record $(stat -c %Y "$record") $(first "$record")"
done
printf '%s\n' "$model_paths" | while IFS= read -r path; do
    [ -n "$path" ] || continue
    if [ ! -f "$path" ]; then
        say no_model_path "$path"
        continue
    fi
    now=$(stat -L -c '%s %Y %i' "$path")
    key=$(printf '%s' "$path" | sha256sum | cut -d' ' -f1)
    verified=$(first "/var/lib/llamastead/verified/$key")
    [ "${verified#* }" = "$now" ] || verified=
    magic=$(od -An -N4 -tx1 "$path" 2>/dev/null | tr -d ' \n')
    verified=${verified%% *}
    say model_path "$(stat -L -c '%s %a' "$path") ${magic:--} ${verified:--} $path"
done
for file in $files; do
    [ -f "$file" ] && say file "$file $(sha256sum <"$file" | cut -d' ' -f1) $(stat -c '%a %U %G' "$file")"
done
for user in llama llamastead; do
    id "$user" >/dev/null 2>&1 && say user "$user"
done

releases=$(readlink -f /opt/llama.cpp/releases) # /opt may be a link to a larger disk
held=
for file in /etc/systemd/system/llama-server.service /etc/systemd/system/llama-server@?*.service; do
    # Only what is there: asking for an unknown unit costs a bus call and says nothing.
    [ -e "$file" ] || continue
    unit=${file##*/}
    [ ! -f "$file" ] || say service "$unit mark $(first "$file")"
    for drop_in in "$file.d"/*.conf; do
        [ ! -f "$drop_in" ] || say service "$unit drop_in $drop_in"
    done
    gate=/var/cache/llama-server${unit#llama-server}
    sed -n "s/[[:cntrl:]]//g; s/^.*\(CUDA\|cuda\|NVIDIA\).*\$/service\t$unit gate &/p" "${gate%.service}/gate.log" 2>/dev/null |
        sed -n 1,3p
    { [ -d /run/systemd/system ] && have systemctl; } || continue
    systemctl show "$unit" -p ActiveState,SubState,UnitFileState,MainPID,NeedDaemonReload 2>/dev/null |
        sed "s/^\([A-Za-z]*\)=/service\t$unit \1 /"
    main_pid=$(systemctl show "$unit" -p MainPID --value 2>/dev/null)
    [ "${main_pid:-0}" -gt 0 ] || continue
    held="$held $unit=$main_pid"
    executable=$(readlink "/proc/$main_pid/exe" 2>/dev/null)
    case $executable in
        "${releases:-none}"/*) executable=/opt/llama.cpp/releases/${executable#"$releases"/} ;;
    esac
    say service "$unit executable $executable"
    say service "$unit digest $(tr '\0' '\n' <"/proc/$main_pid/environ" 2>/dev/null | sed -n 's/^LLAMASTEAD_DIGEST=//p')"
    anonymous=0
    for pid in $main_pid $(cat "/proc/$main_pid/task/"*/children 2>/dev/null); do
        kib=$(sed -n 's/^RssAnon: *\([0-9]*\) kB/\1/p' "/proc/$pid/status" 2>/dev/null)
        anonymous=$((anonymous + ${kib:-0}))
    done
    say service "$unit anonymous_kib $anonymous"
done
if [ -d /run/systemd/system ] && have systemctl; then
    systemctl list-units --all --plain --no-legend 'llamastead-*.service' 2>/dev/null |
        sed -n 's/^\(llamastead-[^ ]*\) *[^ ]* *[^ ]* *\([^ ]*\) .*/job\t\1 \2/p'
fi

for port in $ports; do
    hex=$(printf '%04X' "$port")
    inode=$(cat /proc/net/tcp /proc/net/tcp6 2>/dev/null |
        sed -n "s/^ *[0-9]*: [0-9A-F]*:$hex [0-9A-F]*:[0-9A-F]* 0A \([^ ]* *\)\{5\}\([0-9]*\).*/\2/p" | sed -n 1p)
    [ -n "$inode" ] || continue
    unit=
    for each in $held; do
        find "/proc/${each##*=}/fd" -maxdepth 1 -lname "socket:\[$inode\]" 2>/dev/null | grep -q . && unit=${each%=*}
    done
    if [ -n "$unit" ]; then
        say listener "$port ours $unit"
    else
        holder=$(find /proc/[0-9]*/fd -maxdepth 1 -lname "socket:\[$inode\]" 2>/dev/null | sed -n 1p)
        holder=${holder#/proc/}
        holder=${holder%%/*}
        say listener "$port other ${holder:--} $(first "/proc/${holder:-none}/comm")"
    fi
done

if [ -e "$lock" ] && have flock && ! flock -w 2 "$lock" true 2>/dev/null; then
    say locked_by "$(first "$lock")"
fi
