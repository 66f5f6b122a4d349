#!/bin/sh
# Downloads files to $INCOMING/SHA256.part, resuming what an earlier try left; hashes while reading.
# Runs as an unprivileged user in a transient unit; may be killed anywhere and run again.
# Before it stand: INCOMING, FILES (a line `sha256 bytes name` for each; 0 bytes: not known), KIND and MAGIC
# (what they are, and the first four bytes of such a file; empty for any), STALL and PAUSE (seconds). From the environment come URLS (in the same order) and proxies. A token may be in
# $CREDENTIALS_DIRECTORY/hf-token: it is for the server $TOKEN_SERVER only.
set -uf
export LC_ALL=C
work=$(mktemp -d) || exit 1
progress=
finish() {
    [ -z "$progress" ] || kill "$progress" 2>/dev/null
    rm -rf "$work"
}
trap finish EXIT
trap 'exit 143' TERM INT
exec 3>&1

fail() {
    printf 'error: %s\n' "$*" >&3
    exit 1
}
bytes() { stat -c %s "$part" 2>/dev/null || echo 0; }
megabytes() { echo "$(($1 / 1000000)).$((($1 / 100000) % 10))"; }
say() { printf '%s: %s\n' "$name" "$*" >&3; }
server_of() { printf %s "$1" | sed -n 's|^\([a-z]*://[^/?#]*\).*|\1|p'; }
# With openssl (ca-certificates brings it) this takes half the time or less.
hash() { if command -v openssl >/dev/null; then openssl dgst -sha256 -r; else sha256sum; fi; }
header() { tr -d '\r' <"$work/headers" 2>/dev/null | sed -n "s/^$1: *//Ip" | tail -n 1; }
status() { sed -n 's/^HTTP\/[^ ]* \([0-9]*\).*/\1/p' "$work/headers" 2>/dev/null | tail -n 1; }

# What curl is told by a pipe: a process list would show a token, and what an address is signed with.
told() {
    printf 'url = "%s"\n' "$(printf %s "$1" | sed 's/[\\"]/\\&/g')"
    [ -z "$2" ] || printf 'header = "Authorization: Bearer %s"\n' "$2"
}
ask() {
    curl -q -K - -sS -D "$work/headers" --proto =http,https --connect-timeout 20 \
        --speed-limit 1 --speed-time "$STALL" "$@" 2>"$work/problem"
}

# Follows redirects by hand as long as they stay on the token's server. Sets $where, and $secret if
# that is still there: what the server leads to elsewhere is asked without it.
locate() {
    where=$url secret=
    [ -n "$token" ] || return 0
    hops=0
    while [ "$(server_of "$where")" = "$TOKEN_SERVER" ]; do
        secret=$token
        : >"$work/headers"
        answer=$(told "$where" "$secret" | ask -I -o /dev/null -w '%{http_code} %{redirect_url}') ||
            return $?
        case $answer in
            2*) return 0 ;;
            3*' '?*) where=${answer#* } secret= ;;
            *) return 22 ;;
        esac
        hops=$((hops + 1))
        [ $hops -le 10 ] || return 47
    done
}

# One try at what is still missing, to the file and on to standard output. Sets $code; 23: the disk.
receive_once() {
    : >"$work/headers"
    : >"$work/problem"
    locate
    code=$?
    [ $code = 0 ] || return
    hops=10
    [ -z "$secret" ] || hops=0
    {
        told "$where" "$secret" | ask --fail -L --max-redirs $hops -C "$(bytes)"
        echo $? >"$work/code"
    } | tee --output-error=exit -a "$part" 2>"$work/disk" || {
        code=23
        return
    }
    code=$(cat "$work/code")
}

