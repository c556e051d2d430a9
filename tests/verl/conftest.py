"""A run of these that skips something, or finds fewer tests than there are, fails: it would prove nothing."""

EXPECTED = 318


def pytest_sessionfinish(session, exitstatus):
    """Fail a run of the whole folder that skipped a test here or passed fewer than there should be."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    passed, skipped = (
        sum(report.nodeid.startswith("tests/verl/") for report in reporter.stats.get(name, []))
        for name in ("passed", "skipped")
    )
    if exitstatus == 0 and not session.config.option.keyword and (skipped or passed < EXPECTED):
        reporter.write_line(f"tests/verl: {passed} passed and {skipped} skipped; expected {EXPECTED} and 0", red=True)
        session.exitstatus = 1
