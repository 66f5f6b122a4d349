#!/bin/sh
# Converts a model to GGUF if need be, quantises it, and shows by a few tokens that it loads.
# Runs as an unprivileged user in a transient unit; may be killed anywhere and run again.
# Before it stand:
#   KEY           of everything that the model is made from, 64 hex digits
#   INCOMING WORK folder of files that are not whole yet; one in it for links and logs
#   RESULT        what is made, until it is known to be right
#   SOURCES       a line `SHA-256 place name` for each file, with tabs: where it is, and by which name the tools find it;
#                 `-` where the SHA-256 is not known
#   QUANT BIN     what to make; where llama.cpp's programs are
#   IMATRIX       path of an importance matrix, or empty
#   PYTHON TOOL   for a conversion: the environment's Python, and llama.cpp's source; else empty
#   BASE_BYTES RESULT_BYTES  expected sizes; 0: not known
#   DONE          where what was made is told, in one line of JSON
#   CHECK_SECONDS how long a start may take
set -uf
export LC_ALL=C HOME="$WORK" TMPDIR="$WORK" HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
tab=$(printf '\t')
base=$INCOMING/$KEY.part
children=
finish() {
    # shellcheck disable=SC2086  # a list of numbers
    [ -z "$children" ] || kill -9 $children 2>/dev/null
}
trap finish EXIT
trap 'exit 143' TERM INT
fail() {
    printf 'error: %s\n' "$*"
    exit 1
}
bytes() { stat -L -c %s "$1" 2>/dev/null || echo 0; }
megabytes() { echo "$(($1 / 1000000)).$((($1 / 100000) % 10))"; }
hash() { if command -v openssl >/dev/null; then openssl dgst -sha256 -r; else sha256sum; fi | cut -c1-64; }

# file expected step: says how far a file has grown, until it is killed
show_growth() {
    while sleep 2; do
        echo "$3: $(megabytes "$(bytes "$1")") of about $(megabytes "$2") MB"
    done
}
# expected what
room_for() {
    free=$(df --output=avail -B1 "$INCOMING" | tail -n 1)
    [ "$1" -le "$free" ] ||
        fail "$2 needs $(megabytes "$1") MB in $INCOMING, where $(megabytes "$free") MB are free"
}
# log: the last line that says something
last_words() {
    tr '\r' '\n' <"$1" | sed 's/^[A-Z]*:[a-z._-]*://' | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-300
}
full() { [ "$(df --output=avail -B1 "$INCOMING" | tail -n 1)" -lt 1000000 ] || grep -q 'No space left' "$1"; }

# An earlier run was killed after the work and before it was handed over.
if [ -f "$DONE" ] && made=$(sed -n 's/.*"sha256":"\([0-9a-f]*\)".*/\1/p' "$DONE") && [ -f "$INCOMING/$made.part" ]; then
    echo "it is made already"
    exit 0
fi
# Only one of us is ever at work here.
find "$INCOMING" -maxdepth 1 -name 'making-*' ! -path "$WORK" -exec rm -rf {} +
mkdir -p "$WORK/source" || fail "$WORK cannot be written"
find "$WORK/source" -type l -delete
first=
while IFS=$tab read -r sha256 place name; do
    [ -r "$place" ] || fail "$place cannot be read: the user $(id -un) has to be let in"
    link=$WORK/source/$name
    mkdir -p "${link%/*}" && ln -sfn "$place" "$link"
    [ -L "$link" ] || fail "$WORK cannot be written"
    first=${first:-$link}
done <<END
$SOURCES
END

