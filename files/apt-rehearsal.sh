# What apt would do if some repositories were there: tried in a folder of its own, out of copies of
# the host's lists, sources and preferences. The host itself stays as it is.
# Before it stand: STEP and WORK, and for each step what its function says. $WORK/new holds what is
# new, as it is to lie under / in the end: keys, sources, preferences.
# `== PART` stands before each part of the answer.
set -u
export LC_ALL=C DEBIAN_FRONTEND=noninteractive
# Caches of its own: what apt makes of the lists once, the next command need not make again.
rehearse() {
    program=$1
    shift
    "$program" -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$WORK/sources" \
        -o Dir::Etc::preferencesparts="$WORK/preferences" -o Dir::State::lists="$WORK/lists" \
        -o Dir::Cache="$WORK" -o Dir::Cache::pkgcache=pkgcache.bin -o Dir::Cache::srcpkgcache=srcpkgcache.bin \
        -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 -o Dpkg::Use-Pty=false "$@"
}
get() { rehearse apt-get -q "$@"; }
read_lists() { get -o pkgCacheFile::Generate=false "$@" update 2>&1; }
targets() { get indextargets --format "$1" 'Created-By: Packages' | sort -u; }

# The host's sources without those whose place is taken ($SUPERSEDED, addresses), and the new ones.
copy_sources() {
    rm -rf "$WORK/sources" "$WORK/preferences"
    mkdir -p "$WORK/sources" "$WORK/preferences" "$WORK/archives/partial"
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        [ ! -e "$WORK/new$file" ] || continue
        copy=$WORK/sources/host-${file##*/}
        cp "$file" "$copy"
        for url in $SUPERSEDED; do
            grep -qsF "$url" "$copy" || continue
            case $file in
                *.list) sed -i "\|^[^#]*$url|d" "$copy" ;;
                *) rm "$copy" ;;
            esac
        done
    done
    cp /etc/apt/preferences.d/* "$WORK/preferences/" 2>/dev/null
    # One pin of the driver takes the place of another.
    [ -z "$PINS" ] || rm -f "$WORK"/preferences/nvidia-driver-pinning-*
    cp "$WORK"/new/etc/apt/preferences.d/* "$WORK/preferences/" 2>/dev/null
    for file in "$WORK"/new/etc/apt/sources.list.d/*.sources; do
        [ ! -f "$file" ] || sed "s|^Signed-By: |&$WORK/new|" "$file" >"$WORK/sources/${file##*/}"
    done
    [ -d "$WORK/lists" ] || cp -a --reflink=auto /var/lib/apt/lists "$WORK/lists"
}

# Out of a local installer ($LOCAL, a .deb) what tells what is in it. Its packages stay packed.
unpack_installer() {
    mkdir -p "$WORK/local" && dpkg-deb --fsys-tarfile "$LOCAL" | tar -x -C "$WORK/local" --wildcards \
        "./var/cuda-repo-*/*Packages*" "./var/cuda-repo-*/*Release*" "./var/cuda-repo-*/*.gpg"
    for folder in "$WORK"/local/var/cuda-repo-*; do
        for key in "$folder"/cuda-*-keyring.gpg; do
            printf 'Types: deb\nURIs: file:%s\nSuites: /\nSigned-By: %s\n' "$folder" "$key" \
                >"$WORK/sources/installer.sources"
        done
    done
    [ -e "$WORK/sources/installer.sources" ]
}

# Components of the distribution's archive ($COMPONENTS, for the release $CODENAME) that are not
# enabled yet, from wherever its main component is from.
add_components() {
    file=$WORK/new/etc/apt/sources.list.d/llamastead-components.sources
    # shellcheck disable=SC2016  # apt's own variables
    have=$(targets '$(REPO_URI) $(RELEASE) $(COMPONENT)')
    # shellcheck disable=SC2016
    targets '$(REPO_URI) $(RELEASE) $(COMPONENT) $(SIGNED_BY)' | while read -r uri release component key; do
        case $component:$release in
            main:"$CODENAME" | main:"$CODENAME"-updates | main:"$CODENAME"-security) ;;
            *) continue ;;
        esac
        case $key in /* | [0-9A-F]*) ;; *) key= ;; esac # a variable without a value stays as it is
        missing=
        for component in $COMPONENTS; do
            printf '%s\n' "$have" | grep -qxF "$uri $release $component" || missing="$missing $component"
        done
        [ -z "$missing" ] || printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents:%s\n%s\n' \
            "$uri" "$release" "$missing" "${key:+Signed-By: $key
}"
    done >"$file"
    if [ -s "$file" ]; then cp "$file" "$WORK/sources/"; else rm "$file"; fi
}

# Reads all lists. Those of other people's repositories may fail, the new ones may not.
# $PINS: packages whose preferences hold from now on; $NAMES: packages to look up.
prepare() {
    copy_sources
    echo "== host"
    read_lists
    if [ -n "$COMPONENTS" ]; then
        add_components
        read_lists
    fi
    if [ -n "$LOCAL" ]; then
        echo "== installer"
        unpack_installer 2>&1 || exit 1
    fi
    for file in "$WORK"/sources/*.sources; do
        case ${file##*/} in host-* | llamastead-*) continue ;; esac
        echo "== update ${file##*/}"
        mkdir -p "$WORK/one" && rm -f "$WORK"/one/* && cp "$file" "$WORK/one/"
        read_lists -o Dir::Etc::sourceparts="$WORK/one" -o APT::Get::List-Cleanup=0 --error-on=any || exit 1
    done
    for package in $PINS; do
        echo "== pin $package"
        (
            cd "$WORK/archives" && rm -f "$package"_*.deb && get download "$package" 2>&1 &&
                rm -rf "$WORK/pin" && dpkg-deb -x "$package"_*.deb "$WORK/pin" &&
                cp "$WORK"/pin/etc/apt/preferences.d/* "$WORK/preferences/"
        ) || exit 1
    done
    echo "== policy"
    # shellcheck disable=SC2086  # a list of names
    rehearse apt-cache policy $NAMES
}

# $ARGUMENTS: what apt-get is to install.
simulate() {
    echo "== simulation"
    # shellcheck disable=SC2086
    get --simulate -y $ARGUMENTS 2>&1
}

# The same, into $WORK/archives. What is there already is not fetched again.
download() {
    # shellcheck disable=SC2086
    if get --download-only -y $ARGUMENTS 2>&1; then echo finished; else echo failed; fi
}

"$STEP"
