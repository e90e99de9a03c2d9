"""Text in: documents from parquet, jsonl, txt or a saved dataset, checked, split and cut into blocks."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from glob import glob
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attribution_core.data import Rows
from attribution_core.disk.files import write_array, write_text
from recipes.embedded import Document

KINDS = (".parquet", ".jsonl", ".txt")
JSON = (".jsonl", ".jsonl.gz", ".json.gz")  # Arrow unpacks by the name
BLOCK = 2**20  # bytes of a .jsonl file read at once, at least; a row must fit in
DIGITS = {16: 2**11, 32: 2**24, 64: 2**53}  # from where floats of so many bits skip whole numbers
PAD = -100  # fills up the last block of a document; never predicted


def read_documents(
    where: str, *, text: str = "text", domain: str | None = None, id: str | None = None
) -> list[Document]:
    """Documents from a glob of .parquet, .jsonl (also .jsonl.gz, .json.gz) or .txt files, a saved dataset, or a hub name.

    A .txt file is one document a file. Without a domain column a document's domain is the name of its file, of a .txt
    file that of its folder (or "all" in a saved dataset), and where files or folders of one name lie in several folders
    their path below the folder that they share; without an id column its id is file and row.

    Raises:
        FileNotFoundError: no file matches.
        ValueError: an unknown file type; text that is not UTF-8; a missing column (lists those there are); domains or
            ids that are empty or nested; no documents; ids that repeat.
    """
    is_path = bool(where) and Path(where).exists()  # brackets in a name are no pattern then
    files = [where] if is_path else sorted(glob(where, recursive=True))
    if len(files) == 1 and Path(files[0]).is_dir():
        documents = _from_table(_saved(files[0]), Path(files[0]).name, text, domain, id, "all")
    elif files:
        named = zip(files, _domains_of(files), strict=True)
        documents = [
            doc for file, name in named for doc in _from_file(file, text, domain, id, name)
        ]
    elif any(sign in where for sign in "*?[.") or where.startswith(("/", "~")):
        raise FileNotFoundError(
            f"no file matches {where!r}; give a path or glob of {', '.join(KINDS)} files, a saved dataset or 'embedded'"
        )
    else:
        documents = _from_table(_hub(where), where, text, domain, id, "all")
    if not documents:
        raise ValueError(f"expected documents in {where!r}, got none")
    seen: set[str] = set()
    twice = [doc.id for doc in documents if doc.id in seen or seen.add(doc.id)]  # type: ignore[func-returns-value]
    if twice:
        raise ValueError(f"expected unique ids in {where!r}, got {twice[:5]} more than once")
    return documents


def _ending(file: str) -> str:
    """What tells how a file is read, in lower case.

    Raises:
        ValueError: nothing that is read here.
    """
    ends = [kind for kind in (*JSON, *KINDS) if Path(file).name.lower().endswith(kind)]
    if not ends:
        raise ValueError(f"expected {', '.join(KINDS)}, got {file!r}; convert it first")
    return ends[0]


def _domains_of(files: Sequence[str]) -> list[str]:
    """The default domain of each file; two sources of one name are two domains."""
    endings = {file: _ending(file) for file in files}
    tables = [file for file in files if endings[file] != ".txt"]
    places = {file: Path(file).parent for file in files}
    places |= {file: Path(file[: -len(endings[file])]) for file in tables}
    count = Counter(places[file] for file in tables)
    # train.jsonl beside train.parquet
    places |= {file: Path(file) for file in tables if count[places[file]] > 1}
    same: dict[str, set[Path]] = {}
    for place in places.values():
        same.setdefault(place.name, set()).add(place)
    shared = {name: os.path.commonpath([p.parent for p in some]) for name, some in same.items()}

    def domain(place: Path) -> str:
        alone = len(same[place.name]) == 1
        return (place.name if alone else place.relative_to(shared[place.name]).as_posix()) or "all"

    return [domain(places[file]) for file in files]


def _from_file(
    file: str, text: str, domain: str | None, id: str | None, default: str
) -> list[Document]:
    suffix = _ending(file)
    if suffix == ".txt":
        return [Document(file, _words(file), default, file)]
    import pyarrow

    try:
        if suffix == ".parquet":
            from pyarrow.parquet import read_table

            table = read_table(file)
        else:
            table = _json_columns(file, [c for c in (text, domain, id) if c is not None])
        asked = [c for c in table.column_names if c in (text, domain, id)]
        table.select(asked).validate(full=True)  # that words are UTF-8
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file!r} cannot be read as {suffix[1:]}: {error}") from None
    return _from_table(table, file, text, domain, id, default)


def _words(file: str) -> str:
    """A text file without its byte-order mark."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 in {file!r}, got byte {error.object[error.start]:#04x} at {error.start}; convert it, e.g. "
            "iconv -f latin1 -t utf-8 (or -f utf-16)"
        ) from None


