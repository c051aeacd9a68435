"""What the scripts say: every sentence in the sources with the flags that it names, and which
script's command can come to say it.

A call graph by names: a function, class or constant reaches what its code names, a class all of its
methods.
"""

import ast
import importlib
import re
from pathlib import Path

from scripts import ROOT

SCRIPTS = {
    "train_backbone.py": "train_backbone",
    "distill.py": "distill",
    "finetune.py": "finetune",
    "evaluate.py": "evaluate",
    "data/prepare.py": "delrec.data.prepare",
    "recipes/mlp.py": "recipes.mlp",
}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
TORCHRUN = {"--nproc_per_node"}  # the launcher's own
SAID = re.compile(rf"{'|'.join(map(re.escape, SCRIPTS))}|{FLAG.pattern}")
CLAUSE = re.compile(r"[,;:()]| or | and ")
Node = tuple[str, str]  # (module, name of a function, class or constant at its top)


def options_of(script: str) -> set[str]:
    """The flags of a script."""
    main = importlib.import_module(SCRIPTS[script]).main
    opts = [p.opts + p.secondary_opts for p in main.params]
    return {flag for flags in opts for flag in flags} | {"--help"} | TORCHRUN


def modules() -> dict[str, Path]:
    """{module: its file} of everything that a script can import."""
    files = [ROOT / name for name in ("common.py", *SCRIPTS) if "/" not in name]
    for folder in ("delrec", "data", "kernels", "recipes"):
        files += sorted((ROOT / folder).rglob("*.py"))
    found = {}
    for path in files:
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = ("delrec", *parts) if parts[0] in ("data", "kernels") else parts
        found[".".join(own)] = path
    return found


class Sources:
    """The nodes of all modules, and what each reaches."""

    def __init__(self):
        self.code: dict[Node, list[ast.AST]] = {}
        self.names: dict[str, dict[str, tuple]] = {}  # module -> name -> (module, name or None)
        self.modules = modules()
        for module, path in self.modules.items():
            self.read(module, ast.parse(path.read_text(encoding="utf-8")))

    def read(self, module: str, tree: ast.Module) -> None:
        """Adds a module's nodes and what its names mean."""
        names = self.names[module] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    inner = whole in self.modules
                    names[alias.asname or alias.name] = (
                        (whole, None) if inner else (node.module, alias.name)
                    )
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    names[alias.asname or alias.name] = (alias.name, None)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.code[module, node.name] = [node]
                names[node.name] = (module, node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        self.code.setdefault((module, target.id), []).append(node)
                        names[target.id] = (module, target.id)

    def named_in(self, node: Node):
        """The nodes that a node's code names."""
        names = self.names[node[0]]
        for tree in self.code.get(node, ()):
            for part in ast.walk(tree):
                if isinstance(part, ast.Name) and part.id in names:
                    yield names[part.id]
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                    module, inner = names.get(part.value.id, ("", ""))
                    if inner is None:
                        yield module, part.attr

    def reached_from(self, start: Node) -> set[Node]:
        """All nodes that a node reaches."""
        seen, todo = set(), [start]
        while todo:
            node = self.resolved(todo.pop())
            if node in self.code and node not in seen:
                seen.add(node)
                todo += self.named_in(node)
        return seen

    def resolved(self, node: Node) -> Node:
        """The node that a name means where a module only passes it on."""
        for _ in range(5):
            if node in self.code or node[0] not in self.names:
                return node
            node = self.names[node[0]].get(node[1], (None, None))
        return node


def text_of(tree: ast.AST) -> list[str]:
    """The sentences of an expression: its strings joined in their order, what is filled in as {};
    one for each element of a list or a tuple."""
    if isinstance(tree, ast.List | ast.Tuple | ast.Dict | ast.Set):
        return [text for part in ast.iter_child_nodes(tree) for text in text_of(part)]
    if isinstance(tree, ast.Call) and getattr(tree.func, "attr", "") == "option":
        return []  # what --help says
    if isinstance(tree, ast.Constant):
        return [tree.value] if isinstance(tree.value, str) else []
    if isinstance(tree, ast.FormattedValue):
        return ["{}"]
    parts = [text_of(part) for part in ast.iter_child_nodes(tree)]
    return ["".join(text for part in parts for text in part)] if any(parts) else []


def sentences_of(tree: ast.AST) -> list[str]:
    """The sentences in the statements of a function or class, without docstrings and options."""
    found = []
    for part in ast.walk(tree):
        if isinstance(part, ast.Return | ast.Assign | ast.AugAssign | ast.Yield) and part.value:
            found += text_of(part.value)
        elif isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
            found += [text for argument in part.value.args for text in text_of(argument)]
    return [text for text in found if " " in text]


def flags_said(text: str):
    """(flag, the script whose command it stands in, or None) of a sentence."""
    for clause in CLAUSE.split(text):
        script = None
        for found in SAID.findall(clause):
            if found in SCRIPTS:
                script = found
            else:
                yield found, script
