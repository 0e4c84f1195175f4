"""How the native kernels are built, named, chosen and refused."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.attention.base import load_attention
from model.attention.native import NativeAttention
from model.native import build as build_module
from model.native import levels, library

AVX2_LAPTOP = "flags\t\t: fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe\n"
SERVER = AVX2_LAPTOP.rstrip() + " avx512f avx512bw avx512cd avx512dq avx512vl"
SOURCES = ["attention", "linear", "rowwise"]
CPUS = [
    (AVX2_LAPTOP, ["v3", "baseline"]),
    (SERVER, ["v4", "v3", "baseline"]),
    (SERVER + " avx512_bf16\n", ["v4_bf16", "v4", "v3", "baseline"]),
    ("Features\t: fp asimd\n", ["baseline"]),
    ("flags\t: fpu sse2\nflags\t: avx2\n", ["baseline"]),
]


@pytest.fixture
def empty_lib(tmp_path, monkeypatch):
    """A place to build in, so that no test touches the libraries in use; what is built there is not optimised."""
    monkeypatch.setattr(levels, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(build_module, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(build_module, "COMMON_FLAGS", ("-std=c11", "-O0", "-fPIC", "-shared"))
    return tmp_path


@pytest.fixture
def only_baseline(monkeypatch):
    monkeypatch.setattr(build_module, "buildable_levels", lambda: [levels.LEVELS[-1]])


def needs_compiler():
    try:
        build_module.find_compiler()
    except build_module.BuildError:
        pytest.skip("no C compiler")


@pytest.mark.parametrize(("cpuinfo", "names"), CPUS)
def test_levels_follow_the_processor(tmp_path, monkeypatch, cpuinfo, names):
    monkeypatch.setattr(levels.platform, "machine", lambda: "x86_64")
    path = tmp_path / "cpuinfo"
    path.write_text(cpuinfo)
    assert [level.name for level in levels.runnable_levels(path)] == names


def test_a_processor_that_does_not_tell_gets_the_baseline(tmp_path):
    assert [level.name for level in levels.runnable_levels(tmp_path / "missing")] == ["baseline"]


def test_other_machines_build_only_the_baseline(monkeypatch):
    monkeypatch.setattr(levels.platform, "machine", lambda: "aarch64")
    assert [level.name for level in levels.buildable_levels()] == ["baseline"]


def test_build_makes_a_library_once_and_again_when_a_source_changes(empty_lib, only_baseline, monkeypatch):
    needs_compiler()
    built = build_module.build()
    assert built == [empty_lib / f"quire_{source}_baseline.so" for source in SOURCES]
    assert ctypes.CDLL(str(built[0])).quire_attend
    assert build_module.build() == []
    monkeypatch.setattr(build_module, "digest_of", lambda source, level: "0" * 64)
    assert build_module.build() == built
    assert sorted(empty_lib.iterdir()) == built


def knows_openmp(compiler, tmp_path):
    (tmp_path / "empty.c").write_text("int x;")
    command = [compiler, "-fopenmp", "-shared", "-fPIC", str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty.so")]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("openmp", [True, False])
def test_the_source_compiles_with_and_without_openmp_and_without_a_warning(tmp_path, name, openmp):
    """With it too: the build would quietly fall back to one thread."""
    needs_compiler()
    compiler = build_module.find_compiler()
    if openmp and not knows_openmp(compiler, tmp_path):
        pytest.skip("a compiler without OpenMP")
    flags = [flag for flag in levels.COMMON_FLAGS if flag != "-O3"] + ["-fopenmp"] * openmp
    command = [compiler, *flags, "-Werror", '-DQUIRE_SOURCE_DIGEST="x"']
    source = levels.SOURCE_DIR / f"{name}.c"
    subprocess.run([*command, str(source), "-o", str(tmp_path / "plain.so")], check=True, timeout=60)
    library = (tmp_path / "plain.so").read_bytes()
    assert (b"GOMP_" in library or b"__kmpc_" in library) == openmp


def test_a_level_that_the_compiler_does_not_know_is_skipped(empty_lib, monkeypatch):
    needs_compiler()
    unknown = levels.Level("future", ("-march=quire-9000",), frozenset({"future"}))
    monkeypatch.setattr(build_module, "buildable_levels", lambda: [unknown, levels.LEVELS[-1]])
    assert [path.name for path in build_module.build()] == [f"quire_{source}_baseline.so" for source in SOURCES]


def test_no_compiler_is_one_clear_line(empty_lib):
    with pytest.raises(build_module.BuildError, match="no C compiler found"):
        build_module.build(("quire-no-such-cc",))


def test_the_command_fails_with_one_line_where_it_cannot_build(empty_lib, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["build", "--cc", "quire-no-such-cc"])
    assert build_module.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no C compiler found")
    assert error.count("\n") == 1


def test_a_compiler_that_fails_is_reported(empty_lib, only_baseline):
    with pytest.raises(build_module.BuildError, match=r"cannot compile attention\.c"):
        build_module.build(("false",))


def test_an_unbuilt_library_is_refused_and_auto_falls_back(empty_lib):
    with pytest.raises(ValueError, match="is not built"):
        library.open_library("attention")
    with pytest.raises(ValueError, match="is not built"):
        load_attention("native", torch.bfloat16, 64)
    assert load_attention("auto", torch.bfloat16, 64).name == "reference"


def test_a_stale_library_is_refused(empty_lib, only_baseline, monkeypatch):
    needs_compiler()
    build_module.build()
    monkeypatch.setattr(library, "source_digest", lambda source, level: "0" * 64)
    with pytest.raises(ValueError, match="older than its sources"):
        library.open_library("attention", "baseline")


def test_a_level_beyond_this_machine_is_refused(monkeypatch):
    monkeypatch.setattr(library, "runnable_levels", lambda: [levels.LEVELS[-1]])
    with pytest.raises(ValueError, match="cannot execute kernels of level 'v4_bf16'"):
        NativeAttention(torch.float32, "v4_bf16")


def test_the_digest_covers_source_headers_and_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "SOURCE_DIR", tmp_path)
    (tmp_path / "a.c").write_text("int x;")
    (tmp_path / "a.h").write_text("")
    seen = {levels.source_digest("a", levels.LEVELS[-1]), levels.source_digest("a", levels.LEVELS[0])}
    (tmp_path / "a.h").write_text("#define X")
    seen.add(levels.source_digest("a", levels.LEVELS[-1]))
    (tmp_path / "a.c").write_text("int y;")
    seen.add(levels.source_digest("a", levels.LEVELS[-1]))
    assert len(seen) == 4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_kernels_share_the_openmp_runtime_that_torch_brought():
    """In a process of its own: two runtimes would mean two pools of threads on the same cores."""
    if not any(levels.library_path("attention", level).exists() for level in levels.runnable_levels()):
        pytest.skip("native kernels are not built")
    code = (
        "import torch\nfrom model.attention.native import NativeAttention\nNativeAttention(torch.float32)\n"
        "maps = open('/proc/self/maps').read().split()\nprint(len({f for f in maps if 'libgomp' in f}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=90, check=True)
    assert done.stdout.strip() == "1"
