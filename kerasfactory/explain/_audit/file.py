"""The two files of an audit: written, read, and compared with what they should say."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kerasfactory
from kerasfactory.explain._audit.page import escaped, page, with_data, without_data

_NAME, _VERSION = "kerasfactory.audit", 2
SCHEMA = f"{_NAME}/{_VERSION}"  # one string: each number in an audit is under the checksum
# How far numbers that are computed again may lie from those that were written.
_RELATIVE, ABSOLUTE, _PROBABILITY = 1e-3, 1e-5, 0.02


def hashed(array: np.ndarray) -> str:
    return hashlib.sha256(f"{array.shape} {array.dtype} ".encode() + array.tobytes()).hexdigest()


def _canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def hash_of_json(data: Any) -> str:
    return hashlib.sha256(_canonical(data).encode()).hexdigest()


def _checksum(record: dict[str, Any]) -> str:
    return hash_of_json({key: value for key, value in record.items() if key != "checksum"})


def as_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def files_of(path: Any) -> tuple[Path, Path]:
    """The page, and the data beside it. Either tells the other."""
    file = Path(path)
    if file.suffix not in (".html", ".json"):
        raise ValueError(f"`path` must end in .html, or .json. Received: path={str(path)!r}")
    return file.with_suffix(".html"), file.with_suffix(".json")


def save(record: dict[str, Any], html_file: Path, json_file: Path) -> None:
    shown = page(record)
    record = {**record, "page": hashlib.sha256(shown.encode()).hexdigest()}
    record["checksum"] = _checksum(record)
    text = as_json(record)
    contents = {json_file: text, html_file: with_data(shown, text)}
    partial = {file: file.with_name(f"{file.name}.{os.getpid()}.partial") for file in contents}
    try:
        for file, content in contents.items():
            partial[file].write_text(content, encoding="utf-8", newline="\n")
        for file in contents:  # nobody sees half a file
            os.replace(partial[file], file)
    finally:
        for file in contents:
            partial[file].unlink(missing_ok=True)


def load(file: Path) -> tuple[dict[str, Any], str, str]:
    """What is in one of the two files: the record, the page without it, and the record as it is written there."""
    try:
        text = file.read_text(encoding="utf-8")
        shown, data = without_data(text) if file.suffix == ".html" else ("", text)
        record = json.loads(data)
        name, _, version = record["schema"].partition("/")
        newer = int(version) > _VERSION
        if name != _NAME:
            raise ValueError(f"its schema is {name!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not an audit made by `explain.audit`, or it is damaged: {error}") from None
    if newer:
        raise ValueError(
            f"{file} was made by a newer kerasfactory: it has schema {version}, and this one reads up to {_VERSION}. "
            "Verify it with that."
        )
    return record, shown, data


def intact(files: tuple[Path, Path], given: Path) -> tuple[dict[str, Any], list[str]]:
    """The record in the given one of the two files, and what was done to either since they were written."""
    loaded = {given: load(given)}
    findings = []
    for file in files:
        if file not in loaded:
            try:
                loaded[file] = load(file)
            except (FileNotFoundError, ValueError) as error:
                findings.append(f"{file.name} is missing." if isinstance(error, FileNotFoundError) else str(error))
                continue
        record, shown, data = loaded[file]
        text = as_json(record) if "NaN" not in data else ""
        if record.get("checksum") != _checksum(record):
            findings.append(f"The data in {file.name} were changed: they do not have their checksum any more.")
        elif data != (escaped(text) if shown else text):
            findings.append(f"The data in {file.name} are not written as an audit writes them.")
        elif shown and hashlib.sha256(shown.encode()).hexdigest() != record["page"]:
            findings.append(f"What {file.name} shows was changed.")
        elif shown and record["environment"]["kerasfactory"] == kerasfactory.__version__ and shown != page(record):
            findings.append(f"{file.name} does not show what its data say.")
    if len(loaded) == 2:
        one, other = (dict(_leaves(loaded[file][0])) for file in files)
        paths = [path for path in {**one, **other} if repr(one.get(path)) != repr(other.get(path))]
        if paths:
            findings.append(f"{files[0].name} and {files[1].name} differ in {_some_of(paths)}.")
    return loaded[given][0], findings


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The paths and values of all that is no container. An entry of a list goes by its `id`, if it has one."""
    if isinstance(value, dict | list) and value:
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(value, list) and isinstance(entry, dict):
                key = entry.get("id", key)
            yield from _leaves(entry, f"{path}/{key}" if path else str(key))
    else:
        yield path, value


_SAID_OF_HASHES = {
    "model/weights": "The weights of the model are not those that were audited.",
    "model/configuration": "The configuration of the model is not the one that was audited.",
    "data/x": "The data are not those of the audit.",
    "data/labels": "The labels are not those of the audit.",
    "data/background": "The background data are not those of the audit.",
    "data/groups": "The groups of samples are not those of the audit.",
    "seeds/models": "The models from other seeds are not those of the audit.",
}


def differences(before: dict[str, Any], now: dict[str, Any], absolute: float) -> list[str]:
    """What two records say differently, in sentences; numbers if they lie further apart than rounding puts them."""
    findings = []
    claims = {claim["id"]: claim for claim in now["claims"]}
    for old in before["claims"]:
        new = claims.get(old["id"], old)
        if old["verdict"] != new["verdict"]:
            findings.append(f"“{old['claim']}” was {old['verdict']} and is now {new['verdict']}. {new['reason']}")
    by_section: dict[str, list[str]] = {}
    one, other = dict(_leaves(before)), dict(_leaves(now))
    for path in {**one, **other}:
        section, _, rest = path.partition("/")
        if section in ("environment", "page", "checksum") or rest.endswith(("/verdict", "/reason")):
            continue
        old, new = one.get(path), other.get(path)
        if not _same(old, new, _PROBABILITY if re.search("/p_[a-z]+$", path) else absolute):
            of_hash = _SAID_OF_HASHES.get(re.sub(r"/\d+$", "", path))
            if of_hash:
                findings += [of_hash] * (of_hash not in findings)
            else:
                by_section.setdefault(section, []).append(f"{rest} was {old} and is now {new}")
    return findings + [f"In “{section}”, {_some_of(differing)}." for section, differing in by_section.items()]


def _same(old: Any, new: Any, absolute: float) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=_RELATIVE, abs_tol=absolute)
    return bool(old == new)


def _some_of(entries: list[str]) -> str:
    return "; ".join(entries[:3]) + (f"; and {len(entries) - 3} more" if len(entries) > 3 else "")
