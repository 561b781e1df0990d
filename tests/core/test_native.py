"""The step in C++: the reference's numbers, whatever the sizes, threads and company; and a compiler that fails."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2_core import GPT2Config, native
from gpt2_core.errors import GenerationError
from gpt2_core.native import LayerWeights, NativeCache, NativeModel, NormWeights, Product
from gpt2_core.reference import ReferenceModel

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))) or sys.platform == "win32", reason="no C++ compiler here"
)


def reference(**changes):
    """A model with gains, biases and weights of every size, so that a mixed-up pair shows."""
    small = {"vocab_size": 37, "n_positions": 40, "n_embd": 24, "n_head": 4, "n_layer": 2}
    config = GPT2Config(**(small | {"bos_token_id": 1, "eos_token_id": 1} | changes))
    chance = np.random.default_rng(7)
    model = ReferenceModel.from_seed(config)
    weights = {name: value + chance.normal(0, 0.2, value.shape) for name, value in model.parameters.items()}
    return ReferenceModel(config, weights)


def built(model, dtype="float32", **options):
    config = model.config
    w = {name.removeprefix("transformer."): np.float32(value) for name, value in model.parameters.items()}

    def norm(name):
        return NormWeights(w[f"{name}.weight"], w[f"{name}.bias"], config.layer_norm_epsilon)

    def product(name):
        return Product(w[f"{name}.weight"].T, w[f"{name}.bias"])

    layers = []
    for i in range(config.n_layer):
        h = f"h.{i}"
        scale = config.head_dim**-0.5 if config.scale_attn_weights else 1.0
        scale /= i + 1 if config.scale_attn_by_inverse_layer_idx else 1
        layers.append(
            LayerWeights(
                config.heads_of(i), scale, norm(f"{h}.ln_1"), product(f"{h}.attn.c_attn"),
                product(f"{h}.attn.c_proj"), norm(f"{h}.ln_2"), product(f"{h}.mlp.c_fc"), product(f"{h}.mlp.c_proj"),
            )
        )  # fmt: skip
    return NativeModel(
        layers, norm("ln_f"), Product(w.get("lm_head.weight", w["wte.weight"])), table=w["wte.weight"],
        positions=w["wpe.weight"], head_width=config.head_dim, dtype=dtype, activation=config.activation_function,
        **options,
    )  # fmt: skip


def cache_for(model, rows, columns=4):
    return NativeCache(model.config.n_layer, model.config.n_head, model.config.head_dim, rows, columns)


def logits(model, made, ids, real=None, threads=1):
    """After each column of ids (R, T): (T, R, V)."""
    cache, out = cache_for(model, len(ids)), []
    for column in range(ids.shape[1]):
        cache.extend(1)
        seen = None if real is None else real[:, : column + 1]
        where = np.full(len(ids), column) if seen is None else (seen.sum(axis=1) - 1).clip(0)
        out.append(made.step(made.embed(ids[:, column], where), cache.buffer, column, seen, threads))
    return np.stack(out)


def ids_for(model, rows, columns):
    return np.random.default_rng(rows).integers(0, model.config.vocab_size, (rows, columns))


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_number_of_rows_and_threads_has_the_references_numbers(rows, threads):
    model = reference()
    ids = ids_for(model, rows, 5)
    expected = model(ids).logits.swapaxes(0, 1)
    np.testing.assert_allclose(logits(model, built(model), ids, threads=threads), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_every_activation_is_the_references(activation):
    model = reference(activation_function=activation)
    ids = ids_for(model, 2, 4)
    np.testing.assert_allclose(logits(model, built(model), ids), model(ids).logits.swapaxes(0, 1), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_embd": 36, "n_head": 3, "n_inner": 50, "vocab_size": 67},
        {"n_embd": 16, "n_head": 16, "vocab_size": 16},
        {"n_embd": 130, "n_head": 2, "n_inner": 7, "vocab_size": 5},
        {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False},
        {"n_layer": 1},
        {"pruned_heads": {0: [1, 3]}},
    ],
    ids=str,
)
def test_odd_sizes_and_every_scale(changes):
    model = reference(**changes)
    ids = ids_for(model, 3, 6)
    np.testing.assert_allclose(
        logits(model, built(model), ids, threads=2), model(ids).logits.swapaxes(0, 1), rtol=5e-5, atol=5e-5
    )


def test_columns_that_are_no_text_are_not_seen_whatever_they_hold():
    model = reference()
    made, ids = built(model), ids_for(model, 2, 7)
    real = np.ones((2, 7), np.bool_)
    real[0, :3] = real[1, 4] = False
    expected = model(ids, attention_mask=real).logits
    cache = cache_for(model, 2)
    cache.buffer[:] = np.nan
    for column in range(7):
        cache.extend(1)
        if not real[:, column].all():  # as a pass over several tokens leaves them
            cache.buffer[..., column, :] = np.where(
                real[:, column][:, None, None], cache.buffer[..., column, :], np.nan
            )
        where = (real[:, : column + 1].sum(axis=1) - 1).clip(0)
        found = made.step(made.embed(ids[:, column], where), cache.buffer, column, real[:, : column + 1], 1)
        for row in range(2):
            if real[row, column]:
                np.testing.assert_allclose(found[row], expected[row, column], rtol=2e-5, atol=2e-5)


def test_a_row_comes_out_the_same_in_any_company_and_of_any_number_of_threads():
    model = reference()
    for dtype in native.KINDS:
        made, ids = built(model, dtype), ids_for(model, 11, 4)
        together = logits(model, made, ids)
        assert np.array_equal(logits(model, made, ids, threads=3), together)
        for row in (0, 7, 8, 10):
            assert np.array_equal(logits(model, made, ids[row : row + 1])[:, 0], together[:, row])


def test_half_precision_and_eight_bits_are_near():
    model = reference(n_embd=64, n_head=4)
    ids = ids_for(model, 3, 6)
    expected = model(ids).logits.swapaxes(0, 1)
    spread = expected.std()
    for dtype, off in (("bfloat16", 0.04), ("int8", 0.15)):
        assert np.abs(logits(model, built(model, dtype), ids) - expected).max() < off * spread, dtype


def test_eight_bits_are_the_sum_that_whole_numbers_give():
    """One product by hand: nothing but rounding may lie between them."""
    model = reference(n_layer=1)
    made, stream = built(model, "int8"), np.random.default_rng(1).normal(size=(1, model.config.n_embd))
    w = {name: np.float32(value) for name, value in model.parameters.items()}
    last = NormWeights(w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], model.config.layer_norm_epsilon)
    norm, head = native.smoothed(last, Product(w["transformer.wte.weight"]))
    whole, scales = native.rounded(head.weight)
    for name in ("attn.c_proj", "mlp.c_proj"):  # a block that adds nothing
        w[f"transformer.h.0.{name}.weight"][:] = 0
        w[f"transformer.h.0.{name}.bias"][:] = 0
    made = built(ReferenceModel(model.config, w), "int8")
    cache = cache_for(model, 1)
    found = made.step(np.float32(stream), cache.buffer, 0, None, 1)[0]
    x = np.float64(stream[0])
    normed = (x - x.mean()) / np.sqrt(x.var() + norm.epsilon) * norm.gain + norm.bias
    largest = np.abs(normed).max()
    expected = (np.rint(normed / largest * 127) @ whole.T.astype(np.float64)) * scales / 127 * largest
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=np.abs(expected).max() * 1e-3)


@pytest.mark.parametrize("dtype", native.KINDS)
def test_a_number_that_is_none_comes_out_as_none(dtype):
    model = reference()
    made = built(model, dtype)
    stream = made.embed(np.array([1, 2]), np.array([0, 0]))
    stream[1, 3] = np.nan
    found = made.step(stream, cache_for(model, 2).buffer, 0, None, 1)
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", native.KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38], ids=str)
@pytest.mark.parametrize("name", ["wte.weight", "h.0.ln_1.weight", "h.1.mlp.c_fc.weight", "ln_f.bias"])
def test_weights_that_are_no_numbers_are_taken_without_a_warning_and_come_out_as_none(dtype, bad, name):
    model = reference()
    weights = {name: np.float32(value) for name, value in model.parameters.items()}
    weights[f"transformer.{name}"][..., 3] = bad
    made = built(ReferenceModel(model.config, weights), dtype)
    found = made.step(made.embed(np.array([1]), np.array([0])), cache_for(model, 1).buffer, 0, None, 1)
    assert bad == 3e38 or not np.isfinite(found).all()


def test_bfloat16_is_rounded_to_nearest_with_ties_to_even():
    values = np.array([1.0, 1.00390625, 1.01171875, -3.3e38, np.inf, 1e-40, np.nan], np.float32)
    found = (native.to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert found[:3].tolist() == [1.0, 1.0, 1.015625]
    assert np.isinf(found[4]) and np.isnan(found[6]) and abs(found[3] / values[3] - 1) < 0.01


def test_a_cache_grows_keeps_and_reorders_what_was_put_in():
    cache = NativeCache(1, 2, 4, 2, 3)
    parts = [np.random.default_rng(i).normal(size=(2, 2, 60, 4)).astype(np.float32) for i in range(2)]
    cache.put(parts)
    cache.put([part[:, :, :9] for part in parts])
    assert cache.buffer.shape[3] % 64 == 0 and cache.stop == 69
    for to, part in zip(cache.buffer, parts, strict=True):
        assert np.array_equal(to[:, :, :60], part) and np.array_equal(to[:, :, 60:69], part[:, :, :9])
    cache.take(np.array([1, 1, 0]), 5)
    assert cache.stop == 64 and np.array_equal(cache.buffer[0, 2, :, :55], parts[0][0, :, 5:])
    cache.crop(10)
    assert (cache.start, cache.stop) == (10, 10)


# -- another's threads ----------------------------------------------------------------------------------------


@pytest.fixture
def openmp(tmp_path):
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pytest.skip("no OpenMP here")
    found = native.openmp_of(tmp_path)
    assert found is not None
    return found


def test_threads_of_openmp_do_the_same_and_may_be_fewer_than_asked_for(openmp):
    model = reference()
    ids = ids_for(model, 3, 4)
    expected = logits(model, built(model), ids)
    for threads in (1, 2, 9):
        assert np.array_equal(logits(model, built(model, openmp=openmp), ids, threads=threads), expected)


def in_a_child(work):
    """Whether `work` is true in a forked process, within a quarter of a minute."""
    child = os.fork()
    if not child:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(15)
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_process_has_threads_of_its_own():
    model = reference()
    made, ids = built(model), ids_for(model, 1, 3)
    expected = logits(model, made, ids, threads=2)
    assert in_a_child(lambda: np.array_equal(logits(model, made, ids, threads=2), expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_process_does_not_wait_for_threads_of_openmp_that_only_its_parent_has(openmp):
    model = reference()
    made, ids = built(model, openmp=openmp), ids_for(model, 1, 3)
    expected = logits(model, made, ids, threads=2)
    assert in_a_child(lambda: np.array_equal(logits(model, made, ids, threads=2), expected))
    assert in_a_child(lambda: np.array_equal(logits(model, built(model, openmp=openmp), ids, threads=2), expected))


@pytest.fixture
def loaded_from(monkeypatch, tmp_path):
    """Which library is asked for OpenMP's functions first, where these are loaded into the process."""

    def ask(*names):
        maps, asked = tmp_path / "maps", []
        maps.write_text("".join(f"7f00-7f01 r-xp 00000000 08:01 4242    {tmp_path}/{name}\n" for name in names))
        monkeypatch.setattr(native, "_MAPS", maps)
        monkeypatch.setattr(ctypes, "CDLL", lambda path: asked.append(Path(path).relative_to(tmp_path)))
        assert native.openmp_of(tmp_path / "site") is None
        return [str(path) for path in asked]

    return ask