input=$first
if [ -n "$PYTHON" ]; then
    input=$base
    if [ -f "$WORK/converted" ] && [ "$(cat "$WORK/converted")" = "$(bytes "$base")" ]; then
        echo "[1/4] it is converted already"
    else
        rm -f "$WORK/converted" "$base"
        room_for "$BASE_BYTES" "the conversion"
        echo "[1/4] converting to GGUF"
        show_growth "$base" "$BASE_BYTES" "[1/4] converting" &
        children=$!
        "$PYTHON" "$TOOL/convert_hf_to_gguf.py" "$WORK/source" --outfile "$base" --outtype auto \
            >"$WORK/convert.log" 2>&1
        code=$?
        finish
        children=
        tail -c 20000 "$WORK/convert.log" | tr '\r' '\n' | tail -n 40
        if [ $code != 0 ] || [ ! -s "$base" ]; then
            ! full "$WORK/convert.log" || fail "the disk of $INCOMING is full"
            fail "convert_hf_to_gguf.py: $(last_words "$WORK/convert.log")"
        fi
        sync "$base"
        bytes "$base" >"$WORK/converted"
    fi
fi

rm -f "$RESULT"
room_for "$RESULT_BYTES" "the result"
echo "[2/4] quantising to $QUANT"
{
    "$BIN/llama-quantize" ${IMATRIX:+--imatrix "$IMATRIX"} "$input" "$RESULT" "$QUANT" "$(nproc)" 2>&1
    echo $? >"$WORK/code"
} | tee "$WORK/quantise.log" | sed -u 's|^\[ *\([0-9]*\)/ *\([0-9]*\)\] *\([^ ]*\).*|[2/4] quantising: \1 of \2: \3|'
if [ "$(cat "$WORK/code")" != 0 ] || [ ! -s "$RESULT" ]; then
    ! full "$WORK/quantise.log" || fail "the disk of $INCOMING is full"
    said=$(grep -iE 'error|fail|invalid|missing|unable' "$WORK/quantise.log" >"$WORK/said"; last_words "$WORK/said")
    fail "llama-quantize: ${said:-$(last_words "$WORK/quantise.log")}"
fi

echo "[3/4] loading it"
socket=$WORK/check.sock
rm -f "$socket"
"$BIN/llama-server" --model "$RESULT" --host "$socket" --ctx-size 512 --parallel 1 --device none --no-warmup \
    >"$WORK/check.log" 2>&1 &
children=$!
ask() { curl -q -s --noproxy '*' --unix-socket "$socket" -m "$CHECK_SECONDS" "$@"; }
waited=0
until ask -f -o /dev/null http://localhost/health; do
    kill -0 "$children" 2>/dev/null || fail "what was made does not load: $(last_words "$WORK/check.log")"
    [ $waited -lt "$CHECK_SECONDS" ] || fail "what was made is not loaded within $CHECK_SECONDS s"
    sleep 1
    waited=$((waited + 1))
done
code=$(ask -o "$WORK/answer" -w '%{http_code}' http://localhost/completion \
    -d '{"prompt": "a", "n_predict": 4, "ignore_eos": true}')
case $code in
    200) grep -q '"tokens_predicted":4' "$WORK/answer" || fail "what was made answers without tokens" ;;
    501) ;; # it makes embeddings, no text
    *) fail "what was made loads, but does not answer: $(last_words "$WORK/check.log")" ;;
esac
finish
children=

echo "[4/4] hashing what it was made from, and the result"
made_from=
while IFS=$tab read -r sha256 place name; do
    [ "$sha256" != - ] || sha256=$(hash <"$place")
    made_from="$made_from${made_from:+,}\"$name\":\"$sha256\""
done <<END
$SOURCES
END
imatrix=null
[ -z "$IMATRIX" ] || imatrix="\"$(hash <"$IMATRIX")\""
sync "$RESULT"
sha256=$(hash <"$RESULT")
printf '{"sha256":"%s","bytes":%s,"sources":{%s},"imatrix":%s}\n' "$sha256" "$(bytes "$RESULT")" "$made_from" "$imatrix" \
    >"$DONE.new" && mv "$RESULT" "$INCOMING/$sha256.part" && mv "$DONE.new" "$DONE"
[ -f "$DONE" ] || fail "$INCOMING cannot be written"
# From here on what it was made from is no longer needed.
rm -f "$base"
while IFS=$tab read -r sha256 place name; do
    case $place in "$INCOMING"/*) rm -f "$place" ;; esac
done <<END
$SOURCES
END
rm -rf "$WORK"
echo "$QUANT: $(megabytes "$(bytes "$INCOMING/$sha256.part")") MB"
