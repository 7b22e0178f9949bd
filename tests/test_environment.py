"""`hstu.environment` and its command, with faked versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from hstu import environment
from hstu.cli import env

ROOT = Path(__file__).resolve().parents[1]
CPU = {
    **dict.fromkeys(environment.PACKAGES, "1.0"),
    "torch": "2.13.0+cpu",
    "triton": "3.7.1",
    "torchrec": "1.8.0",
    "fbgemm-gpu": "1.8.0+cpu",
    "fbgemm-gpu-cpu": "1.8.0",
    "megatron-core": "0.16.1",
}
CUDA = {**CPU, "torch": "2.13.0", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}


def whats(found: dict[str, str | None], cuda: str | None = None, num_gpus: int = 0) -> list[str]:
    return [misfit.what for misfit in environment.version_misfits(found, cuda=cuda, num_gpus=num_gpus)]


def test_good_sets_fit():
    assert whats(CPU) == []
    assert whats({**CPU, "triton": None}) == []
    assert whats({**CPU, "torch": "2.13.0"}, cuda="13.0") == []  # a CUDA torch on a machine without a GPU
    assert whats(CUDA, cuda="13.0", num_gpus=8) == []
    pair = {"torch": "2.11.0+cu130", "triton": "3.6.0", "fbgemm-gpu": "1.6.0", "torchrec": "1.6.1"}
    assert whats({**CUDA, **pair}, cuda="13.0", num_gpus=1) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"torch": "2.12.1+cpu", "triton": None},
            r"fbgemm-gpu-cpu 1\.8\.0 is not 1\.7\.x, as torch 2\.12\.1",
        ),
        ({"torch": "2.9.0"}, r"torch 2\.9\.0 is not one of 2\.10, 2\.11, 2\.12, 2\.13"),
        ({"torch": None}, r"torch is not installed"),
        ({"torchrec": "1.7.0"}, r"torchrec 1\.7\.0 is not 1\.8\.x"),
        ({"torchrec": None}, r"torchrec is not installed"),
        ({"megatron-core": "0.15.3"}, r"megatron-core 0\.15\.3 is not 0\.16\.x"),
        ({"triton": "3.6.0"}, r"triton 3\.6\.0 is not 3\.7\.x"),
        ({"fbgemm-gpu-cpu": None}, r"stand-in for a CPU build that is not installed"),
        ({"fbgemm-gpu": "1.8.0"}, r"overwrite each other's files"),
        (
            {"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None},
            r"is a CUDA build, but torch 2\.13\.0\+cpu is a CPU build",
        ),
    ],
)
def test_each_misfit_is_named_with_a_remedy(change: dict[str, str | None], what: str):
    found = environment.version_misfits({**CPU, **change}, cuda=None, num_gpus=0)
    assert any(re.search(what, misfit.what) for misfit in found), found
    assert all(misfit.remedy for misfit in found)


def test_cpu_tables_beside_a_gpu():
    found = whats({**CPU, "torch": "2.13.0"}, cuda="13.0", num_gpus=1)
    assert found == ["torch sees a GPU, but FBGEMM is a CPU build: tables cannot be on the GPU"]


def test_remedy_installs_the_partner_of_the_installed_torch():
    pair = {"torch": "2.11.0+cu130", "triton": "3.6.0"}
    remedies = [m.remedy for m in environment.version_misfits({**CUDA, **pair}, cuda="13.0", num_gpus=1)]
    assert remedies == ["pip install 'fbgemm-gpu==1.6.*'", "pip install 'torchrec==1.6.*'"]


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """The version of each package in the pinned set."""
    found = dict(
        line.strip().replace("_", "-").split("==")
        for name in ("cpu.txt", "dev.txt")
        for line in (ROOT / "requirements" / name).read_text().splitlines()
        if "==" in line
    )
    shim = tomllib.loads((ROOT / "requirements/fbgemm-gpu-shim/pyproject.toml").read_text())["project"]
    return found | {"fbgemm-gpu": shim["version"]}


def test_pinned_versions_fit():
    assert whats({name: pins().get(name) for name in environment.PACKAGES}) == []


def test_whatever_pip_takes_from_the_ranges_is_of_one_generation():
    ranges = {line.name: line.specifier for line in map(Requirement, PROJECT["dependencies"])}
    generations = {}
    for name in ("torch", "torchrec", "fbgemm-gpu"):
        (low,), (high,) = ([bound.version for bound in ranges[name] if bound.operator == sign] for sign in (">=", "<"))
        minor = low.split(".")
        assert high.split(".") == [minor[0], str(int(minor[1]) + 1)], f"{name}: one minor version"
        generations[name] = low
    assert environment.FBGEMM_FOR_TORCH[generations["torch"]] == generations["fbgemm-gpu"] == generations["torchrec"]


def test_every_pin_is_in_its_range_and_every_range_ends():
    lines = [Requirement(line) for line in PROJECT["dependencies"]]
    extras = [Requirement(line) for extra in PROJECT["optional-dependencies"].values() for line in extra]
    for line in (*lines, *extras):
        assert line.name not in pins() or pins()[line.name] in line.specifier, line
    open_ended = {line.name for line in lines if not any(bound.operator == "<" for bound in line.specifier)}
    assert open_ended == {"packaging"}, "its major version is a year"


def test_every_requirement_has_the_lowest_version_that_its_range_allows(tmp_path: Path):
    lines = [
        Requirement(line) for line in [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    ]
    ranges = {line.name: line.specifier for line in lines if line.name != PROJECT["name"]}
    (tmp_path / "requirements").mkdir()
    script = Path(shutil.copy(ROOT / "requirements" / "lowest.py", tmp_path / "requirements"))

    def constraints(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "pyproject.toml").write_text(text)
        return subprocess.run([sys.executable, "-S", script], capture_output=True, text=True)

    text = (ROOT / "pyproject.toml").read_text()
    found = dict(line.split("==") for line in constraints(text).stdout.splitlines())
    assert found.keys() == ranges.keys()
    assert all(f">={version}" in map(str, ranges[name]) for name, version in found.items())
    done = constraints(text.replace('"packaging>=24.2"', '"packaging<27"'))
    assert done.returncode == 1 and done.stderr.startswith("pyproject.toml: 'packaging<27' says no lowest version")


def test_the_document_names_every_extra():
    named = re.findall(r"^\| `(\w+)` \| ", (ROOT / "docs" / "install.md").read_text().split("## Extras")[1], re.M)
    assert sorted(named) == sorted(PROJECT["optional-dependencies"])


def install(path: Path, name: str, version: str, *requires: str) -> None:
    """Fake the metadata of an installed distribution."""
    folder = path / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (folder / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {line}" for line in requires]) + "\n")


def test_requirements_are_followed(tmp_path: Path):
    install(
        tmp_path,
        "root",
        "1.0",
        "middle>=2",
        "absent",
        "extra-only; extra == 'dev'",
        "old; python_version < '3'",
    )
    install(tmp_path, "middle", "2.1", "Leaf_Package<3")
    install(tmp_path, "leaf-package", "3.0", "root")
    install(tmp_path, "unrelated", "1.0", "nowhere")
    found = environment.requirement_misfits(["root", "not-there"], path=[str(tmp_path)])
    assert {misfit.what for misfit in found} == {
        "root requires absent, which is not installed",
        "middle requires Leaf_Package<3, found 3.0",
    }
    assert "pip install 'Leaf_Package<3'" in {misfit.remedy for misfit in found}


def test_a_missing_root_is_not_reported_twice(tmp_path: Path):
    install(tmp_path, "torchrec", "1.8.0", "fbgemm-gpu")
    assert environment.requirement_misfits(["torchrec", "fbgemm-gpu"], path=[str(tmp_path)]) == []


def test_broken_binaries_are_misfits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_binary.py").write_text(
        "raise OSError('libcudart.so.13: cannot open shared object file\\nmore')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (misfit,) = environment.import_misfits(["json", "broken_binary"])
    assert misfit.what == "import broken_binary fails: OSError: libcudart.so.13: cannot open shared object file"


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A faked machine on which everything fits; tests change it."""
    gpu = {"name": "GPU X", "capability": "9.0", "memory_gib": 80.0}
    machine = {
        "cpu": "CPU Y",
        "cpu_count": 4,
        "cpu_flags": ["amx_tile"],
        "memory_gib": 8.0,
        "memory_free_gib": 4.0,
    }
    record = {
        "python": "3.11.9",
        "versions": dict(CUDA),
        "devices": {**machine, "cuda": "13.0", "gpus": [gpu]},
    }
    monkeypatch.setattr(environment, "describe", lambda: record)
    monkeypatch.setattr(environment, "requirement_misfits", lambda roots: [])
    monkeypatch.setattr(environment, "import_misfits", lambda modules: [])
    return record


