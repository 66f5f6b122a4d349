#!/bin/sh
# Fetches llama.cpp at one commit, compiles it, and lays a complete release into $STAGE.
# Runs as the unprivileged build user in a transient unit; may be killed anywhere and run again.
# Before it stand:
#   REPO COMMIT NUMBER LABEL TARGETS JOBS WORK STAGE STUBS
#   CUDA      root of the CUDA toolkit; empty for the CPU alone
#   OPTIONS   CMake options, NAME=VALUE, one a line
#   NEEDED    of those, the ones that the source must declare; of the others, those that it does are passed
#   LIBRARIES anchored expression: what a program may need from the host
#   RELEASE   release.json but for what only the build knows
set -u
export LC_ALL=C HOME="$WORK" CCACHE_DIR="$WORK/ccache" CCACHE_BASEDIR="$WORK" CCACHE_NOHASHDIR=1
export GIT_TERMINAL_PROMPT=0 GIT_CONFIG_GLOBAL="$WORK/gitconfig" NINJA_STATUS='[%f/%t] '
began=$(date +%s)
fail() {
    printf 'error: %s\n' "$*"
    exit 1
}

source=$WORK/source
build=$WORK/build

fetch() {
    # The user named this repository; git would refuse a path that belongs to somebody else.
    printf '[safe]\n\tdirectory = *\n[gc]\n\tauto = 0\n[advice]\n\tdetachedHead = false\n' >"$GIT_CONFIG_GLOBAL"
    git init -q "$source" || return 1
    # Only one of us is ever at work here: a lock is from one that was killed.
    find "$source/.git" -name '*.lock' -delete
    if [ "$(git -C "$source" rev-parse -q --verify "$COMMIT^{commit}" 2>/dev/null)" != "$COMMIT" ]; then
        echo "fetching $COMMIT"
        git -C "$source" fetch -q --depth 1 --no-tags "$REPO" "$COMMIT" ||
            # This server hands out branches and tags only.
            git -C "$source" fetch -q "$REPO" '+refs/heads/*:refs/remotes/origin/*' '+refs/tags/*:refs/tags/*' ||
            return 1
    fi
    git -C "$source" checkout -q -f --detach "$COMMIT" && git -C "$source" clean -q -ffdx
}

if ! fetch; then
    # A repository that a crash left damaged is cheaper fetched again than repaired.
    echo "fetching again from nothing"
    rm -rf "$source"
    tries=1
    until fetch; do
        [ "$tries" -lt 3 ] || fail "commit $COMMIT cannot be fetched from $REPO: see the lines above in the log"
        sleep $((tries * 5))
        tries=$((tries + 1))
    done
fi
[ "$(git -C "$source" rev-parse HEAD)" = "$COMMIT" ] || fail "$REPO gave another commit than $COMMIT"

declared() {
    grep -rqE --include=CMakeLists.txt --include='*.cmake' \
        "(option|set)[[:space:]]*\([[:space:]]*$1([[:space:]]|\))|NOT DEFINED $1\)" "$source"
}
# shellcheck disable=SC2153  # stands before the script
for name in $NEEDED; do
    declared "$name" ||
        fail "CMake option $name is not one that llama.cpp $LABEL declares; remove it from llama_cpp_cmake_args (an empty value leaves out one of ours)"
done
known=
while IFS= read -r option; do
    case ${option%%=*} in
        CMAKE_*) ;;
        *) declared "${option%%=*}" || {
            echo "llama.cpp $LABEL has no option ${option%%=*}: left out"
            continue
        } ;;
    esac
    known="$known$option
"
done <<END
$OPTIONS
END
OPTIONS=${known%?}

