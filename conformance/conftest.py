import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parent))

import report
import upstream
from exclusions import EXCLUSIONS
from testers import FIRST_WORD


upstream.install()
upstream.draw_words_only(FIRST_WORD)


def pytest_addoption(parser):
    parser.addoption("--write-report", type=Path, help="where to write the outcome of a whole run")


def pytest_collection_modifyitems(items):
    unused = set(EXCLUSIONS)
    for item in items:
        for key in (item.name, f"{item.nodeid.split('::')[1]}.{item.name}"):
            if key in EXCLUSIONS:
                item.add_marker(pytest.mark.skip(reason=EXCLUSIONS[key]))
                unused.discard(key)
    if unused and len({item.fspath for item in items}) > 1:
        raise pytest.UsageError(f"exclusions.py names tests that do not exist: {sorted(unused)}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    """Writes the report after a whole run; too many skipped tests make the run fail."""
    path = session.config.getoption("write_report")
    if path is None or hasattr(session.config, "workerinput"):
        return
    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    if "deselected" in stats or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    found = report.outcomes(stats)
    report.write(path, found)
    if report.counts(found)["skipped"] > report.LIMIT * len(found):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