def test_command_fits(record: dict, capsys: pytest.CaptureFixture[str]):
    assert env.main([]) == 0
    out = capsys.readouterr().out
    assert "these versions fit together" in out and "misfits" not in out
    assert "GPU X, compute capability 9.0, 80.0 GiB" in out and "amx_tile" in out and "CUDA 13.0 build" in out


def test_command_says_what_to_do(record: dict, capsys: pytest.CaptureFixture[str]):
    record["versions"]["torchrec"] = "1.7.0"
    assert env.main([]) == 1
    assert "torchrec 1.7.0 is not 1.8.x, as torch 2.13.0 needs\n    remedy: pip install 'torchrec==1.8.*'" in (
        capsys.readouterr().out
    )


def test_describe_is_json_and_true():
    import json

    torch = pytest.importorskip("torch")
    record = json.loads(json.dumps(environment.describe()))
    # Wheels of some indexes are of "2.13.0" and say "2.13.0+cu130" when they are imported.
    assert record["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert len(record["devices"]["gpus"]) == torch.cuda.device_count()
    assert record["devices"]["memory_gib"] >= record["devices"]["memory_free_gib"] > 0


def test_flags_of_processors_by_intel_and_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_CPUINFO", tmp_path / "cpuinfo")
    assert environment.cpu_flags() == set()
    (tmp_path / "cpuinfo").write_text("processor : 0\nflags\t\t: fpu avx2\n\nprocessor : 1\nflags\t\t: fpu avx2\n")
    assert environment.cpu_flags() == {"fpu", "avx2"}
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert environment.cpu_flags() == {"fp", "asimd", "bf16"}
