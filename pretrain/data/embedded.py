"""The corpus that needs no files: docstrings of the standard library and of torch, and pydoc's topics.

Nothing is imported to collect it, because importing runs code and depends on the platform: sources are parsed with
``ast``. One document is one module (or one topic). Exact repeats of a docstring are kept once, at the first module in
alphabetic order, so no docstring is in two splits.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.console import bar
from pretrain.data.workers import workers
from pretrain.errors import UserError

SPLITS = ("train", "valid", "test")
HELD_OUT_SHARE = 0.06  # of the modules, for each of valid and test
LARGEST_HELD_OUT_WORDS = 5_000  # a larger module is always train: it would be most of a small split
SHORTEST_CALL_LITERAL = 40  # characters; shorter arguments of add_docstr are names

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "_vendor", "site_packages"}
)


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Documents by split, in a fixed order, and where they come from.

    Attributes:
        documents: split name -> texts.
        provenance: versions, counts of documents, words and characters by split, SHA-256 of the text by split.
    """

    documents: dict[str, tuple[str, ...]]
    provenance: dict[str, Any]


_collected: dict[str, EmbeddedCorpus] = {}


def collect(processes: int = 1, *, show: bool = False) -> EmbeddedCorpus:
    """The corpus of this interpreter and this torch; the same on every call, parsed once in a process.

    Args:
        processes: how many parse; the result does not depend on it.
        show: whether to show a progress bar.

    Raises:
        UserError: this installation has no Python sources to read docstrings from.
    """
    if "corpus" not in _collected:
        _collected["corpus"] = _build(_module_docstrings(processes, show))
    return _collected["corpus"]


def split_of_module(name: str, words: int) -> str:
    """The split of a module or topic: a hash of its name, except that large ones are always train."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    if words > LARGEST_HELD_OUT_WORDS or share >= 2 * HELD_OUT_SHARE:
        return "train"
    return "valid" if share < HELD_OUT_SHARE else "test"


def docstrings_of_source(source: bytes) -> list[str]:
    """Docstrings of a module, its classes and functions, and the texts it gives to ``add_docstr``, in source order.

    torch documents its C functions with ``add_docstr(function, text)``. A source this Python cannot parse has none.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((getattr(node, "lineno", 0), ast.get_docstring(node) or ""))
        elif isinstance(node, ast.Call) and "add_docstr" in _called_name(node):
            literals = (part for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant))
            found += [
                (literal.lineno, literal.value.strip())
                for literal in literals
                if isinstance(literal.value, str) and len(literal.value) >= SHORTEST_CALL_LITERAL
            ]
    return [text for _, text in sorted(found, key=lambda entry: entry[0]) if _is_plain_text(text)]


def _called_name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _is_plain_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate in an example
        return False
    return bool(text.strip()) and "\0" not in text


def _sources() -> Iterator[tuple[str, Path]]:
    """(module name, file) of the standard library and of torch."""
    torch_spec = importlib.util.find_spec("torch")
    roots = [("", Path(sysconfig.get_path("stdlib")))]
    if torch_spec is not None and torch_spec.origin:
        roots.append(("torch", Path(torch_spec.origin).parent))
    for package, root in roots:
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            if all(part.isidentifier() for part in parts) and not _SKIPPED_FOLDERS.intersection(parts):
                named = [part for part in (package, *parts) if part and part != "__init__"]
                yield ".".join(named), path


def _parse(source: tuple[str, Path]) -> tuple[str, list[str]]:
    name, path = source
    return name, docstrings_of_source(path.read_bytes())


def _module_docstrings(processes: int, show: bool) -> Iterator[tuple[str, list[str]]]:
    sources = sorted(_sources())
    with bar(len(sources), "collecting docstrings", "modules", show=show) as progress:
        if processes == 1:
            results: Iterator[tuple[str, list[str]]] = map(_parse, sources)
            for result in results:
                progress.update()
                yield result
            return
        with workers(processes) as pool:
            for result in pool.map(_parse, sources, chunksize=16):
                progress.update()
                yield result


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield f"topic:{name}", [topics[name].strip()]


def _build(modules: Iterator[tuple[str, list[str]]]) -> EmbeddedCorpus:
    seen: set[str] = set()
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    for source in (modules, _topics()):
        for name, docstrings in source:
            fresh = [text for text in dict.fromkeys(docstrings) if text not in seen]
            seen.update(fresh)
            if fresh:
                text = "\n\n".join(fresh)
                documents[split_of_module(name, len(text.split()))].append(text)
    if not all(documents.values()):
        raise UserError(
            "data.corpus.source is embedded, but this Python has too few .py sources to take docstrings from; "
            "give files with data.corpus.source text, jsonl or parquet"
        )
    frozen = {split: tuple(texts) for split, texts in documents.items()}
    return EmbeddedCorpus(frozen, _provenance(frozen))


def _provenance(documents: dict[str, tuple[str, ...]]) -> dict[str, Any]:
    return {
        "corpus": "docstrings of the standard library and torch, and pydoc topics",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "splits": {
            split: {
                "documents": len(texts),
                "words": sum(len(text.split()) for text in texts),
                "characters": sum(map(len, texts)),
                "sha256": hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest(),
            }
            for split, texts in documents.items()
        },
    }
