"""Damaged and hostile weight files: each is read right or refused in one line, without much memory or time.

What is refused is `BadInput`, nothing else. The tests of .pth need torch.
"""

import io
import json
import os
import pickle
import re
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dgkd_jax import torch_port
from dgkd_jax.errors import BadInput
from dgkd_jax.runs.files import size_in_words
from dgkd_jax.torch_port import files as weight_files

ARRAYS = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2) / 7,
    "bn.running_var": np.array([1.5, -2.0, 3.25], np.float64),
    "bn.num_batches_tracked": np.array(4),
    "none": np.zeros((0, 3), np.float32),
}
FUZZED = settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def refused(path, reason):
    """That the file is refused in one line with this reason."""
    with pytest.raises(BadInput) as caught:
        torch_port.load(path)
    message = str(caught.value)
    assert message.startswith(f"weights {path}: ")
    assert "\n" not in message
    assert re.search(reason, message), message


def read_or_refused(path):
    """The arrays, or None where the file is refused in one line."""
    try:
        return torch_port.load(path)
    except BadInput as error:
        message = str(error)
    assert "\n" not in message
    return None


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


@st.composite
def damages(draw):
    """A function: bytes -> other bytes, by a few changes at random places."""
    kinds = st.sampled_from(["bit", "byte", "cut", "drop", "repeat", "insert", "zeros", "append", "number"])
    changes = draw(st.lists(st.tuples(kinds, st.floats(0, 1, exclude_max=True), st.binary(min_size=8, max_size=8)),
                            min_size=1, max_size=4))  # fmt: skip

    def damage(content):
        for kind, where, more in changes:
            at = int(where * len(content))
            if kind == "cut" or not content:
                content = content[:at]
            elif kind == "append":
                content += more
            else:
                length = {"bit": 1, "byte": 1, "insert": 0, "number": 4}.get(kind, 1 + more[0] % 40)
                old = content[at : at + length]
                new = {"bit": bytes([old[0] ^ 1 << more[0] % 8]) if old else b"", "byte": more[:1], "drop": b"",
                       "repeat": 2 * old, "insert": more[: 1 + more[0] % 8], "zeros": bytes(len(old)),
                       "number": more[:4]}[kind]  # fmt: skip
                content = content[:at] + new + content[at + length :]
        return content

    return damage


# -------------------------------------------------------------------------------------------------------- .safetensors


