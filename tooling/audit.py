"""Known vulnerabilities of what requirements.txt brings, as pip-audit lists them."""

import json
import subprocess

from .environment import SetupError
from .paths import ROOT

LIMIT_S = 180


def install_audit(environment):
    """None, or a sentence why pip-audit could not be installed."""
    try:
        environment.install("pip-audit", ["pip-audit"])
    except SetupError as error:
        return f"pip-audit could NOT run: {error}"
    return None


def audit(environment, requirements=ROOT / "requirements.txt"):
    """(what was found in one sentence, the vulnerable packages); the list is None where nothing could be audited."""
    if why_not := install_audit(environment):
        return why_not, None
    command = [
        environment.python,
        "-m",
        "pip_audit",
        "-r",
        str(requirements),
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"pip-audit could NOT run: no answer within {LIMIT_S} s.", None
    return judge(done.stdout, done.stderr)


def judge(answer, complaint):
    """Like audit, from what pip-audit printed. A package that it skipped is not an audited one."""
    try:
        packages = json.loads(answer)["dependencies"]
    except (ValueError, KeyError):
        lines = complaint.strip().splitlines() or ["it printed nothing"]
        return f"pip-audit could NOT run: {lines[-1][:200]}", None
    skipped = [package["skip_reason"] for package in packages if "skip_reason" in package]
    audited = [package for package in packages if "skip_reason" not in package]
    if not audited:
        return f"pip-audit could NOT run: 0 packages audited ({skipped[0] if skipped else 'none listed'}).", None
    vulnerable = [package["name"] for package in audited if package["vulns"]]
    found = f"pip-audit: {len(audited)} packages audited, {len(skipped)} skipped, {len(vulnerable)} vulnerable"
    return f"{found}{': ' if vulnerable else ''}{', '.join(vulnerable)}.", vulnerable
