"""How the native kernels are built, named, chosen and refused."""

import ctypes
import re
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest

from model import decoder_native
from model.attention.native import _Attention
from model.interface import Backend, Quantization
from model.linear_native import Matrix, _Shortening
from model.native import build as build_module
from model.native import levels, library, limits
from model.operators_native import _Rotation
from service.config import Settings
from tests.model.levels import LEVELS

AVX2_LAPTOP = "flags\t\t: fpu sse2 avx avx2 bmi1 bmi2 f16c fma abm movbe\n"
SERVER = AVX2_LAPTOP.rstrip() + " avx512f avx512bw avx512cd avx512dq avx512vl"
CPUS = [
    (AVX2_LAPTOP, ["v3", "baseline"]),
    (SERVER, ["v4", "v3", "baseline"]),
    (SERVER + " avx512_vnni\n", ["v4_vnni", "v4", "v3", "baseline"]),
    (SERVER + " avx512_bf16 avx512_vnni\n", ["v4_bf16", "v4_vnni", "v4", "v3", "baseline"]),
    (SERVER + " avx512_bf16\n", ["v4", "v3", "baseline"]),
    (
        SERVER + " avx512_bf16 avx512_vnni amx_bf16 amx_tile amx_int8\n",
        ["v4_amx", "v4_bf16", "v4_vnni", "v4", "v3", "baseline"],
    ),
    (SERVER + " avx512_bf16 avx512_vnni amx_tile amx_int8\n", ["v4_bf16", "v4_vnni", "v4", "v3", "baseline"]),
    ("Features\t: fp asimd\n", ["baseline"]),
    ("flags\t: fpu sse2\nflags\t: avx2\n", ["baseline"]),
]


