"""Whatever `make` installs is compared with its hash."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.backend_independent
ROOT = Path(__file__).parents[1]
LOCKS = sorted(path.name for path in ROOT.glob("requirements*.txt"))


@pytest.mark.parametrize("name", LOCKS)
def test_every_file_to_install_has_its_version_and_hashes_and_no_address(name):
    text = (ROOT / name).read_text()
    entries = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace(" \\\n", "").splitlines()
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9._-]+==[^ ]+( ; [^\\]*?)?(    --hash=sha256:[0-9a-f]{64})+", entry), entry[:80]
    assert "://" not in text


def test_locks_agree():
    versions = {}
    for name in LOCKS:
        for line in re.findall(r"^[a-z0-9._-]+==.*", (ROOT / name).read_text(), flags=re.MULTILINE):
            package = Requirement(line.rstrip(" \\"))
            if package.marker is None or package.marker.evaluate():  # what is installed here
                versions.setdefault(package.name, set()).add(str(package.specifier).removesuffix("+cpu"))
    assert {package for package, found in versions.items() if len(found) > 1} == set()


def test_make_installs_nothing_without_its_hash_but_other_versions_of_keras_and_the_package_itself():
    commands = re.findall(r"(?:\$\(PIP\) install|\$\(UV\)) .*", (ROOT / "Makefile").read_text())
    without = [command for command in commands if "--require-hashes" not in command]
    assert len(commands) > len(without) == 3
    assert all("keras==" in command or command.endswith((" keras", " -e .")) for command in without)
