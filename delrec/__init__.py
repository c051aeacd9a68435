"""DELRec as a library: the one import root, from bottom to top runtime, kernels and training, data,
backbone and lm, evaluation and serving.
"""

from pathlib import Path

# In a clone kernels/ and data/ stand beside this folder, in an installed delrec inside it. Beside
# an installed one stand other packages: another `kernels` or `data` could be found there first.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))


def __getattr__(name: str):
    """delrec.Recommender, imported when it is first asked for: nothing else pays for torch."""
    if name != "Recommender":
        raise AttributeError(f"module 'delrec' has no attribute {name!r}")
    from delrec.serving.recommender import Recommender

    return Recommender
