"""A run of these that skips something, or finds fewer tests than there are, fails: it would prove nothing."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for both_losses

EXPECTED = 348


def pytest_sessionfinish(session, exitstatus):
    """Fail a run that skipped a test here, and one of the whole folder that passed more or fewer than there are."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed, skipped = (
        sum(report.nodeid.startswith("tests/verl/") for report in reporter.stats.get(name, []))
        for name in ("passed", "skipped")
    )
    whole = not session.config.option.keyword
    if exitstatus == 0 and (skipped or (whole and passed != EXPECTED)):
        reporter.write_line(f"tests/verl: {passed} passed and {skipped} skipped; expected {EXPECTED} and 0", red=True)
        session.exitstatus = 1
