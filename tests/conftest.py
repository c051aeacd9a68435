"""The tests import the scripts from the repository's root."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs a fetch the first time (a package index or the cache)")
