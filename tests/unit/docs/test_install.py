"""The pip commands of the docs, in an environment of their own, without a package index.

What ckptcoord needs is there already: that of the tests. ckptcoord itself is not, and is built and
installed as it is for users, not as an editable project.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

from tests.unit.docs.runner import ROOT


def command(page: str, name: str) -> str:
    text = (ROOT / "docs" / page).read_text()
    (found,) = re.findall(rf"<!-- run apart: {name} -->\n```bash\n(.*?)```", text, re.DOTALL)
    return found


def test_pip_installs_it_and_its_extra(tmp_path: Path) -> None:
    clone, scratch = tmp_path / "clone", tmp_path / "venv"
    clone.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(ROOT / "src/ckptcoord", clone / "src/ckptcoord")
    venv.create(scratch, with_pip=True)
    (packages,) = scratch.glob("lib/python*/site-packages")
    (packages / "of-the-tests.pth").write_text(sysconfig.get_path("purelib"))

    def run(text: str, folder: Path) -> str:
        known = {**os.environ, "PATH": f"{scratch}/bin:{os.environ['PATH']}"}  # noqa: TID251 (for pip)
        known |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PYTHONPATH": ""}
        # (0 there means without isolation: the option is a negative one.)
        known |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
        done = subprocess.run(
            ["bash", "-c", text],
            check=False,
            cwd=folder,
            env=known,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("pip uninstall -y setuptools", tmp_path)  # some venvs have an old one
    run(command("quickstart.md", "pip"), clone)
    run(command("export.md", "pip onnx"), tmp_path)
    where = run("python -c 'import ckptcoord; print(ckptcoord.__file__)'", tmp_path)
    installed = Path(where.strip()).parent
    assert installed.parent == packages
    built = {str(one.relative_to(installed)) for one in installed.rglob("*") if one.is_file()}
    sources = {
        str(one.relative_to(ROOT / "src/ckptcoord"))
        for one in (ROOT / "src/ckptcoord").rglob("*")
        if one.is_file() and "__pycache__" not in one.parts
    }
    assert {one for one in built if "__pycache__" not in one} == sources
    assert "ckptcoord" in run("ckptcoord --version", tmp_path)
