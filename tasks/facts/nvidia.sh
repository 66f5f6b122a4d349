# What there is of NVIDIA's driver, CUDA and containers, and what stands in their way.
# Goes on from probe.sh, in the same words. Before it stand also: mok_keys, retired_key, uninstallers.

# The driver: what runs, what would be loaded, and the libraries to it.
tab=$(printf '\t')
say driver_loaded "$(first /proc/driver/nvidia/version)"
say driver_loaded "$(first /sys/module/nvidia/version)"
# Debian's packages rename their modules, and tell modprobe.
for name in nvidia nvidia-current nvidia-current-open; do
    modinfo "$name" >/dev/null 2>&1 || continue # there is none of that name, or no modinfo
    modinfo "$name" | sed -n 's/^\(version\|license\|signer\): *\(.*\)/driver_on_disk.\1\t\2/p'
    break
done
# As the loader finds it (not the one for 32 bits), or where containers get it. Its own name has the version.
library=
have ldconfig && library=$(ldconfig -p 2>/dev/null | sed -n 's/^[[:space:]]*libcuda\.so\.1 (libc6,[^)]*64.*) => //p' | sed -n 1p)
library=$(readlink -f "${library:-/usr/local/nvidia/lib64/libcuda.so.1}" 2>/dev/null)
[ ! -e "$library" ] || say driver_library "${library##*/libcuda.so.}"
have nvidia-smi && say nvidia_smi "$(command -v nvidia-smi)"

# Kernels, and what DKMS has built for them. `dkms status` is slow; its folders say the same.
for folder in /lib/modules/*; do
    [ -e "$folder/modules.builtin" ] || continue # headers without their kernel
    headers=no nvidia=no
    [ -e "$folder/build/Makefile" ] && headers=yes
    grep -qs '/nvidia\(-current\)\{0,1\}\(-open\)\{0,1\}\.ko[.a-z0-9]*:' "$folder/modules.dep" && nvidia=yes
    say kernel_installed "${folder##*/} $headers $nvidia"
done
for folder in /var/lib/dkms/nvidia*/[0-9]*; do
    [ -d "$folder" ] || continue
    name=${folder#/var/lib/dkms/}
    say dkms "${name%%/*} ${folder##*/}"
    for built in "$folder"/*/*/module; do
        [ -d "$built" ] || continue
        built=${built#"$folder"/}
        say dkms_built "${name%%/*} ${folder##*/} ${built%%/*}"
    done
    # DKMS takes this folder away when a build has succeeded.
    say dkms_failed "$(sed -n "s|.* for kernel \([^ ]*\).*|${name%%/*} ${folder##*/} \1|p;5q" "$folder/build/make.log" 2>/dev/null)"
done

# Secure Boot: the last byte of each variable. Shim may have been told not to look.
efi=/sys/firmware/efi/efivars
secure_boot=$(od -An -tu1 -j4 -N1 "$efi/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c" 2>/dev/null | tr -d ' ')
insecure=$(od -An -tu1 -j4 -N1 "$efi/MokSBStateRT-605dab50-e046-4300-abb6-3dd810dd8b23" 2>/dev/null | tr -d ' ')
[ "$insecure" != 1 ] || secure_boot=0
say secure_boot "$secure_boot"
for key in $mok_keys; do
    [ -r "$key" ] || continue
    answer=
    have mokutil && answer=$(mokutil --test-key "$key" 2>&1 | tr '\n' ' ')
    say mok_key "$key $answer"
done

# Who else wants the card.
[ ! -d /sys/module/nouveau ] || say nouveau loaded
if grep -qsE '^[[:space:]]*blacklist[[:space:]]+nouveau' /etc/modprobe.d/*.conf /run/modprobe.d/*.conf \
    /lib/modprobe.d/*.conf /usr/lib/modprobe.d/*.conf ||
    grep -qsE '(modprobe|rd\.driver)\.blacklist=([^ ]*,)?nouveau' /proc/cmdline; then
    say nouveau blacklisted
fi
# shellcheck disable=SC2086  # patterns
for uninstaller in $uninstallers; do
    [ -e "$uninstaller" ] && say runfile "$uninstaller"
done

# apt: what has to do with NVIDIA, and who upgrades packages behind everybody's back.
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    grep -qsi 'nvidia\|cuda' "$file" || continue
    case $file in
        *.sources) sed -n "s|^\(\([A-Za-z-]*\): *\(.*\)\)\{0,1\}$|apt_stanza\t$file \1|p" "$file" ;;
        *) sed -n "s|^[[:space:]]*\(deb[[:space:]].*[Nn][Vv][Ii][Dd][Ii][Aa].*\)|apt_line\t$file \1|p" "$file" ;;
    esac
done
for file in /etc/apt/preferences /etc/apt/preferences.d/*; do
    grep -qsi 'nvidia\|cuda' "$file" || continue
    sed -n "s,^\(Package\|Pin\|Pin-Priority\):[[:space:]]*\(.*\),apt_pin\t$file \1 \2,p" "$file"
done
# A keyring names its keys by their last eight bytes.
# shellcheck disable=SC2059  # the format is the key
grep -lsaF "$(printf "$retired_key")" /etc/apt/trusted.gpg /etc/apt/trusted.gpg.d/*.gpg /etc/apt/keyrings/* \
    /usr/share/keyrings/*.gpg 2>/dev/null | sed "s/^/retired_key$tab/"
if have unattended-upgrade; then
    apt-config dump 2>/dev/null | sed -n 's/^APT::Periodic::Unattended-Upgrade "\(.*\)";/unattended\t\1/p
        s/^Unattended-Upgrade::Package-Blacklist:: "\(.*\)";/unattended_blacklist\t\1/p'
fi

# Containers.
for engine in docker podman containerd; do
    have "$engine" && say engine "$engine $("$engine" --version 2>/dev/null | sed -n 1p)"
done
have nvidia-ctk && say container_toolkit "$(nvidia-ctk --version 2>/dev/null | sed -n 1p)"
for spec in /etc/cdi/* /var/run/cdi/*; do
    [ -f "$spec" ] && say cdi_spec "$spec"
done
[ ! -r /etc/docker/daemon.json ] || say docker_config "$(tr -d '\n\t' </etc/docker/daemon.json)"

# Inside WSL there is no PCI bus: Windows's driver is asked.
case $(first /proc/sys/kernel/osrelease) in
    *[Mm]icrosoft*)
        [ ! -e /usr/lib/wsl/lib/libcuda.so.1 ] || say wsl_libcuda yes
        [ ! -x /usr/lib/wsl/lib/nvidia-smi ] ||
            timeout 20 /usr/lib/wsl/lib/nvidia-smi --format=csv,noheader,nounits \
                --query-gpu=pci.bus_id,pci.device_id,memory.total,driver_version 2>/dev/null | sed "s/^/wsl_gpu$tab/"
        say wsl_systemd "$(sed -n '/^\[boot\]/,/^\[[^b]/s/^[[:space:]]*systemd[[:space:]]*=[[:space:]]*\([a-z]*\).*/\1/p' /etc/wsl.conf 2>/dev/null)"
        ;;
esac
true