rm -rf "$STUBS"
if [ -n "$CUDA" ]; then
    [ -x "$CUDA/bin/nvcc" ] || fail "there is no $CUDA/bin/nvcc"
    # CMake looks for other tools of the toolkit in PATH; nvcc itself is named in OPTIONS.
    PATH=$CUDA/bin:$PATH
    if ! /sbin/ldconfig -p | grep -q 'libcuda\.so\.1 '; then
        # Without a driver programs are linked, and asked for their version, with the toolkit's stub of it.
        for stub in "$CUDA"/lib64/stubs/libcuda.so "$CUDA"/targets/*/lib/stubs/libcuda.so; do
            [ -e "$stub" ] || continue
            mkdir -p "$STUBS" && ln -sfn "$stub" "$STUBS/libcuda.so.1"
            export LDFLAGS="-Wl,-rpath-link,$STUBS" LD_LIBRARY_PATH="$STUBS"
            break
        done
    fi
fi

ccache --max-size "$CCACHE_SIZE" >/dev/null 2>&1
ccache --zero-stats >/dev/null 2>&1
# CMake keeps what an earlier run told it: another compiler or set of options starts from nothing.
# shellcheck disable=SC2153  # stands before the script
printf '%s\n%s\n' "$OPTIONS" "$RELEASE" >"$WORK/wanted"
cmp -s "$WORK/wanted" "$build/wanted" || rm -rf "$build"
mkdir -p "$build"
set -- -G Ninja -S "$source" -B "$build" "-DLLAMA_BUILD_NUMBER=$NUMBER" "-DLLAMA_BUILD_COMMIT=$(printf %.9s "$COMMIT")"
while IFS= read -r option; do
    set -- "$@" "-D$option"
done <<END
$OPTIONS
END
echo "configuring"
compile() {
    # shellcheck disable=SC2086  # a list of names
    cmake "$@" && cp "$WORK/wanted" "$build/wanted" &&
        cmake --build "$build" --parallel "$JOBS" --target $TARGETS
}
if [ -e "$build/wanted" ]; then
    # What a power cut left half-written looks finished to Ninja; the compiler cache knows better.
    compile "$@" || {
        echo "building again from nothing"
        rm -rf "$build"
        compile "$@"
    }
else
    compile "$@"
fi || fail "the build failed: $(grep -m1 -E 'rror:|fatal|Killed|No space left' "$LOG" || echo "see $LOG")"

rm -rf "$STAGE"
mkdir -p "$STAGE/bin" "$STAGE/lib" || fail "no space in $WORK"
for target in $TARGETS; do
    cp "$build/bin/$target" "$STAGE/bin/" || fail "$target was not built, or there is no space in $WORK"
done
cp -P "$build"/bin/*.so* "$STAGE/lib/" || fail "no space in $WORK"
for file in "$STAGE"/bin/* "$STAGE"/lib/*.so*; do
    [ -L "$file" ] && continue
    missing=$(ldd "$file" | grep 'not found')
    [ -z "$missing" ] || fail "${file##*/} does not find$(printf '%s' "$missing" | sed 's/ =>.*//' | tr -d '\t' | tr '\n' ' ')"
    for needed in $(objdump -p "$file" | sed -n 's/^ *NEEDED *//p'); do
        [ -e "$STAGE/lib/$needed" ] || printf '%s\n' "$needed" | grep -qxE "$LIBRARIES" ||
            fail "${file##*/} took in $needed by chance; switch that off in llama_cpp_cmake_args"
    done
done
"$STAGE/bin/llama-server" --version || fail "the new llama-server does not answer --version: see $LOG"
"$STAGE/bin/llama-server" --help >"$WORK/help"
listed() { sort -u | sed 's/.*/"&"/' | paste -sd,; }
options=$(grep -oE -- '(^|[ ,])--?[a-z][a-z0-9-]*' "$WORK/help" | tr -d ' ,' | listed)
# Once for each of two options, in lines that are broken anywhere between names.
templates=$(sed -n '/list of built-in templates:/,/(env:/p' "$WORK/help" | grep -vE 'templates:|\(env:' |
    tr ' ' '\n' | tr -d ',' | grep -xE '[a-z][a-z0-9._-]+' | listed)
files=$(ccache --print-stats 2>/dev/null | sed -n 's/^\(direct_cache_hit\|preprocessed_cache_hit\|cache_miss\)\t/\1 /p' |
    sed 's/\(.*\) \(.*\)/"\1":\2/' | paste -sd,)
took=$(($(date +%s) - began))
printf '%s' "$RELEASE" | sed "s|}\$|,\"built_seconds\":$took,\"ccache\":{$files},\"server_options\":[$options],\"chat_templates\":[$templates]}|" \
    >"$STAGE/release.json" || fail "no space in $WORK"
echo "compiled in $took s"
