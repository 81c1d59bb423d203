"""The two files of an audit: written, read, and compared with what they should say."""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kerasfactory
from kerasfactory.explain._audit.page import data_of, page, with_data
from kerasfactory.explain._audit.schema import NAME, SCHEMA, problem_of_record
from kerasfactory.explain._engine.data import named_inputs

_MOST_BYTES, _MOST_NESTED = 32 * 2**20, 12  # of a file
# How far numbers that are computed again may lie from those that were written, in the unit of what they are.
_RELATIVE, ABSOLUTE, _PROBABILITY = 1e-3, 1e-5, 0.02
_COUNTED = re.compile(r"(?<=better than )(0|[1-9][0-9]{0,8})(?= of ([0-9]{1,9}) rankings)")  # a p-value in words

_Keys = tuple[Any, ...]  # the way to a value in a record


class _NoAuditError(ValueError):
    """Nothing says that a file was ever an audit."""


def hashed(x: Any) -> str:
    """Of an array, or of several with their names."""
    inputs = named_inputs(x)
    if "" in inputs:
        return _hash_of_array(inputs[""])
    return hash_of_json({name: _hash_of_array(array) for name, array in inputs.items()})


def _hash_of_array(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + array.tobytes()).hexdigest()


def hash_of_json(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    return hash_of_json({key: value for key, value in record.items() if key != "checksum"})


def as_json(record: dict[str, Any]) -> str:
    """In ASCII: no text in it can be taken for another, and half a surrogate pair can be written."""
    return json.dumps(record, indent=1, allow_nan=False, default=_of_numpy) + "\n"


def _of_numpy(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def plain(data: Any) -> Any:
    """The data as they come back from their file."""
    return json.loads(as_json(data))


def files_of(path: Any) -> tuple[Path, Path]:
    """The page, and the data beside it. Either tells the other."""
    file = Path(path)
    if file.suffix not in (".html", ".json"):
        raise ValueError(f"`path` must end in .html, or .json. Received: path={str(path)!r}")
    return file.with_suffix(".html"), file.with_suffix(".json")


def _content(record: dict[str, Any], suffix: str) -> bytes:
    """What a file with this record holds: the only way from a record to bytes, for those who write and who check."""
    text = as_json(record)
    return (with_data(page(record), text) if suffix == ".html" else text).encode()


def save(record: dict[str, Any], html_file: Path, json_file: Path) -> None:
    record = {**record, "checksum": _checksum(record)}
    wrong, contents = problem_of_record(record), {}
    if not wrong:
        contents = {file: _content(record, file.suffix) for file in (json_file, html_file)}
        largest = max(map(len, contents.values()))
        wrong = f"the page would have {largest / 2**20:.0f} MiB" if largest > _MOST_BYTES else ""
    if wrong:
        raise ValueError(
            f"This audit cannot be written, because `verify` would refuse it: {wrong}. Its numbers may be no larger "
            f"than 1e100, and its page {_MOST_BYTES // 2**20} MiB: a larger `level` needs fewer draws."
        )
    partial = {file: file.with_name(f"{file.name}.{os.getpid()}.partial") for file in contents}
    try:
        for file, content in contents.items():
            partial[file].write_bytes(content)
        for file in contents:  # nobody sees half a file
            os.replace(partial[file], file)
    finally:
        for file in contents:
            partial[file].unlink(missing_ok=True)


def is_audit(file: Path) -> bool:
    try:
        return bool(_schema_of(_parsed(_read(file), file.suffix)))
    except ValueError:
        return False


def intact(files: tuple[Path, Path], given: Path) -> tuple[dict[str, Any], list[str]]:
    """The record in the given one of the two files, and what is wrong with either: one file alone is enough."""
    records: dict[Path, dict[str, Any]] = {}
    findings: list[str] = []
    for file in files:
        if file == given or file.exists():
            try:
                records[file], found = _examined(file)
            except _NoAuditError as error:
                if file == given:
                    raise
                found = [str(error)]
            findings += found
    if all(records.get(file) for file in files):
        one, other = (list(_leaves(records[file])) for file in files)
        pairs = itertools.zip_longest(one, other, fillvalue=(("their length",), None))
        paths = dict.fromkeys(path for pair in pairs if repr(pair[0]) != repr(pair[1]) for path, _ in pair)
        if paths:
            findings.append(f"{files[0].name} and {files[1].name} differ in {_some_of([*map(_joined, paths)])}.")
    return records[given], findings


def _examined(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The record in a file, empty if there is none that can be used, and what is wrong."""
    content = _read(file)
    try:
        record = _parsed(content, file.suffix)
        schema = _schema_of(record)
        has_checksum = record.get("checksum") == _checksum(record)
    except ValueError as error:
        if f"{NAME}/".encode() not in content:
            raise _NoAuditError(f"{file} is not an audit made by `explain.audit`, or it is damaged: {error}") from None
        return {}, [f"{file.name} is damaged: {error}"]
    if schema != SCHEMA:
        return {}, [
            f"{file.name} cannot be checked with kerasfactory {kerasfactory.__version__}, which reads {SCHEMA}: it is "
            f"{_short(schema)}. Verify it with the version that made it, or make a new audit."
        ]
    if not has_checksum:
        return record, [f"The data in {file.name} were changed: they no longer match their checksum."]
    if wrong := problem_of_record(record):
        return record, [f"The data in {file.name} are not those of an audit: {_short(wrong)}."]
    if record["environment"]["kerasfactory"] != kerasfactory.__version__:
        return record, []  # which is a finding elsewhere: another version may show the same in another way
    if content == _content(record, file.suffix):
        return record, []
    if file.suffix == ".html":
        return record, [f"{file.name} does not show what its data say."]
    return record, [f"The data in {file.name} are not written as an audit writes them."]


def _read(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(_MOST_BYTES + 1)


def _parsed(content: bytes, suffix: str) -> Any:
    """The JSON in a file; a `ValueError` for what no audit holds and what readers of JSON do not agree on."""
    if len(content) > _MOST_BYTES:
        raise ValueError(f"it is larger than {_MOST_BYTES // 2**20} MiB")
    text = content.decode()
    try:
        found = json.loads(
            data_of(text) if suffix == ".html" else text,
            object_pairs_hook=_without_repetition,
            parse_float=_finite,
            parse_constant=_refused,
        )
    except (RecursionError, MemoryError):
        raise ValueError("its data are nested too deeply, or too large") from None
    level = [found]
    for _ in range(_MOST_NESTED):
        level = [part for one in level for part in _parts(one)]
    if level:
        raise ValueError("its data are nested too deeply")
    return found


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its data have a key twice")
    return found


def _finite(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refused(text)


def _refused(text: str) -> Any:
    raise ValueError(f"{text} is not a number in JSON")


def _schema_of(record: Any) -> str:
    schema = record.get("schema") if isinstance(record, dict) else None
    if not isinstance(schema, str) or not schema.startswith(f"{NAME}/"):
        raise ValueError("its data do not have the schema of an audit")
    return schema


def _leaves(value: Any, path: _Keys = ()) -> Iterator[tuple[_Keys, Any]]:
    """The paths and values of all that is no container. An entry of a list goes by its `id`, if it has one."""
    if isinstance(value, dict | list) and value:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, list) and isinstance(entry, dict):
                key = entry.get("id", key)
            yield from _leaves(entry, (*path, key))
    else:
        yield path, value


_SAID_OF_HASHES = {
    ("model", "weights"): "The weights of the model are not those that were audited.",
    ("model", "configuration"): "The configuration of the model is not the one that was audited.",
    ("data", "x"): "The data are not those of the audit.",
    ("data", "labels"): "The labels are not those of the audit.",
    ("data", "background"): "The background data are not those of the audit.",
    ("data", "groups"): "The groups of samples are not those of the audit.",
    ("seeds", "models"): "The models from other seeds are not those of the audit.",
}


def differences(before: dict[str, Any], now: dict[str, Any], absolute: float) -> list[str]:
    """What two records say differently, in sentences; numbers if they lie further apart than rounding puts them.

    Only the sections of the second record are compared.
    """
    claims = {claim["id"]: claim for claim in now["claims"]}
    changed = [old for old in before["claims"] if old["verdict"] != claims.get(old["id"], old)["verdict"]]
    findings = [
        f"“{_short(old['claim'])}” was {old['verdict']} and is now {claims[old['id']]['verdict']}. "
        f"{claims[old['id']]['reason']}"
        for old in changed
    ]
    said = {("claims", old["id"], key) for old in changed for key in ("verdict", "reason")}
    units = _units(now)
    for section in now:
        one, other = (dict(_leaves(record[section], (section,))) for record in (before, now))
        differing = []
        for path in {**one, **other}:
            unit = next((unit for start, unit in units.items() if path[: len(start)] == start), 1.0)
            if path in said or _same(one.get(path, ()), other.get(path, ()), path, absolute * unit):
                continue
            of_hash = _SAID_OF_HASHES.get(path[:2])
            if of_hash is None:
                old, new = (_short(record.get(path, "not there")) for record in (one, other))
                differing.append(f"{_joined(path[1:])} was {old} and is now {new}")
            elif of_hash not in findings:
                findings.append(of_hash)
        if not differing and [*one] != [*other] and one.keys() == other.keys():
            differing = ["the order was another"]
        if differing:
            findings.append(f"In “{section}”, {_some_of(differing)}.")
    return findings


def _units(record: dict[str, Any]) -> dict[_Keys, float]:
    """From the start of a path to the size that rounding goes by: 1 for shares, but not for losses and outputs."""
    skill, ranking = record["skill"] or {}, record["faithfulness"]
    loss = abs(skill.get("base_loss") or skill.get("loss") or 1.0)
    of_features = [one["attribution"] for one in record["attribution"]["features"]]
    changes = [number for test in (ranking or {"tests": []})["tests"] for number in (test["observed"], *test["null"])]
    change = _largest(changes)
    units: dict[_Keys, float] = {("skill", "skill"): 1.0, ("skill", "skill_interval"): 1.0, ("skill",): loss}
    units |= {("features",): loss, ("controls", "loss"): loss, ("claims", "attention-loss"): loss}
    units |= {("claims", claim["id"]): loss for claim in record["claims"] if claim["feature"] is not None}
    units |= {("attribution",): _largest(of_features), ("faithfulness",): change}
    return units | {("claims", f"ranking-{name}"): change for name in ("comprehensiveness", "sufficiency")}


def _largest(numbers: list[float]) -> float:
    return max(map(abs, numbers), default=0.0) or 1.0


def _same(old: Any, new: Any, path: _Keys, absolute: float) -> bool:
    if type(old) is not type(new):
        return False
    if isinstance(old, float):
        # A p-value that is small stays small.
        is_p = str(path[-1]).startswith("p_")
        near = min(_PROBABILITY, _PROBABILITY / 10 + max(old, new) / 2) if is_p else absolute
        return math.isclose(old, new, rel_tol=_RELATIVE, abs_tol=near)
    if old != new and path[-1] == "reason" and str(path[1]).startswith("ranking-"):
        counts = [[*map(int, found)] for text in (old, new) for found in _COUNTED.findall(text)]
        if len(counts) == 2 and abs(counts[0][0] - counts[1][0]) <= _PROBABILITY * counts[1][1]:
            old, new = (_COUNTED.sub("", text) for text in (old, new))
    return bool(old == new)


def _joined(path: _Keys) -> str:
    return "/".join(map(str, path))


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 400 else f"{text[:400]}…"


def _some_of(entries: list[str]) -> str:
    return "; ".join(entries[:3]) + (f"; and {len(entries) - 3} more" if len(entries) > 3 else "")