def _opened(file: str) -> BufferedReader:
    """The bytes of a file, unpacked."""
    import pyarrow

    return BufferedReader(pyarrow.input_stream(file))


def _json_columns(file: str, columns: list[str]) -> Any:
    """These columns of a .jsonl file: what others hold, or that they mix types, is not looked at."""
    from pyarrow import Table

    found = {}
    with _opened(file) as lines:
        longest = max(map(len, lines), default=0)
    for column in dict.fromkeys(columns):
        found[column] = _json_column(file, column, longest)
        if found[column].null_count == len(found[column]):  # as a column that is not there reads
            _refuse_missing(column, _json_names(file), file)
    return Table.from_pydict(found)


def _json_names(file: str) -> list[str]:
    """The names in a .jsonl file, whose objects may lie over several lines."""
    with _opened(file) as packed:
        text = packed.read().decode(encoding="utf-8-sig", errors="replace")
    names: set[str] = set()
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        else:
            row, at = json.JSONDecoder().raw_decode(text, at)
            names.update(row)
    return sorted(names)


def _json_column(file: str, column: str, longest: int) -> Any:
    """One column as words, which may look like dates; where it holds none, as numbers or what it is."""
    import pyarrow
    from pyarrow.json import ParseOptions, ReadOptions, read_json

    blocks = ReadOptions(block_size=min(max(BLOCK, longest), 2**31 - 1))
    whole = (pyarrow.int64(), pyarrow.uint64())  # float64 would take a hash's last digits
    for kind in (pyarrow.string(), *whole, pyarrow.float64(), pyarrow.bool_()):
        only = ParseOptions(
            explicit_schema=pyarrow.schema([(column, kind)]), unexpected_field_behavior="ignore"
        )
        with suppress(pyarrow.ArrowInvalid):
            return read_json(file, blocks, only).column(column)
    return read_json(file, blocks).column(column)  # nested, mixed or broken: says so


def _saved(folder: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(folder)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected a saved dataset in the folder {folder!r}, got none; for the files in it give {folder + '/*'!r}"
        ) from None
    if isinstance(found, DatasetDict):
        raise ValueError(
            f"expected one dataset in {folder!r}, got splits {list(found)}; give the folder of one"
        )
    return found.with_format("arrow")[:]


def _hub(name: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, split="train").with_format("arrow")[:]
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file, a saved dataset nor a hub dataset within reach: {error}"
        ) from None


def _from_table(
    table: Any, source: str, text: str, domain: str | None, id: str | None, default: str
) -> list[Document]:
    for column in (text, domain, id):
        if column is not None:
            _refuse_missing(column, table.column_names, source)
    from pyarrow import types

    kind = table.column(text).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    words = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
    if not any(is_kind(kind) for is_kind in words):
        raise ValueError(
            f"expected text in column {text!r} of {source!r}, got {kind}; name yours with --text"
        )
    texts = [value if isinstance(value, str) else "" for value in table.column(text).to_pylist()]
    n = len(texts)
    domains = [default] * n if domain is None else _names(table, domain, source, "domain")
    ids = [f"{source}#{k}" for k in range(n)] if id is None else _names(table, id, source, "id")
    rows = zip(ids, texts, domains, strict=True)
    return [Document(i, t, d, f"{source}:{k}") for k, (i, t, d) in enumerate(rows)]


def _refuse_missing(column: str, names: Sequence[str], source: str) -> None:
    if column not in names:
        raise ValueError(
            f"expected a column {column!r} in {source!r}, got {names}; name yours with --text, --domain or --id"
        )


def _names(table: Any, column: str, source: str, flag: str) -> list[str]:
    """A column in words.

    Raises:
        ValueError: empty cells, which would all become one domain; objects and lists; whole numbers
            that have lost digits.
    """
    from pyarrow import types

    kind = table.column(column).type
    if types.is_nested(kind):
        raise ValueError(
            f"expected words or numbers in column {column!r} of {source!r}, got {kind}; name another column with "
            f"--{flag}, or leave it out"
        )
    values = table.column(column).to_pylist()
    empty = sum(value is None or value != value or not str(value).strip() for value in values)
    if empty:
        raise ValueError(
            f"expected no empty cells in column {column!r} of {source!r}, got {empty} of {len(values)} empty; name them, "
            f"or leave --{flag} out"
        )
    width = kind.value_type if types.is_dictionary(kind) else kind
    exact = DIGITS[width.bit_width] if types.is_floating(width) else np.inf
    rounded = [v for v in values if isinstance(v, float) and abs(v) >= exact]
    if rounded:
        raise ValueError(
            f"expected all digits of the numbers in column {column!r} of {source!r}, got {kind}, which rounds e.g. "
            f"{rounded[0]:.17g}; write them as words or as whole numbers of 64 bits"
        )
    return list(map(str, values))


