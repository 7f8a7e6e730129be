"""The table that `make faults` ends with: every fault that was tried, the promise, what came of it, what was lost."""

import pytest

MARK = "fault"


def pytest_configure(config):
    config.addinivalue_line("markers", f"{MARK}(name, promise): tries a fault against one of the promises P1 to P11")


def pytest_collection_modifyitems(items):
    for item in items:
        for mark in item.iter_markers(MARK):
            item.user_properties.append((MARK, (mark.args[0], mark.kwargs["promise"])))


def pytest_terminal_summary(terminalreporter, config):
    if MARK not in (config.option.markexpr or ""):
        return
    rows = sorted(_rows(terminalreporter), key=lambda row: (int(row[1].split()[0][1:]), row[0]))
    width = max((len(row[0]) for row in rows), default=0)
    terminalreporter.section("faults")
    for name, promise, outcome, lost in [("fault", "promise", "outcome", "lost work"), *rows]:
        terminalreporter.write_line(f"{name:{width}}  {promise:8}  {outcome:15}  {lost}")
    kept = sum(row[2] == "as promised" for row in rows)
    distinct = len({row[0] for row in rows})
    terminalreporter.write_line(f"{distinct} distinct faults tried, {kept} of {len(rows)} as promised")


def _rows(terminalreporter):
    outcomes = {
        "passed": "as promised",
        "failed": "NOT AS PROMISED",
        "error": "NOT AS PROMISED",
        "skipped": "not tried",
    }
    for kind, outcome in outcomes.items():
        for report in terminalreporter.stats.get(kind, []):
            if isinstance(report, pytest.TestReport):
                values = dict(report.user_properties)
                lost = [str(value) for key, value in report.user_properties if key == "lost_work"]
                for key, value in report.user_properties:
                    if key == MARK:
                        yield value[0], value[1], outcome, ", ".join(lost) or values.get("reason", "nothing")
