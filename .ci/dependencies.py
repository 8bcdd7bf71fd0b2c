"""Known vulnerabilities in the pinned dependencies, by pip-audit: exit 1 for any; a loud line where none can be asked.

    python .ci/dependencies.py constraints.txt

One request tells whether the package index at hand publishes advisories at all; many mirrors do not.
"""

import importlib.util
import json
import subprocess
import sys
import urllib.error
import urllib.request

PROBE = "https://pypi.org/pypi/pip/24.0/json"
TIMEOUT = 5


def reachable() -> bool:
    """Whether advisories can be asked for from here."""
    try:
        with urllib.request.urlopen(PROBE, timeout=TIMEOUT) as answer:
            return "vulnerabilities" in json.load(answer)
    except (OSError, ValueError):
        return False


def skip(why: str) -> int:
    """Say loudly that nothing was checked; that is no failure."""
    print(f"WARNING: {why}: the dependencies were NOT AUDITED for known vulnerabilities")
    return 0


def main() -> int:
    """Audit the file named on the command line."""
    if importlib.util.find_spec("pip_audit") is None:
        return skip("pip-audit is not installed")
    if not reachable():
        return skip("no advisories to be had from here (offline, or a mirror without them)")
    command = [sys.executable, "-m", "pip_audit", "--requirement", sys.argv[1], "--no-deps", "--disable-pip"]
    done = subprocess.run([*command, "--format", "json", "--progress-spinner", "off"], capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return skip(f"pip-audit ended with exit code {done.returncode}")
    audited = [item for item in found if "vulns" in item]
    if not audited:
        return skip("pip-audit got no answer for any package")
    bad = [(item["name"], item["version"], flaw) for item in audited for flaw in item["vulns"]]
    for name, version, flaw in bad:
        print(f"{name} {version}: {flaw['id']}, mended in {', '.join(flaw['fix_versions']) or 'no version yet'}")
    print(f"{len(audited)} of {len(found)} pinned packages audited, {len(bad)} known vulnerabilities")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