def safetensors(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin, end, *, dtype="F32", shape=None):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, 10**8 + 1, 100])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    refused(safetensors(tmp_path / "w.safetensors", {}, length=length), f"header would end at byte {length + 8}")


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "an overlap with entry b"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "an overlap with entry b"),
        ({"a": entry(-4, 4)}, 8, r"entry a has the data_offsets \[-4, 4\]"),
        ({"a": entry(8, 0, shape=[2])}, 8, "entry a: -8 bytes by its data_offsets, 8 by its shape"),
        ({"a": entry(0, 16)}, 8, "describes 16 bytes of data, the file has 8"),
        ({"a": entry(0, 2**62, shape=[2**60])}, 8, "the file has 8"),
        ({"a": entry(4, 12)}, 12, "a hole before entry a"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "a hole before entry b"),
        ({"a": entry(0, 8)}, 9, "describes 8 bytes of data, the file has 9"),
        ({}, 1, "describes 0 bytes of data, the file has 1"),
        ({"a": entry(0, 8, shape=[-2])}, 8, r"entry a has the shape \[-2\]"),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8, "entry a has the shape"),
        ({"a": entry(0, 8, shape=[None])}, 8, r"entry a has the shape \[None\]"),
        ({"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}, 4, "entry a has the shape None"),
        ({"a": entry(0, 4, shape=[True])}, 4, r"entry a has the shape \[True\]"),
        ({"a": entry(0, 4, shape=[1.0])}, 4, "entry a has the shape"),
        ({"a": entry(0, 4, shape=[1] * 65)}, 4, "entry a has the shape"),
        ({"a": entry(0, 0, shape=[0, 2**63])}, 0, "entry a has the shape"),
        ({"a": entry(0, 8, shape=[3])}, 8, "8 bytes by its data_offsets, 12 by its shape"),
        ({"a": entry(0, 4, dtype=None)}, 4, "dtype None; readable are F64"),
        ({"a": entry(0, 4, dtype=["F32"])}, 4, "readable are F64"),
        ({"a": entry(0, 4) | {"more": 1}}, 4, "entry a does not have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "entry a does not have exactly"),
        ({"a": 3}, 0, "entry a does not have exactly"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, 4, "entry a has the data_offsets"),
        ({"a": entry(0, 4) | {"data_offsets": None}}, 4, "entry a has the data_offsets None"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
        ({"__metadata__": []}, 0, "__metadata__"),
        (b'{"a": {}, "a": {}}', 0, "two entries have the name a"),
        (b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', 4, "the name dtype"),
        (b'{"__metadata__": {}, "__metadata__": {}}', 0, "two entries have the name __metadata__"),
        (b"[" * 200_000, 0, "nested too deeply"),
        (b'{"a":' * 200_000, 0, "nested too deeply"),
        (b"[]", 0, "its header is no JSON object"),
        (b"null", 0, "its header is no JSON object"),
        (b"", 0, "JSONDecodeError"),
        (b'{"a": \xff}', 0, "UnicodeDecodeError"),
        ("{}".encode("utf-16"), 0, "not a whole"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "not a whole"),
    ],
)  # fmt: skip
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, header, data, reason):
    refused(safetensors(tmp_path / "w.safetensors", header, bytes(data)), reason)


def test_names_and_values_of_any_length_are_shortened(tmp_path):
    path = safetensors(tmp_path / "w.safetensors", {"x" * 9999: entry(0, 4, shape=[-1] * 60)}, bytes(4))
    with pytest.raises(BadInput) as caught:
        torch_port.load(path)
    assert len(str(caught.value)) < 400


def test_a_header_padded_with_spaces_and_empty_arrays_anywhere_are_read(tmp_path):
    header = {"b": entry(0, 0), "a": entry(0, 4), "c": entry(4, 4, shape=[0, 3]), "s": entry(4, 8, shape=[])}
    text = json.dumps(header).encode() + b"   "
    found = torch_port.load(safetensors(tmp_path / "w.safetensors", text, np.float32([1.5, 2.5]).tobytes()))
    assert {name: array.shape for name, array in found.items()} == {"b": (0,), "a": (1,), "c": (0, 3), "s": ()}
    assert found["a"].flags.writeable
    assert (found["a"][0], found["s"][()]) == (1.5, 2.5)


WHOLE_SAFETENSORS = weight_files.encode(
    ARRAYS | {"half": np.array([1.5, 2], ml_dtypes.bfloat16)}, {}, suffix=".safetensors"
)


@pytest.mark.slow
@FUZZED
@given(damages())
def test_safetensors_damaged_at_random_are_read_as_they_say_or_refused(tmp_path, damage):
    """There is no checksum: arrays that are read must together be exactly the data after the header."""
    path, content = tmp_path / "w.safetensors", damage(WHOLE_SAFETENSORS)
    path.write_bytes(content)
    found = read_or_refused(path)
    if found is None:
        return
    start = 8 + int.from_bytes(content[:8], "little")
    assert sum(array.nbytes for array in found.values()) == len(content) - start
    assert all(array.tobytes() in content[start:] for array in found.values())


@pytest.mark.parametrize("change", [-1, -8, 1, 3])
def test_safetensors_shorter_or_longer_than_they_were_are_refused(tmp_path, change):
    path = tmp_path / "w.safetensors"
    path.write_bytes(WHOLE_SAFETENSORS[:change] if change < 0 else WHOLE_SAFETENSORS + bytes(change))
    refused(path, "the file has")


# ---------------------------------------------------------------------------------------------------------------- .npz


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def packed(path, entries, *, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return path


def npy(array):
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


WHOLE_NPZ = npz(**ARRAYS)


@FUZZED
@given(damages())
def test_npz_damaged_at_random_is_the_original_or_refused(tmp_path, damage):
    path = tmp_path / "w.npz"
    path.write_bytes(damage(WHOLE_NPZ))
    found = read_or_refused(path)
    if found is not None:
        same(found, ARRAYS)


def test_each_byte_of_an_npz_may_change(tmp_path):
    content = npz(a=np.arange(3, dtype=np.float32))
    path = tmp_path / "w.npz"
    refusals = 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            same(torch_port.load(path), {"a": np.arange(3, dtype=np.float32)})
        except BadInput:
            refusals += 1
    assert refusals > 0.7 * len(content)  # the others are times, versions and attributes of files


def test_an_encrypted_entry_is_refused(tmp_path):
    content = bytearray(npz(a=np.arange(3)))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    (tmp_path / "w.npz").write_bytes(content)
    refused(tmp_path / "w.npz", r"entry a\.npy is encrypted")


def test_a_small_file_that_unfolds_to_far_more_is_refused_before_it_is_unfolded(tmp_path):
    path = tmp_path / "w.npz"
    header = npy(np.empty((0,), np.float32))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive, archive.open("a.npy", "w") as to:
        to.write(header)
        for _ in range(256):
            to.write(bytes(1 << 20))
    refused(path, r"whose arrays have 268,435,584 bytes; no weights compress like that")


def test_an_archive_that_says_it_has_more_than_16_gib_is_refused(tmp_path):
    content = bytearray(npz(a=np.arange(3)))
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
    (tmp_path / "w.npz").write_bytes(content)
    refused(tmp_path / "w.npz", "no weights compress like that")
    with pytest.raises(BadInput, match=r"have 17,179,869,185 bytes together; at most 17,179,869,184 are read"):
        weight_files._check_size(tmp_path / "w.npz", (16 << 30) + 1)


def test_zeros_in_a_small_file_may_compress_as_they_like(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", a=np.zeros((1024, 1024), np.float32))
    assert torch_port.load(tmp_path / "w.npz")["a"].shape == (1024, 1024)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("a.npy", npy(np.zeros(2))), ("a.npy", npy(np.ones(2)))], r"two entries have the name a\.npy"),
        ([("a.txt", b"hello")], r"a\.txt in it is no \.npy"),
        ([("a.npy", npy(np.zeros(2)) + b"more")], r"entry a\.npy: 20 bytes for shape \(2,\) of float64"),
        ([("a.npy", npy(np.zeros(2))[:-1])], r"entry a\.npy: 15 bytes for shape"),
        ([("a.npy", npy(np.zeros(2)).replace(b"(2,)", b"(-2,)").replace(b"} ", b"}", 1))], "shape"),
        ([("a.npy", npy(np.zeros(2)).replace(b"(2,), } ", b"(2**9,)}"))], "not a whole"),
        ([("a.npy", npy(np.zeros(99)).replace(b"(99,), }       ", b"(999999999,), }"))], "792 bytes for shape"),
        ([("a.npy", b"\x93NUMPY\x03\x00" + npy(np.zeros(2))[8:])], r"\.npy of version \(3, 0\)"),
        ([("a.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535)], "not a whole"),
        ([("a.npy", b"")], "not a whole"),
    ],
)
def test_entries_of_another_form_are_refused(tmp_path, entries, reason):
    with pytest.warns(UserWarning, match="Duplicate name") if len(entries) > 1 else _no_context():
        packed(tmp_path / "w.npz", entries)
    refused(tmp_path / "w.npz", reason)


class _no_context:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


def test_an_archive_whose_list_of_entries_is_damaged_is_refused(tmp_path):
    """zipfile sees no fault in these: nothing is listed; and a comment takes in the next entry."""
    refused(packed(tmp_path / "w.npz", []), "lists 0 entries, and says it has 0")
    content = bytearray(WHOLE_NPZ)
    content[-10:-6] = bytes(4)  # the list's length
    (tmp_path / "w.npz").write_bytes(content)
    refused(tmp_path / "w.npz", "lists 0 entries, and says it has 4")
    content = bytearray(WHOLE_NPZ)
    first = content.index(b"PK\x01\x02")
    content[first + 32 : first + 34] = struct.pack(
        "<H", content.index(b"PK\x05\x06") - first - 46 - len("conv.weight.npy")
    )
    (tmp_path / "w.npz").write_bytes(content)
    refused(tmp_path / "w.npz", "lists 1 entries, and says it has 4")


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_numpy_does_not_use_is_refused(tmp_path, compression):
    refused(
        packed(tmp_path / "w.npz", [("a.npy", npy(np.zeros(2)))], compression=compression), "another way than numpy"
    )


def test_compressed_and_fortran_ordered_arrays_are_read(tmp_path):
    arrays = ARRAYS | {"f": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "big": np.arange(3, dtype=">f4")}
    np.savez_compressed(tmp_path / "w.npz", **arrays)
    found = torch_port.load(tmp_path / "w.npz")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
        assert found[name].flags.writeable or not found[name].size


# ---------------------------------------------------------------------------------------------------------------- .pth


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("torch.serialization")  # "torch" alone may be the folder tests/torch
    return pytest.importorskip("torch")


@pytest.fixture
def saved(torch, tmp_path):
    def save(content):
        torch.save(content, tmp_path / "w.pth")
        return tmp_path / "w.pth"

    return save


@pytest.mark.slow
def test_a_dictionary_that_holds_itself_is_refused(saved):
    content = {}
    content["model"] = content
    refused(saved(content), "its dictionary holds itself")
    content = {"state_dict": {"model": {}}}
    content["state_dict"]["model"]["state_dict"] = content
    refused(saved(content), "its dictionary holds itself")


def test_numbers_for_names_are_refused(torch, saved):
    refused(saved({0: torch.ones(2), 1: torch.ones(2)}), "texts for names, not the int 0")
    refused(saved({(1, 2): torch.ones(2)}), r"not the tuple \(1, 2\)")
    refused(saved({"a": 1, 7: 2, (3,): 4}), "it holds a, 7, tuple")


@pytest.mark.parametrize("how", ["zip", "legacy", 0, 1, 2, 3, 4, 5])
def test_a_pickle_that_would_run_code_is_refused_for_that_and_not_run(torch, tmp_path, how):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path, content = tmp_path / "w.pth", {"a": Runs()}
    if isinstance(how, int):
        path.write_bytes(pickle.dumps(content, protocol=how))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    refused(path, "could run any code")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_of_another_program_is_not_said_to_run_code(torch, tmp_path):
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"a": [1.0, 2.0]}, protocol=4))
    refused(tmp_path / "w.pth", r"not a whole \.pth file \(Unsupported operand 149")


