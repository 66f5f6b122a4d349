#!/bin/sh
# Makes the environment of llama.cpp's convert_hf_to_gguf.py: that of one commit's source, and its Python packages.
# Runs as an unprivileged user in a transient unit; may be killed anywhere and run again.
# Before it stand:
#   COMMIT LABEL  of llama.cpp. REPO comes from the environment
#   BUILT         the source that was compiled last, which may be at that commit
#   WORK          where it all goes
#   LOCK TORCH    path of requirements with hashes, and a line more for PyTorch if that is no package of the system
#   NAME          of the environment: another lock has another
#   SYSTEM        yes: with the packages of the system
#   INDEX         a package index, or empty
#   ARCHITECTURE  of the model, as its config.json names it, or empty
set -u
export LC_ALL=C HOME="$WORK" GIT_TERMINAL_PROMPT=0 GIT_CONFIG_GLOBAL="$WORK/gitconfig" HF_HUB_OFFLINE=1
export PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1
fail() {
    printf 'error: %s\n' "$*"
    exit 1
}
tool=$WORK/llama.cpp-$COMMIT
venv=$WORK/$NAME

if [ ! -f "$tool/complete" ]; then
    echo "[1/3] fetching convert_hf_to_gguf.py of $LABEL"
    rm -rf "$WORK"/llama.cpp-*
    mkdir -p "$tool" || fail "$WORK cannot be written"
    printf '[safe]\n\tdirectory = *\n[gc]\n\tauto = 0\n' >"$GIT_CONFIG_GLOBAL"
    git=$BUILT/.git
    if ! git --git-dir "$git" cat-file -e "$COMMIT^{tree}" 2>/dev/null; then
        git=$WORK/git
        git init -q --bare "$git" || fail "$WORK cannot be written"
        git --git-dir "$git" fetch -q --depth 1 --no-tags "$REPO" "$COMMIT" ||
            git --git-dir "$git" fetch -q "$REPO" '+refs/heads/*:refs/heads/*' '+refs/tags/*:refs/tags/*' ||
            fail "commit $COMMIT cannot be fetched from $REPO: see $LOG"
    fi
    git --git-dir "$git" archive -o "$tool.tar" "$COMMIT" convert_hf_to_gguf.py conversion gguf-py models/templates 2>/dev/null ||
        # Before it was divided into modules it was one file.
        git --git-dir "$git" archive -o "$tool.tar" "$COMMIT" convert_hf_to_gguf.py gguf-py ||
        fail "llama.cpp $LABEL has no convert_hf_to_gguf.py"
    tar -xf "$tool.tar" -C "$tool" && rm "$tool.tar" && : >"$tool/complete"
    [ -f "$tool/complete" ] || fail "no space in $WORK"
fi

if [ ! -f "$venv/complete" ]; then
    echo "[2/3] installing its Python packages"
    rm -rf "$WORK"/venv-*
    python3 -m venv ${SYSTEM:+--system-site-packages} "$venv" || fail "python3 cannot make $venv: see $LOG"
    { cat "$LOCK" && printf '%s\n' "$TORCH"; } >"$venv/requirements.txt" || fail "no space in $WORK"
    set -- --require-hashes --no-deps --only-binary :all: --no-cache-dir --progress-bar off
    # The hashes say what is right, however it comes.
    host=${INDEX#http://}
    [ -z "$INDEX" ] || export PIP_INDEX_URL="$INDEX"
    [ "$host" = "$INDEX" ] || export PIP_TRUSTED_HOST="${host%%/*}"
    "$venv/bin/python" -m pip install "$@" -r "$venv/requirements.txt" 2>"$WORK/problem" | sed 's|^|[2/3] |' | cut -c1-150
    # What pip says of a failure is long; its ERROR lines are not.
    "$venv/bin/python" -c 'import numpy, safetensors, sentencepiece, torch, transformers' 2>"$WORK/import" || {
        cat "$WORK/problem" "$WORK/import"
        said=$(grep -m1 '^ERROR: ' "$WORK/problem" || tail -n 1 "$WORK/import")
        fail "the Python packages of the conversion cannot be installed: $(printf '%s' "$said" | cut -c1-300)"
    }
    : >"$venv/complete"
fi

[ -d "$tool/conversion" ] && [ -n "$ARCHITECTURE" ] || exit 0
echo "[3/3] asking it for $ARCHITECTURE"
# Before anything large is downloaded. Only code of llama.cpp's is run, none of the model's repository.
cd "$tool" && "$venv/bin/python" -c '
import sys
from conversion import get_model_class
try:
    get_model_class(sys.argv[1])
except NotImplementedError as problem:
    sys.exit(f"error: convert_hf_to_gguf.py of llama.cpp {sys.argv[2]}: {problem}")
' "$ARCHITECTURE" "$LABEL" 2>&1 || exit 1
