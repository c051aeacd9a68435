"""What all tests share: fixtures stand by topic in the files of pytest_plugins.

The scripts are imported from the repository's root.
"""

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest_plugins = [
    "scripts",
    "toys",
    "tiny_lms",
    "chain",
    "commands",
    "cycle",
    "distilling",
    "tuning",
    "kinds",
    "vector_runs",
    "ruled",
    "recipe_runs",
    "copiers",
    "recommenders",
    "run_folders",
    "stopped_runs",
    "pictures",
    "shared_runs",
]
if not torch.cuda.is_available():
    # read when a Triton kernel is defined: the kernels run here, slowly, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"


# tests/all is long: it runs when it is named
collect_ignore = ["all"]


def pytest_configure(config):
    # the tensors here are tiny: on a busy machine more threads wait for each other
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def findings(tmp_path_factory):
    """What is measured of an LM at load is kept in a folder of the tests', not in the user's
    cache.
    """
    from delrec.lm import check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def elsewhere():
    """Where a test stands in the clone, and gives the program another root, the runs and data that
    somebody has made in the clone are not the current folder's.
    """
    from delrec import places, runtime

    clone, current = Path(__file__).resolve().parent.parent, places.current_folder

    def current_folder(own):
        return runtime.ROOT if current(own) == clone else current(own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "current_folder", current_folder)
        yield


@pytest.fixture
def alone():
    """The ranks of a single process."""
    return SimpleNamespace(rank=0, world=1, device=torch.device("cpu"), main=True)


def pytest_collection_finish():
    """What is imported lives until the end: to look through it for garbage again and again took a
    fifteenth of the time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
