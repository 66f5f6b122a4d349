# First four bytes and size of $url, which no command line shows, as lines of `key<TAB>value`. Leaves nothing behind.
if command -v curl >/dev/null 2>&1; then
    work=$(mktemp -d) || exit 0
    trap 'rm -rf "$work"' EXIT
    # A server without ranges sends the whole file: head closes the pipe after four bytes.
    {
        printf 'url = "%s"\n' "$(printf %s "$url" | sed 's/[\\"]/\\&/g')" |
            curl -K - -sSL --fail --max-time 30 --connect-timeout 10 -r 0-3 -D "$work/headers" 2>"$work/problem"
        echo $? >"$work/code"
    } | head -c 4 | od -An -tx1 | tr -d ' \n' >"$work/magic"
    if [ ! -s "$work/magic" ]; then
        printf 'error\t%s\n' "$(sed -n '1s/^curl: ([0-9]*) //p' "$work/problem")"
    else
        printf 'magic\t%s\n' "$(cat "$work/magic")"
        # Of several answers (redirects, a proxy's own) the last counts.
        tr -d '\r' <"$work/headers" | sed -n \
            's/^[Hh][Tt][Tt][Pp]\/.*/-/p; s/^[Cc]ontent-[Rr]ange: .*\/\([0-9]*\)$/range \1/p; s/^[Cc]ontent-[Ll]ength: \([0-9]*\)$/length \1/p' |
            {
                while read -r kind value; do
                    case $kind in
                        -) range="" length="" ;;
                        range) range=$value ;;
                        length) length=$value ;;
                    esac
                done
                printf 'size\t%s\n' "${range:-$length}"
            }
    fi
elif command -v python3 >/dev/null 2>&1; then
    python3 - <<'END'
import os, urllib.request
try:
    request = urllib.request.Request(os.environ["url"], headers={"Range": "bytes=0-3"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        magic = answer.read(4)
        size = (answer.headers.get("Content-Range") or "").rpartition("/")[2]
        print("magic", magic.hex(), sep="\t")
        print("size", size or answer.headers.get("Content-Length", ""), sep="\t")
except Exception as problem:
    print("error", str(problem).replace("\n", " "), sep="\t")
END
fi
true
