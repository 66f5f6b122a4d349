"""A host before and after: what a deploy could have changed, and what it did."""

from __future__ import annotations

from tests.lab import LabHost

OURS = "/opt /etc /usr /home /root /srv /var/lib /var/cache"
"""Where a deploy puts things."""

BACKGROUND = (
    "/var/cache/apt",
    "/var/cache/llamastead/llama.cpp/ccache",  # shared with other hosts of the lab
    "/var/lib/apt",
    "/var/cache/man",
    "/var/lib/dpkg",
    "/var/lib/logrotate",
)
"""What Debian's own timers, and other hosts, do behind everybody's back."""


def snapshot(host: LabHost) -> str:
    """Everything on the host that a deploy could have changed, with times, and the packages."""
    return host.run(
        f"find {OURS} -xdev -not -path '/var/lib/sudo*' -not -path '/var/lib/systemd/*' "
        "-not -path '/root/.cache*' -printf '%p %s %C@\\n' | sort; "
        "dpkg -l; dpkg --get-selections; systemctl list-unit-files --no-legend"
    ).stdout


def changes(before: str, after: str, ignoring: tuple[str, ...] = BACKGROUND) -> list[str]:
    """What differs."""
    differing = set(before.splitlines()) ^ set(after.splitlines())
    return sorted(line for line in differing if not line.startswith(ignoring))
