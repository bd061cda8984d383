"""Ruff over notebooks, library and tests.

`ruff.toml` says which rules, and why some of them do not concern the exported modules.
"""
import sys

from checks.project import run


def check_lint(project):
    "Each line that ruff finds fault with; `# noqa: RULE  reason` on the line itself is the only way around."
    command = (sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", ".")
    code, output = run(*command, cwd=project)
    if code == 0:
        return []
    return [line for line in output.splitlines() if line.strip()]