# Tries until the server has said that this is all, or there is no sense in going on. What became of
# it stands in $work/outcome: whole, stale (what is here is not the beginning of what is there), or a
# line that says why not.
receive() {
    tries=0
    while :; do
        before=$(bytes)
        if [ "$size" -gt 0 ] && [ "$before" -ge "$size" ]; then
            echo whole >"$work/outcome"
            return
        fi
        receive_once
        wait=
        problem=$(sed -n 's/^curl: ([0-9]*) //p' "$work/problem" | sed -n 1p)
        case $code in
            0)
                [ "$(bytes)" -lt "$size" ] || {
                    echo whole >"$work/outcome"
                    return
                }
                problem="the server says that this is all"
                ;;
            22)
                wait=$(header Retry-After)
                case $(status) in
                    408 | 425 | 429 | 5*) problem="the server says $(status)" ;;
                    416)
                        if [ "$before" -gt 0 ]; then echo stale; else echo "the server says 416"; fi \
                            >"$work/outcome"
                        return
                        ;;
                    401 | 403)
                        echo "the server says $(status): it is not given to this host; for a gated or" \
                            "private model set hf_token" >"$work/outcome"
                        return
                        ;;
                    *)
                        echo "the server says $(status)" >"$work/outcome"
                        return
                        ;;
                esac
                ;;
            33 | 36) # no ranges there
                echo stale >"$work/outcome"
                return
                ;;
            23)
                echo "it cannot be written to $INCOMING: is there space left?" \
                    "($(sed -n '1s/.*: //p' "$work/disk"))" >"$work/outcome"
                return
                ;;
            1 | 3 | 47 | 60 | 77)
                echo "${problem:-it redirects in circles}" >"$work/outcome"
                return
                ;;
        esac
        # As long as each try brings something, it may go on.
        [ "$(bytes)" = "$before" ] || tries=0
        tries=$((tries + 1))
        echo again >"$work/again"
        if [ $tries -gt 5 ]; then
            echo "$problem" >"$work/outcome"
            return
        fi
        case $wait in
            '' | *[!0-9]*) wait=$((tries * PAUSE)) ;;
            ????*) wait=600 ;;
        esac
        say "$problem; going on from $(megabytes "$(bytes)") MB in $wait s"
        sleep "$wait"
    done
}

show_progress() {
    while sleep 2; do
        if [ "$size" -gt 0 ]; then
            say "$(megabytes "$(bytes)") of $(megabytes "$size") MB"
        else
            say "$(megabytes "$(bytes)") MB"
        fi
    done
}

# sha256 size name url
fetch() {
    sha256=$1 size=$2 name=$3 url=$4
    part=$INCOMING/$sha256.part
    starts=0
    while :; do
        [ "$size" = 0 ] || [ "$(bytes)" -le "$size" ] || rm -f "$part"
        resumed=$(bytes)
        rm -f "$work/again"
        free=$(df --output=avail -B1 "$INCOMING" | tail -n 1)
        [ $((size - resumed)) -le "$free" ] ||
            fail "$name needs $(megabytes $((size - resumed))) MB in $INCOMING, where $(megabytes "$free") MB are free"
        : >>"$part" || fail "$name cannot be written to $INCOMING"
        show_progress &
        progress=$!
        # The hash goes on over all tries, and so the file is read once more only if it was resumed.
        actual=$({ cat "$part"; receive; } | hash | cut -c1-64)
        kill "$progress" 2>/dev/null
        wait "$progress" 2>/dev/null
        progress=
        outcome=$(cat "$work/outcome")
        [ "$actual" != "$sha256" ] || break
        case $outcome in
            whole | stale) ;;
            *) fail "$name cannot be fetched: $outcome" ;;
        esac
        got=$(bytes)
        begins=$(od -An -N4 -tx1 "$part" | tr -d ' \n')
        rm -f "$part"
        # What was resumed may have changed upstream in between: once more from nothing.
        starts=$((starts + 1))
        if [ $starts -gt 3 ] || { [ "$outcome" = whole ] && [ "$resumed" = 0 ] && [ ! -e "$work/again" ]; }; then
            [ "$outcome" = whole ] || fail "$name cannot be fetched: the connection breaks, and the server cannot go on where it broke"
            [ -z "$MAGIC" ] || [ "$begins" = "$MAGIC" ] || fail "$name is not $KIND"
            [ "$size" = 0 ] || [ "$got" = "$size" ] ||
                fail "$name has $got bytes, not $size; it was removed"
            fail "$name has SHA-256 $actual, not the $sha256 that is asked for; it was removed"
        fi
        say "from nothing once more: what is there is not what was begun with"
    done
    chmod 644 "$part"
    say "$(megabytes "$(bytes)") MB, SHA-256 right"
}

token=
[ ! -r "${CREDENTIALS_DIRECTORY:-/nonexistent}/hf-token" ] ||
    read -r token <"$CREDENTIALS_DIRECTORY/hf-token"
left=$URLS
unset URLS
while read -r one two three; do
    fetch "$one" "$two" "$three" "${left%% *}"
    left=${left#* }
done <<END
$FILES
END
