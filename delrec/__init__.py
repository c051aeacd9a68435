"""DELRec as a library: the one import root, from bottom to top runtime, kernels and training, data,
backbone and lm, evaluation and serving.
"""

from pathlib import Path

# kernels/ and data/ stand beside this folder; others own the names `kernels` and `data`
__path__.append(str(Path(__file__).resolve().parent.parent))
