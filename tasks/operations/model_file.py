"""Model files: fetched to a temporary name, checked, kept once for each SHA-256."""

from __future__ import annotations

import posixpath
import shlex
from collections.abc import Generator

from pyinfra.api import operation
from pyinfra.api.command import FileUploadCommand, PyinfraCommand

from tasks import probe as at
from tasks.operations import shell
from tasks.operations.download import ANY, GGUF, Download, Wanted
from tasks.operations.job import Job, finished
from tasks.rules.model import ModelFile, ModelPlan
from tasks.rules.model_record import Record, Removal
from tasks.settings import Settings

_VERIFY = """
echo "checking the SHA-256 of $FILE"
before=$(stat -L -c '%s %Y %i' "$FILE")
actual=$(sha256sum <"$FILE" | cut -d' ' -f1)
[ "$actual" = "$SHA256" ] || {
    echo "error: $FILE has SHA-256 $actual, not the $SHA256 that model_sha256 asks for"
    exit 1
}
printf '%s %s\\n' "$actual" "$before" >"$MARK.new" && mv "$MARK.new" "$MARK"
"""


@operation()
def fetched(
    files: tuple[ModelFile, ...], from_hub: bool, settings: Settings
) -> Generator[PyinfraCommand, None, None]:
    """Download files, each of them checked, to the folder for downloads."""
    secrets, server = {}, ""
    if from_hub and settings.hf_token is not None:
        secrets = {"hf-token": settings.hf_token.get_secret_value()}
        server = "/".join(settings.hf_endpoint.split("/")[:3])
    download = Download(
        name="fetch",
        files=[
            Wanted(file.sha256 or "", file.name, file.url or "", file.size or 0) for file in files
        ],
        kind=GGUF if all(file.name.endswith(".gguf") for file in files) else ANY,
        folder=at.INCOMING,
        user=at.WORKER_USER,
        secrets=secrets,
        token_server=server,
    )
    yield from finished._inner(job=download.job(settings))


@operation()
def copied(
    files: tuple[ModelFile, ...], folder: str = at.BLOBS
) -> Generator[PyinfraCommand, None, None]:
    """Copy files from this machine to a folder of the host, each of them checked."""
    for file in files:
        assert file.original is not None
        # Where root alone gets; in the store under a name that is no blob's.
        new = f"{folder}/.{file.sha256}.copy"
        yield shell.command(f"install -d -m 755 {at.STATE} {at.MODELS} {folder}; rm -rf {new}")
        yield FileUploadCommand(file.original, new)
        yield shell.command(
            f'actual=$(sha256sum <{new} | cut -c1-64); [ "$actual" = {file.sha256} ] || '
            f"{{ rm -f {new}; echo {shlex.quote(file.name)} changed while it was copied >&2; "
            f"exit 1; }}\nchown root:root {new}; chmod 644 {new}; sync {new}\n"
            f"mv -T {new} {folder}/{file.sha256}"
        )


@operation()
def stored(model: ModelPlan) -> Generator[PyinfraCommand, None, None]:
    """Move what was downloaded into the store, give each file its name, and write down what it is.

    Under a final name there is always a whole file with the right SHA-256, or none.
    """
    assert model.record is not None
    yield shell.command("\n".join(map(hand_over, model.files)))
    yield shell.command(keep(model.record_path, model.record))


@operation()
def served(model: ModelPlan) -> Generator[PyinfraCommand, None, None]:
    """Note in a model's record that it serves now: the last ones are kept."""
    yield shell.command(f"touch {model.record_path}")


@operation()
def removed(removal: Removal) -> Generator[PyinfraCommand, None, None]:
    """Remove models from the store, but for files that a process has open or mapped."""
    yield shell.command(removal_script(removal))


def removal_script(removal: Removal) -> str:
    """Shell that removes them.

    The records go last, and only with all that they tell of: what was cut short, or had to stay, is
    made up for by the next run.
    """
    blobs = [f"{at.BLOBS}/{sha256}" for sha256 in removal.blobs]
    partials = [f"{at.INCOMING}/{sha256}.part" for sha256 in removal.partials]
    # What a work that was given up has left beside them.
    work = f"rm -rf {at.INCOMING}/making-*" if partials else ""
    return f"""
{work}
set -- {shlex.join([*blobs, *partials])}
for file; do
  if grep -qsF -- "$file" /proc/[0-9]*/maps ||
     find /proc/[0-9]*/fd -lname "$file" 2>/dev/null | grep -q .
  then echo "$file is in use and stays"; stays=yes
  else rm -f "$file"
  fi
done
[ -z "$stays" ] || exit 0
rm -f {shlex.join([*removal.links, *removal.records])}
find -H {at.MODELS} -mindepth 1 -type d -empty -delete
"""


@operation()
def verified(model: ModelPlan, settings: Settings) -> Generator[PyinfraCommand, None, None]:
    """Check the SHA-256 of a file that is on the host already, and remember that it was right."""
    assert model.sha256 is not None
    folder = f"{at.STATE}/verified"
    yield shell.command(f"install -d -m 755 {at.STATE} {folder}")
    yield from finished._inner(
        job=Job(
            name="verify",
            key=model.sha256,
            script='MARK=$FOLDER/$(printf %s "$FILE" | sha256sum | cut -d" " -f1)\n' + _VERIFY,
            variables={"FILE": model.path, "SHA256": model.sha256, "FOLDER": folder},
            user="root",
            capabilities="CAP_DAC_READ_SEARCH",
            writable=(folder,),
            timeout_seconds=settings.model_download_timeout_seconds,
        )
    )


def keep(path: str, record: Record) -> str:
    """Shell that writes a record, whose time stays that at which its model served last."""
    new = f"{path}.new"
    return (
        f"mkdir -p {at.RECORDS} && printf '%s\\n' {shlex.quote(record.as_json())} >{new} && "
        f"chmod 644 {new} && touch -d @0 {new} && "
        f"{{ [ ! -e {path} ] || touch -r {path} {new}; }} && mv -T {new} {path}"
    )


def hand_over(file: ModelFile) -> str:
    """Shell that moves a checked file into the store and links its name to it."""
    part, blob, path = f"{at.INCOMING}/{file.sha256}.part", file.blob, shlex.quote(file.path)
    folder = shlex.quote(posixpath.dirname(file.path))
    # What is served goes on being read. A file of the right size stays, whatever else is there.
    damaged = (
        ""
        if file.size is None
        else (f'[ ! -e {blob} ] || [ "$(stat -c %s {blob})" = {file.size} ] || rm -f {blob}')
    )
    return f"""
set -e
install -d -m 755 {at.MODELS} {at.BLOBS} {folder}
{damaged}
if [ -e {part} ] && [ ! -e {blob} ]; then
  # It comes from an unprivileged user's folder: looked at, and changed, only where root alone gets.
  new={at.BLOBS}/.new
  rm -rf $new
  mv -T {part} $new
  if [ -L $new ] || [ ! -f $new ] || [ "$(stat -c %h $new)" != 1 ]; then
    rm -rf $new
    echo "{part} was not a file of its own" >&2
    exit 1
  fi
  chown root:root $new; chmod 644 $new; sync $new
  mv -T $new {blob}
fi
rm -f {part}
[ -e {blob} ]
ln -sfn {file.target} {folder}/.new
mv -T {folder}/.new {path}
"""
