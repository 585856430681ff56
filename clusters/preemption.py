"""Tell Ray that this node is about to be taken away: nothing new is placed on it, and Ray Train counts it as preempted.

`preemption.py watch aws|gcp --address HEAD:PORT` polls the cloud's metadata service and drains the node at a notice;
`preemption.py drain --address HEAD:PORT` drains it at once (a Kubernetes preStop hook). Needs nothing but Python and
the `ray` command, so it can be copied to a node on its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request

# https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: two minutes, IMDSv2.
# https://cloud.google.com/compute/docs/instances/preemptible: thirty seconds.
NOTICE_S = {"aws": 120, "gcp": 30}
METADATA = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
POLL_S = 5.0
TIMEOUT_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    watching = commands.add_parser("watch")
    watching.add_argument("cloud", choices=sorted(METADATA))
    watching.add_argument("--metadata", help="address of the metadata service, if not the cloud's own")
    watching.add_argument("--poll-s", type=float, default=POLL_S)
    draining = commands.add_parser("drain")
    draining.add_argument("--seconds", type=int, default=30, help="until the node is gone")
    for command in (watching, draining):
        command.add_argument("--address", required=True, help="of the head, HOST:PORT")
        command.add_argument("--node-id", help="if not the Ray node of this machine")
    arguments = parser.parse_args()
    if arguments.command == "drain":
        return drain(arguments.address, arguments.node_id, arguments.seconds, "the node is being stopped")
    metadata = arguments.metadata or METADATA[arguments.cloud]
    while not noticed(arguments.cloud, metadata):
        time.sleep(arguments.poll_s)
    message = f"{arguments.cloud} takes the node back"
    return drain(arguments.address, arguments.node_id, NOTICE_S[arguments.cloud], message)


def noticed(cloud: str, metadata: str) -> bool:
    """Whether the metadata service announces the end of this machine. A service that does not answer says nothing."""
    try:
        if cloud == "gcp":
            url = f"{metadata}/computeMetadata/v1/instance/preempted"
            return _answer(url, {"Metadata-Flavor": "Google"}) == "TRUE"
        token = _answer(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT")
        # 404 until there is a notice.
        _answer(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except OSError:
        return False
    return True


def _answer(url: str, headers: dict[str, str], method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers, method=method)
    # A proxy must not be asked for an address that only this machine knows.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode().strip())


def drain(address: str, node_id: str | None, seconds: int, message: str) -> int:
    """Ask the head to drain a node, gone in `seconds`; returns the exit code of `ray drain-node`."""
    command = [
        "ray", "drain-node", f"--address={address}", "--reason=DRAIN_NODE_REASON_PREEMPTION",
        f"--reason-message={message}", f"--deadline-remaining-seconds={seconds}",
        *([f"--node-id={node_id}"] if node_id else []),
    ]  # fmt: skip
    # Without it `ray` would look for any cluster on this machine to learn its node's id.
    return subprocess.run(command, env={**os.environ, "RAY_ADDRESS": address}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