def test_a_tensor_far_larger_than_its_file_is_refused(torch, saved):
    refused(saved({"a": torch.ones(1).expand(10**10)}), "have 40,000,000,000 bytes together")
    refused(saved({"a": torch.ones(1).expand(10**8)}), "no weights compress like that")


def test_pth_damaged_at_random_is_of_the_original_shapes_or_refused(torch, saved, tmp_path):
    """torch compares no checksum of the data, so their values may have changed; more is not allowed to."""
    state_dict = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    whole = saved(state_dict).read_bytes()
    names = {name: array.shape for name, array in ARRAYS.items()}
    counted = {"read": 0, "refused": 0}

    @settings(FUZZED, max_examples=60)
    @given(damages())
    def check(damage):
        path = tmp_path / "damaged.pth"
        path.write_bytes(damage(whole))
        found = read_or_refused(path)
        if found is None:
            counted["refused"] += 1
            return
        counted["read"] += 1
        assert len(found) <= len(names)
        assert sum(array.nbytes for array in found.values()) <= 10 * sum(array.nbytes for array in ARRAYS.values())

    check()
    assert counted["refused"] > 20


# ---------------------------------------------------------------------------------------------------- what export says


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (812, "812 bytes"),
        (20_480, "20.5 kB"),
        (999_999, "1000.0 kB"),
        (44_700_000, "44.7 MB"),
        (1_500_000_000, "1.5 GB"),
    ],
)
def test_sizes_are_in_a_unit_that_they_have(count, text):
    assert size_in_words(count) == text