def without_text(documents: Sequence[Document]) -> list[str]:
    """Ids of documents that hold nothing but white space."""
    return [doc.id for doc in documents if not doc.text.strip()]


def _content(doc: Document) -> bytes:
    """What is equal where texts are, white space and case aside."""
    return hashlib.sha256(" ".join(doc.text.lower().split()).encode(errors="replace")).digest()


def in_both(pool: Sequence[Document], target: Sequence[Document]) -> list[str]:
    """Ids of pool documents whose text, white space and case aside, is also a target document."""
    held = {_content(doc) for doc in target}
    return [doc.id for doc in pool if _content(doc) in held]


def once(documents: Sequence[Document]) -> list[Document]:
    """The documents without those whose text, white space and case aside, has come before."""
    first: dict[bytes, Document] = {}
    for doc in documents:
        first.setdefault(_content(doc), doc)
    return list(first.values())


@dataclass(frozen=True)
class Blocks:
    """Tokenised documents on disk, cut into blocks: `Data` for the core, pickled as a path.

    blocks.npy [n, length + 1] int32: a start token, then tokens of one document, then PAD.
    document.npy [n] the row of the document that a block comes from.
    """

    folder: Path

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        return np.load(self.folder / "blocks.npy", mmap_mode="r")

    @cached_property
    def document(self) -> NDArray[np.int32]:
        return np.load(self.folder / "document.npy")

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()

    @property
    def length(self) -> int:
        """Predicted tokens of a full block."""
        return self.tokens.shape[1] - 1

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Any]:
        import torch

        tokens = torch.from_numpy(self.tokens[np.asarray(rows, dtype=int)].astype(np.int64))
        return {"input_ids": tokens.clamp(min=0), "labels": tokens}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def token_counts(self) -> NDArray[np.int64]:
        """Predicted tokens of every document."""
        per_block = (self.tokens[:, 1:] != PAD).sum(axis=1)
        return np.bincount(self.document, per_block).astype(np.int64)

    @classmethod
    def cut(
        cls,
        documents: Sequence[Document],
        encode: Callable[[list[str]], Iterable[list[int]]],
        start: int,
        length: int,
        folder: Path,
        made_by: str = "",
        progress: Callable[[Any], Any] = iter,
    ) -> Blocks:
        """Tokenise documents and write their blocks; read them back where that was done already.

        `made_by` names the tokeniser: another one cuts anew.

        Raises:
            ValueError: documents without tokens (names them).
        """
        mark = folder / "texts.sha256"
        digest = hashlib.sha256(f"{made_by}/{length}/{start}".encode())
        for doc in documents:
            digest.update(hashlib.sha256(doc.text.encode(errors="replace")).digest())
        if not (mark.exists() and mark.read_text() == digest.hexdigest()):
            rows, owners, empty = [], [], []
            for first in progress(range(0, len(documents), 500)):
                some = documents[first : first + 500]
                for k, ids in enumerate(encode([doc.text for doc in some])):
                    if not ids:
                        empty.append(some[k].id)
                    for at in range(0, len(ids), length):
                        part = ids[at : at + length]
                        rows.append([start, *part, *[PAD] * (length - len(part))])
                        owners.append(first + k)
            if empty:
                raise ValueError(
                    f"expected text in every document, got no tokens for {len(empty)} of them: "
                    f"{empty[:10]}; remove them"
                )
            folder.mkdir(parents=True, exist_ok=True)
            mark.unlink(missing_ok=True)  # it vouches for the others
            for name, numbers in (("blocks", rows), ("document", owners)):
                # who has read the old file keeps it
                write_array(folder / f"{name}.npy", np.array(numbers, dtype=np.int32))
            write_text(mark, digest.hexdigest())
        return cls(folder)


@dataclass(frozen=True, eq=False)
class SomeBlocks(Rows):
    """Some blocks, named by what they hold alone: of others beside them nothing here is made."""

    data: Blocks

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.data.tokens[self.rows].tobytes()).hexdigest()