def test_the_frameworks_own_openmp_is_asked_first_and_the_systems_last(loaded_from):
    expected = [
        "site/torch.libs/libgomp-a.so.1",
        "site/torch/lib/libgomp-b.so.1",
        "site/a.libs/libgomp-a.so.1",
        "site/scikit_learn.libs/libgomp-a.so.1",
        "site/torchvision.libs/libgomp-a.so.1",
        "a/libiomp5.so",
        "usr/libgomp.so.1",
    ]
    for order in (expected, expected[::-1], expected[3:] + expected[:3]):
        assert loaded_from(*order, "site/torch/lib/libcomputed.so") == expected


# -- wrong use, and a compiler that fails ---------------------------------------------------------------------


def test_arrays_of_other_sizes_are_refused():
    model = reference()
    made, cache = built(model), cache_for(model, 1)
    stream = made.embed(np.array([1]), np.array([0]))
    for arguments, said in (
        ((stream.astype(np.float64), cache.buffer, 0, None, 1), "stream is float64"),
        ((stream[:, :-1], cache.buffer, 0, None, 1), "stream is float32"),
        ((np.repeat(stream, 2, 0), cache.buffer, 0, None, 1), "cache is float32"),
        ((stream, cache.buffer[..., ::2], 0, None, 1), "cache is float32"),
        ((stream, cache.buffer, cache.buffer.shape[3], None, 1), "column is 64"),
        ((stream, cache.buffer, 1, np.ones((1, 1), np.bool_), 1), "column is 1"),
    ):
        with pytest.raises(ValueError, match=said):
            made.step(*arguments)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load_step.cache_clear()
    yield tmp_path / "gpt2-duet"
    native.load_step.cache_clear()


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler of any behaviour: a shell script, in which $made is what it is asked to make. `count` counts."""

    def use(body):
        script = tmp_path / "compiler"
        find = 'for each; do [ "$last" = -o ] && made=$each; last=$each; done'
        script.write_text(f'#!/bin/sh\n{find}\n[ "$made" ] && echo >> {tmp_path}/count\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    use.count = lambda: len((tmp_path / "count").read_text())
    return use


@pytest.fixture
def small(compiler, tmp_path):
    """A compiler that needs no time, as it makes a step that does nothing."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int gpt2_step(void *, void *, void *) { return 42; }')
    real = next(filter(shutil.which, ("g++", "c++", "clang++")))
    library = tmp_path / "small.so"
    subprocess.run([real, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    compiler(f'[ "$made" ] && cp {library} "$made"; exit 0')
    return compiler


def again():
    native.load_step.cache_clear()
    loaded = native.load_step()
    return loaded.gpt2_step(None, None, None)


def test_what_was_compiled_is_kept_and_used_again(fresh, small):
    assert again() == 42
    (file,) = fresh.iterdir()
    assert file.name.startswith("step-") and fresh.stat().st_mode & 0o077 == 0
    assert again() == 42 and small.count() == 1


def _writable(file):
    file.chmod(0o766)


def _link(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def _strangers(file):
    if os.getuid():
        pytest.skip("only root can give a file away")
    os.chown(file, 12345, 12345)


@pytest.mark.parametrize("change", [_writable, _link, _strangers])
def test_a_kept_file_that_may_be_another_users_work_is_not_run_but_made_again(fresh, small, change):
    again()
    (file,) = fresh.iterdir()
    change(file)
    again()
    again()
    about = file.lstat()
    assert small.count() == 2 and about.st_uid == os.getuid() and about.st_mode == 0o100700


@pytest.mark.parametrize("left", [0, 100, 6000], ids=str)
def test_a_kept_file_that_lost_its_end_is_made_again(fresh, small, left):
    """To load one takes the process with it, where the end of it is missing that the system maps."""
    again()
    (file,) = fresh.iterdir()
    whole = file.read_bytes()
    file.unlink()  # this process has loaded it
    file.write_bytes(whole[:left])
    assert again() == again() == 42 and small.count() == 2
    assert [each.read_bytes() for each in fresh.iterdir()] == [whole]


def test_a_kept_file_that_does_not_load_here_is_made_again(fresh, small):
    again()
    (file,) = fresh.iterdir()
    content = b"of another machine"
    other = file.with_name(native._name(file.name.split("-")[1], content))
    file.unlink()
    other.write_bytes(content)
    assert again() == again() == 42 and small.count() == 2 and list(fresh.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed_and_what_one_is_making_is_not(fresh, small):
    for name, age in ((".making-old", 4000), (".making-new", 0)):
        (fresh / name).mkdir(parents=True, mode=0o700)
        (fresh / name / "step.so").write_text("")
        os.utime(fresh / name, (time.time() - age,) * 2)
    fresh.chmod(0o700)
    again()
    assert sorted(re.sub("step-.*", "step-", each.name) for each in fresh.iterdir()) == [".making-new", "step-"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("echo 'error: no such option' >&2; exit 3", r"could not make the compiled step: error: no such option"),
        (r"printf '\377 is no text' >&2; exit 3", "could not make the compiled step: \N{REPLACEMENT CHARACTER} is no"),
        ("exit 3", "could not make the compiled step: exit status 3"),
        ("exit 0", "ended well, but made no file"),
        ('[ "$made" ] && : > "$made"; exit 0', "cannot be loaded: .*expected a library for this machine"),
        ('[ "$made" ] && echo no library > "$made"; exit 0', "cannot be loaded: .*expected a library for this machine"),
        ('[ "$made" ] && exec REAL -c -x c++ /dev/null -o "$made"; exit 0', "cannot be loaded: "),
        ('[ "$made" ] && exec REAL -shared -x c++ /dev/null -o "$made"; exit 0', "cannot be loaded: .*gpt2_step"),
        ('[ "$made" ] && exec sleep 20; exit 0', "did not end well: .*timed out"),
        ("exec sleep 20", "--version did not end well: .*timed out"),
    ],
    ids=str,
)
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(fresh, compiler, monkeypatch, body, said):
    monkeypatch.setattr(native, "_PATIENCE", 2.0)
    compiler(body.replace("REAL", next(filter(shutil.which, ("g++", "c++", "clang++")))))
    with pytest.raises(GenerationError, match=rf"(?s){said}.*set CXX to another compiler.*leave compile out"):
        native.load_step()
    assert not fresh.exists() or not list(fresh.iterdir())


def test_a_compiler_that_is_none_is_said(fresh, monkeypatch, tmp_path):
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x7fELF of another machine")
    junk.chmod(0o755)
    for named, said in (
        ('g++ "x', r"CXX is 'g\+\+ \"x', which is no command \(No closing quotation\); install"),
        ("no-such-compiler -x", "CXX names 'no-such-compiler -x', which is not there; install"),
        ("  ", "CXX names '  ', which is not there; install"),
        (str(junk), "junk --version did not end well: .*Exec format error.*set CXX to another"),
    ):
        monkeypatch.setenv("CXX", named)
        with pytest.raises(GenerationError, match=rf"{said}.*leave compile out"):
            native.load_step()


def test_a_source_that_is_not_there_is_said(fresh, small, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_SOURCE", tmp_path / "native.cpp")
    with pytest.raises(GenerationError, match=r"native.cpp, which cannot be read \(No such file.*leave compile out"):
        native.load_step()


def test_a_cache_folder_that_others_may_write_to_is_refused(fresh, small):
    fresh.mkdir()
    fresh.chmod(0o777)
    said = rf"{fresh}, which others may write to.*got one of user {os.getuid()} with mode 777; remove it"
    with pytest.raises(GenerationError, match=said):
        native.load_step()


def test_a_cache_folder_may_be_a_link_of_ones_own_and_of_nobody_else(fresh, small, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    fresh.symlink_to("real")
    again()
    if os.getuid() == 0:
        os.chown(fresh, 12345, 12345, follow_symlinks=False)
        with pytest.raises(GenerationError, match="which others may write to"):
            again()


def test_a_cache_folder_that_cannot_be_made_is_said(fresh, small, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(GenerationError, match=r"cannot be made \(Not a directory\); set XDG_CACHE_HOME"):
        native.load_step()


def test_a_user_without_a_home_is_told_of_the_cache_folder(fresh, small, monkeypatch):
    def nobodys():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobodys)
    with pytest.raises(GenerationError, match=r"cannot be made \(Could not determine home.*set XDG_CACHE_HOME"):
        native.load_step()


def test_a_cache_folder_that_cannot_be_written_to_is_said(fresh, small, monkeypatch):
    def refused(*arguments):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with pytest.raises(GenerationError, match=r"cannot be written to \(Permission denied\); set XDG_CACHE_HOME"):
        native.load_step()


def test_a_folder_in_the_place_of_the_kept_file_is_said(fresh, small):
    again()
    (file,) = fresh.iterdir()
    file.unlink()
    (file / "full").mkdir(parents=True)
    with pytest.raises(GenerationError, match=r"cannot be written to \(Is a directory\); set XDG_CACHE_HOME"):
        again()


def test_an_activation_that_it_does_not_have_is_named():
    model = reference()
    object.__setattr__(model.config, "activation_function", "mish")
    with pytest.raises(GenerationError, match=r"has the activations gelu_new.*but this model has 'mish'"):
        built(model)


def test_the_source_is_compiled_without_a_warning(tmp_path):
    compiler = next(filter(shutil.which, ("g++", "c++", "clang++")))
    # GCC 12 takes its own headers' undefined vectors for a mistake.
    flags = [
        "-O2",
        "-std=c++17",
        "-fsyntax-only",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-Wno-maybe-uninitialized",
    ]
    done = subprocess.run([compiler, *flags, str(Path(native.__file__).with_name("native.cpp"))], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("flags", [["-mavx2", "-mfma"], ["-mavx2", "-mfma", "-mavxvnni"], []], ids=str)
def test_processors_with_fewer_instructions_get_the_same_numbers(fresh, monkeypatch, flags):
    """Eight bits are written three times over; the sums are whole, so they must be equal."""
    if flags and (not Path("/proc/cpuinfo").exists() or not _has(flags)):
        pytest.skip("not on this processor")
    model = reference()
    ids = ids_for(model, 3, 4)
    expected = logits(model, built(model, "int8"), ids)
    native.load_step.cache_clear()
    real = native._compile
    monkeypatch.setattr(native, "_compile", lambda compiler, _, *more: real(compiler, [*native._FLAGS, *flags], *more))
    for file in fresh.iterdir():
        file.unlink()
    np.testing.assert_allclose(logits(model, built(model, "int8"), ids), expected, rtol=1e-4, atol=1e-4)


def _has(flags):
    known = Path("/proc/cpuinfo").read_text().split()
    return all(flag.removeprefix("-m").replace("avxvnni", "avx_vnni") in known for flag in flags)