@pytest.fixture
def empty_lib(tmp_path, monkeypatch):
    """A place to build in, so that no test touches the libraries in use; what is built there is not optimised."""
    monkeypatch.setattr(levels, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(build_module, "LIBRARY_DIR", tmp_path)
    monkeypatch.setattr(build_module, "COMMON_FLAGS", ("-std=c11", "-O0", "-fPIC", "-shared", "-pthread"))
    return tmp_path


@pytest.fixture
def tiny_source(tmp_path_factory, monkeypatch):
    """Compiled in no time, in place of the kernels."""
    source = tmp_path_factory.mktemp("tiny") / "kernels.c"
    source.write_text("const char *quire_source_digest(void) { return QUIRE_SOURCE_DIGEST; }\n")
    monkeypatch.setattr(build_module, "SOURCE", source)


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


def test_build_makes_a_library_once_and_again_when_a_source_changes(empty_lib, tiny_source, only_baseline, monkeypatch):
    needs_compiler()
    built, _ = build_module.build()
    assert built == [empty_lib / "quire_baseline.so"]
    assert ctypes.CDLL(str(built[0])).quire_source_digest
    assert build_module.build() == ([], [])
    monkeypatch.setattr(build_module, "digest_of", lambda level: "0" * 64)
    assert build_module.build() == (built, [])
    assert sorted(empty_lib.iterdir()) == built


def strict_command(level):
    compiler = build_module.find_compiler()
    flags = [flag for flag in (*levels.COMMON_FLAGS, *level.flags) if flag != "-O3"]
    return [compiler, *flags, "-Werror", '-DQUIRE_SOURCE_DIGEST="x"', str(levels.SOURCE)]


@pytest.mark.parametrize("level", levels.buildable_levels(), ids=lambda level: level.name)
def test_the_source_is_read_without_a_warning(tmp_path, level):
    needs_compiler()
    if level.flags and not knows_flags(build_module.find_compiler(), level.flags, tmp_path):
        pytest.skip("the compiler does not know this level")
    subprocess.run([*strict_command(level), "-fsyntax-only"], check=True, timeout=60)


def test_the_source_compiles_without_a_warning_and_needs_no_openmp(tmp_path):
    needs_compiler()
    target = tmp_path / "plain.so"
    subprocess.run([*strict_command(levels.LEVELS[-1]), "-o", str(target)], check=True, timeout=60)
    assert ctypes.CDLL(str(target)).quire_step
    assert not any(name in target.read_bytes() for name in (b"GOMP_", b"__kmpc_", b"libgomp"))


def knows_flags(compiler, flags, tmp_path):
    (tmp_path / "empty.c").write_text("int x;")
    command = [compiler, *flags, "-c", str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty.o")]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture
def future(monkeypatch):
    """A level that no compiler knows, beside the baseline."""
    future = levels.Level("future", ("-march=quire-9000",), frozenset({"future"}))
    monkeypatch.setattr(build_module, "buildable_levels", lambda: [future, levels.LEVELS[-1]])
    return future


def test_a_fault_at_a_level_that_the_compiler_knows_is_an_error(empty_lib, tiny_source, monkeypatch):
    """A full disk, or a source that is wrong for one level: no reason to do without."""
    needs_compiler()
    known = levels.Level("known", ("-DBROKEN",), frozenset({"known"}))
    monkeypatch.setattr(build_module, "buildable_levels", lambda: [known, levels.LEVELS[-1]])
    monkeypatch.setattr(build_module, "runnable_levels", lambda: [known, levels.LEVELS[-1]])
    with build_module.SOURCE.open("a") as source:
        source.write("#ifdef BROKEN\n#error broken\n#endif\n")
    with pytest.raises(build_module.BuildError, match="broken"):
        build_module.build()
    monkeypatch.setattr(build_module, "runnable_levels", lambda: levels.LEVELS[-1:])
    assert [level for level, _ in build_module.build().left_out] == [known]  # of no use here


def test_an_assembler_that_is_too_old_leaves_a_level_out(empty_lib, tiny_source, monkeypatch):
    needs_compiler()
    new = levels.Level("new", ("-DNEW",), frozenset({"new"}))
    for name in ("buildable_levels", "runnable_levels"):
        monkeypatch.setattr(build_module, name, lambda: [new, levels.LEVELS[-1]])
    with build_module.SOURCE.open("a") as source:
        source.write('#ifdef NEW\nvoid multiply(void) { __asm__("no_such_instruction"); }\n#endif\n')
    assert [level for level, _ in build_module.build().left_out] == [new]


def test_limits_are_those_of_the_kernels():
    header = (levels.SOURCE_DIR / "attention.h").read_text()
    for name, value in (("GROUP", limits.GROUP), ("MAX_HEAD_DIM", limits.MAX_HEAD_DIM)):
        assert re.findall(rf"#define {name} (\d+)", header) == [str(value)]


def test_a_level_that_the_compiler_does_not_know_is_left_out(empty_lib, tiny_source, future):
    """With what an earlier compiler or source made of it, which would be refused before others were tried."""
    needs_compiler()
    (empty_lib / "quire_future.so").write_text("stale")
    built, ((level, complaint),) = build_module.build()
    assert [path.name for path in built] == ["quire_baseline.so"]
    assert level is future and "quire-9000" in complaint
    assert list(empty_lib.iterdir()) == built


@pytest.mark.parametrize("has_processor", [True, False])
def test_the_command_tells_what_is_left_out(empty_lib, tiny_source, future, monkeypatch, capsys, has_processor):
    """Louder where this machine would have run it; either way there are kernels."""
    needs_compiler()
    runnable = [future, levels.LEVELS[-1]] if has_processor else [levels.LEVELS[-1]]
    monkeypatch.setattr(build_module, "runnable_levels", lambda: runnable)
    monkeypatch.setattr(sys, "argv", ["build"])
    for said in ("built quire_baseline.so\n", "native kernels are up to date\n"):
        assert build_module.main() == 0
        out, err = capsys.readouterr()
        assert out == said
        assert err.count("\n") == 1 and "this compiler cannot build level future: " in err and "quire-9000" in err
        assert err.startswith("warning: this machine's kernels will be slower: ") == has_processor


def test_a_level_beside_a_faster_one_is_not_missed(empty_lib, monkeypatch):
    fast, slow = (levels.Level(name, (), frozenset({name})) for name in ("fast", "slow"))
    monkeypatch.setattr(build_module, "runnable_levels", lambda: [fast, slow, levels.LEVELS[-1]])
    monkeypatch.setattr(build_module, "is_current", lambda level: level is not slow)
    assert build_module.tell_left_out([(slow, "In file included from kernels.c:\ncc1: error: no\nnote: see\n")]) == [
        "this compiler cannot build level slow: cc1: error: no"
    ]


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
    with pytest.raises(build_module.BuildError, match=r"cannot compile kernels\.c"):
        build_module.build(("false",))


def test_an_unbuilt_library_is_refused(empty_lib):
    for level in (None, "baseline"):
        with pytest.raises(ValueError, match=r"not built: run `python -m model\.native\.build`"):
            library.open_kernels(level)


def test_a_stale_library_is_refused(empty_lib, tiny_source, only_baseline, monkeypatch):
    needs_compiler()
    build_module.build()
    monkeypatch.setattr(library, "source_digest", lambda level: "0" * 64)
    for level in (None, "baseline"):
        with pytest.raises(ValueError, match="older than its sources"):
            library.open_kernels(level)


def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match="unknown instruction set level 'v5': one of") as error:
        library.open_kernels("v5")
    assert all(level.name in str(error.value) for level in levels.LEVELS)


def test_a_level_beyond_this_machine_is_refused(monkeypatch):
    monkeypatch.setattr(library, "runnable_levels", lambda: [levels.LEVELS[-1]])
    with pytest.raises(ValueError, match="cannot execute kernels of level 'v4_bf16'"):
        library.open_kernels("v4_bf16")


def test_a_level_that_the_system_refuses_is_passed_over(monkeypatch):
    """As AMX is where a sandbox does not hand out tile registers."""
    if len(LEVELS) < 2:
        pytest.skip("needs two levels")
    real = library._open

    def open_refusing(path, level):
        opened = real(path, level)
        if level.name == LEVELS[0]:
            opened.quire_permit = lambda: 0
        return opened

    monkeypatch.setattr(library, "_open", open_refusing)
    assert library.open_kernels().level == LEVELS[1]
    with pytest.raises(
        ValueError, match=f"the system does not let this process execute kernels of level '{LEVELS[0]}'"
    ):
        library.open_kernels(LEVELS[0])


def test_a_library_that_is_none_is_refused(empty_lib, only_baseline, monkeypatch):
    (empty_lib / "quire_baseline.so").write_text("not a library")
    monkeypatch.setattr(library, "runnable_levels", lambda: [levels.LEVELS[-1]])
    with pytest.raises(ValueError, match=r"quire_baseline\.so cannot be opened"):
        library.open_kernels()


@pytest.mark.parametrize("level", LEVELS)
def test_structs_are_as_large_here_as_there(level):
    """Field by field they are written twice."""
    size = library.open_kernels(level).library.quire_struct_size
    structs = [Matrix, _Attention, _Rotation, decoder_native._Layer, decoder_native._Room, decoder_native._Decoder]
    sizes = [ctypes.sizeof(struct) for struct in structs]
    sizes += [4 * 4, ctypes.sizeof(decoder_native._Step), ctypes.sizeof(_Shortening)]
    assert [size(index) for index in range(len(sizes))] == sizes


def test_settings_name_the_levels_and_choices_that_there_are():
    hints = get_type_hints(Settings)
    assert get_args(hints["cpu_level"]) == ("auto", *(level.name for level in levels.LEVELS))
    assert set(get_args(hints["backend"])) == {one.value for one in Backend}
    assert set(get_args(hints["quantize"])) == {one.value for one in Quantization}


def test_the_fastest_level_that_is_built_is_opened():
    if not LEVELS:
        pytest.skip("native kernels are not built")
    assert library.open_kernels().level == LEVELS[0]
    for level in LEVELS:
        assert library.open_kernels(level).level == level


def test_the_digest_covers_source_headers_and_flags(tmp_path, monkeypatch):
    monkeypatch.setattr(levels, "SOURCE_DIR", tmp_path)
    monkeypatch.setattr(levels, "SOURCE", tmp_path / "a.c")
    (tmp_path / "a.c").write_text("int x;")
    (tmp_path / "a.h").write_text("")
    seen = {levels.source_digest(levels.LEVELS[-1]), levels.source_digest(levels.LEVELS[0])}
    (tmp_path / "a.h").write_text("#define X")
    seen.add(levels.source_digest(levels.LEVELS[-1]))
    (tmp_path / "a.c").write_text("int y;")
    seen.add(levels.source_digest(levels.LEVELS[-1]))
    assert len(seen) == 4


def test_opening_the_kernels_imports_no_torch():
    code = "import sys, model.native.library; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=levels.SOURCE_DIR.parents[1], check=True, timeout=60)
