"""Reading: a damaged or hostile checkpoint is one line of explanation, never a traceback and never wrong weights."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moqa.errors import MoqaError
from moqa.format.manifest import MANIFEST
from moqa.format.reader import is_checkpoint, open_checkpoint
from moqa.kernels import PackedMatrix
from moqa.storage.artifact import checksum

FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
UNIT = "model.layers.0.q_proj"


def edit_manifest(folder, change, seal=True):
    """Change the manifest's JSON; by default with the checksum made again, as an attacker would."""
    path = folder / MANIFEST
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data | {"checksum": checksum(data)} if seal else data))


def seal_file(folder, name):
    """Record the hash and length that a file has now."""
    content = (folder / name).read_bytes()
    recorded = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    edit_manifest(folder, lambda data: data["files"].update({name: recorded}))


def edit_file(folder, name, change, seal=True):
    path = folder / name
    path.write_bytes(change(bytearray(path.read_bytes())))
    if seal:
        seal_file(folder, name)


def refused(folder, match=".", **options):
    with pytest.raises(MoqaError, match=match) as caught:
        open_checkpoint(folder, **options)
    assert "\n" not in str(caught.value)


def content(folder):
    """All that a user gets from a checkpoint."""
    opened = open_checkpoint(folder)
    tensors = {}
    for layer in (None, *range(opened.manifest.layers)):
        tensors |= {name: tensor.flatten().view(torch.uint8).tolist() for name, tensor in opened.layer(layer).items()}
    return opened.manifest.model_dump(exclude={"checksum"}), tensors


def content_or_refusal(folder):
    try:
        return content(folder)
    except MoqaError as error:
        return str(error)


class TestSound:
    def test_opens(self, sound_checkpoint):
        opened = open_checkpoint(sound_checkpoint)
        assert opened.bytes == sum(path.stat().st_size for path in sound_checkpoint.glob("*.safetensors"))
        assert opened.layer(0).keys() >= {f"{UNIT}.p0", f"{UNIT}.p1", f"{UNIT}.scale", f"{UNIT}.zero"}
        assert opened.layer(None).keys() == {"model.embed.weight", "model.norm.weight", "model.router.scale"}
        assert opened.layer(1)["model.layers.1.down_proj.weight"].dtype == torch.bfloat16

    def test_bits_per_weight_counts_everything_stored(self, sound_checkpoint):
        opened = open_checkpoint(sound_checkpoint)
        unit_bytes = sum(t.nbytes for layer in (0, 1) for t in opened.layer(layer).values())
        weights = 24 * 40 + 16 * 100 + 16 * 64 + 16 * 48
        assert opened.bits_per_weight == unit_bytes * 8 / weights
        assert opened.model_bits_per_weight == opened.bytes * 8 / (weights + 400 + 40 + 2)

    def test_a_folder_without_manifest_is_none(self, tmp_path):
        assert not is_checkpoint(tmp_path)
        refused(tmp_path, "is not a moqa checkpoint")

    def test_whitespace_in_the_manifest_means_nothing(self, checkpoint, sound_checkpoint):
        path = checkpoint / MANIFEST
        path.write_text(path.read_text().replace("\n", "\n\t "))
        assert content(checkpoint) == content(sound_checkpoint)


class TestDamagedFiles:
    @pytest.mark.parametrize("size", [0, 5, 8, 100, -1, -64])
    @pytest.mark.parametrize("seal", [False, True])
    def test_truncated(self, checkpoint, size, seal):
        edit_file(checkpoint, FIRST, lambda raw: raw[:size], seal)
        refused(checkpoint)

    @pytest.mark.parametrize("seal", [False, True])
    def test_padded(self, checkpoint, seal):
        edit_file(checkpoint, FIRST, lambda raw: raw + b"\0" * 64, seal)
        refused(checkpoint)

    def test_a_flipped_byte(self, checkpoint):
        edit_file(checkpoint, LAST, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), seal=False)
        refused(checkpoint, "sha256")
        open_checkpoint(checkpoint, verify=False)

    def test_missing(self, checkpoint):
        (checkpoint / LAST).unlink()
        refused(checkpoint, f"lacks {LAST}")

    def test_swapped(self, checkpoint):
        first, last = (checkpoint / FIRST).read_bytes(), (checkpoint / LAST).read_bytes()
        (checkpoint / FIRST).write_bytes(last)
        (checkpoint / LAST).write_bytes(first)
        refused(checkpoint)
        for name in (FIRST, LAST):
            seal_file(checkpoint, name)
        refused(checkpoint)

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            (b'"BF16"', b'"F16" '),
            (b'"shape":[2,1,16]', b'"shape":[1,2,16]'),
            (b'"shape":[2,1,16]', b'"shape":2116    '),
            (b'"shape":[2,1,16]', b'"shape":null    '),
            (b'"shape"', b'"shapf"'),
            (b'"data_offsets":[', b'"data_offsets":{'),
            (b'"data_offsets"', b'"__metadata__"'),
            (b"q_proj.scale", b"q_proj.scalf"),
            (b'{"dtype":"BF16"', b'"BF16          "'),
            (b"{ ", b"[ "),
            (b"}", b"\xff"),
        ],
    )
    def test_an_edited_header(self, checkpoint, old, new):
        name = "model-00002-of-00003.safetensors"
        assert old in (checkpoint / name).read_bytes()
        edit_file(checkpoint, name, lambda raw: raw.replace(old, new, 1))
        refused(checkpoint)

    @pytest.mark.parametrize("text", [b"[" * 8000, b'{"x":{"data_offsets":"ab"}}', b'{"x":{"data_offsets":[0,"1"]}}'])
    def test_a_hostile_header_of_the_right_length(self, checkpoint, text):
        name = "model-00002-of-00003.safetensors"

        def change(raw):
            length = int.from_bytes(raw[:8], "little")
            return raw[:8] + text[:length].ljust(length) + raw[8 + length :]

        edit_file(checkpoint, name, change)
        refused(checkpoint)

    def test_another_order_of_tensors(self, checkpoint):
        def swap(raw):
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            text = json.dumps(dict(reversed(header.items()))).encode()
            return raw[:8] + text.ljust(length)[:length] + raw[8 + length :]

        edit_file(checkpoint, LAST, swap)
        refused(checkpoint)

    @pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xBF80], ids=["nan", "infinite", "negative"])
    def test_bad_scales_with_a_sound_hash(self, checkpoint, bits):
        edit_file(checkpoint, "model-00002-of-00003.safetensors", lambda raw: with_scale(raw, bits))
        refused(checkpoint, "scales")

    def test_an_extra_tensor(self, checkpoint):
        from safetensors.torch import load_file, save_file

        tensors = load_file(checkpoint / LAST)
        save_file(tensors | {"extra": torch.ones(3)}, checkpoint / LAST)
        seal_file(checkpoint, LAST)
        refused(checkpoint)


class TestHostileManifest:
    @pytest.mark.parametrize(
        "raw", [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 10**5, b'{"a":' * 10**5]
    )
    def test_no_manifest_at_all(self, checkpoint, raw):
        (checkpoint / MANIFEST).write_bytes(raw)
        refused(checkpoint, "manifest")

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("units", UNIT, "scheme", "width"), 9),
            (("units", UNIT, "scheme", "width"), 0),
            (("units", UNIT, "scheme", "width"), 4),
            (("units", UNIT, "scheme", "symmetric"), True),
            (("units", UNIT, "scheme", "group_size"), 0),
            (("units", UNIT, "scheme", "group_size"), 8),
            (("units", UNIT, "scheme", "scale_dtype"), "float16"),
            (("units", UNIT, "scheme", "scale_dtype"), "float8"),
            (("units", UNIT, "shape"), [-24, 40]),
            (("units", UNIT, "shape"), [-24, -40]),
            (("units", UNIT, "shape"), [0, 40]),
            (("units", UNIT, "shape"), [24, 40, 1]),
            (("units", UNIT, "shape"), [33, 40]),
            (("units", UNIT, "shape"), [2**40, 2**40]),
            (("units", UNIT, "shape"), [10**30, 10**30]),
            (("units", UNIT, "layer"), 1),
            (("units", UNIT, "layer"), 2),
            (("units", UNIT, "layer"), -1),
            (("units", UNIT, "layer"), -4),
            (("units", UNIT, "layer"), 10**30),
            (("layers",), 0),
            (("layers",), -5),
            (("layers",), 3),
            (("layers",), 10**30),
            (("kept", "model.norm.weight", "dtype"), "complex512"),
            (("kept", "model.norm.weight", "dtype"), "__all__"),
            (("kept", "model.norm.weight", "dtype"), "nn"),
            (("kept", "model.norm.weight", "dtype"), "complex64"),
            (("kept", "model.norm.weight", "dtype"), "int32"),
            (("kept", "model.norm.weight", "shape"), [-40]),
            (("kept", "model.norm.weight", "shape"), [10**30, 10**30]),
            (("kept", "model.norm.weight", "shape"), [2, 20]),
            (("units", "model.layers.9.q_proj"), None),
            (("format",), 4),
            (("files",), {}),
            (("files", FIRST, "bytes"), 10**30),
            (("files", FIRST, "bytes"), -1),
            (("files", FIRST, "sha256"), ""),
            (("files", "../../etc/passwd"), {"bytes": 1, "sha256": "0"}),
            (("kept",), {}),
            (("units",), {}),
            (("mixture",), {"wiki": "much"}),
        ],
    )
    def test_a_field_out_of_range(self, checkpoint, path, value):
        def change(data):
            for key in path[:-1]:
                data = data[key]
            data[path[-1]] = value

        edit_manifest(checkpoint, change)
        refused(checkpoint)

    def test_a_missing_unit_or_tensor(self, checkpoint):
        edit_manifest(checkpoint, lambda data: data["units"].pop(UNIT))
        refused(checkpoint)

    def test_a_newer_format_says_so(self, checkpoint):
        edit_manifest(checkpoint, lambda data: data.update(format=4))
        refused(checkpoint, "format 4: this moqa reads up to 3: upgrade moqa")

    @pytest.mark.parametrize("group_size", [96, 128])
    def test_another_group_size_of_equal_bytes_is_noticed(self, checkpoint, group_size):
        # as many scales, other groups: the weights would be wrong, and no shape tells
        def change(data):
            data["units"][UNIT]["scheme"]["group_size"] = group_size

        edit_manifest(checkpoint, change, seal=False)
        refused(checkpoint, "checksum")

    def test_a_manifest_without_checksum_is_refused(self, checkpoint):
        edit_manifest(checkpoint, lambda data: data.pop("checksum"), seal=False)
        refused(checkpoint, "checksum")

    def test_a_number_too_long_to_read(self, checkpoint):
        path = checkpoint / MANIFEST
        path.write_text(path.read_text().replace('"seed": 0', '"later": 1' + "0" * 5000 + ', "seed": 0', 1))
        refused(checkpoint)

    @pytest.mark.parametrize("field", ["fingerprint", "strategy", "fitted", "seed", "units"])
    def test_no_field_changes_unnoticed(self, checkpoint, field):
        changed = {"fitted": {"wiki": {"digest": "0", "shingles": ""}}, "seed": 1, "units": {}}
        edit_manifest(checkpoint, lambda data: data.update({field: changed.get(field, "other")}), seal=False)
        refused(checkpoint)

    def test_a_field_of_a_later_version_is_covered(self, checkpoint):
        edit_manifest(checkpoint, lambda data: data.update(later=1))
        open_checkpoint(checkpoint)
        edit_manifest(checkpoint, lambda data: data.update(later=2), seal=False)
        refused(checkpoint, "checksum")


class TestCodes:
    @pytest.fixture
    def checkpoint(self, coded_checkpoint, tmp_path):
        return Path(shutil.copytree(coded_checkpoint, tmp_path / "coded"))

    def test_opens(self, checkpoint):
        opened = open_checkpoint(checkpoint)
        assert opened.manifest.format == 2
        assert {name.removeprefix(f"{UNIT}.") for name in opened.layer(0) if name.startswith(UNIT)} == {
            "p0", "scale", "factor",
        }  # fmt: skip
        for name, unit in opened.manifest.units.items():
            tensors = opened.layer(unit.layer)
            stored = {suffix: tensors[f"{name}.{suffix}"] for suffix in unit.scheme.tensors(unit.shape)}
            weights = PackedMatrix(unit.scheme, unit.shape, stored).dense()
            assert 0.5 < weights.square().mean() < 1.5

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"width": 4}, "encoding trellis has no width 4; it has widths 1, 2, 3"),
            ({"symmetric": True}, "encoding trellis is always symmetric"),
            ({"encoding": "spiral"}, "encoding spiral is unknown; known are int, table, trellis"),
            ({"encoding": "table"}, None),
            ({"encoding": "int"}, "."),
            ({"width": 3}, "."),
            ({"scale_dtype": "float16"}, "."),
        ],
        ids=str,
    )
    def test_another_scheme(self, checkpoint, change, said):
        # a table is stored in the same tensors: only the checksum tells
        edit_manifest(checkpoint, lambda data: data["units"][UNIT]["scheme"].update(change), seal=said is not None)
        refused(checkpoint, said or "checksum")

    @pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xBF80], ids=["nan", "infinite", "negative"])
    def test_bad_scales_with_a_sound_hash(self, checkpoint, bits):
        edit_file(checkpoint, "model-00002-of-00003.safetensors", lambda raw: with_scale(raw, bits))
        refused(checkpoint, "scales")


def with_scale(raw, bits):
    """A file with another first scale of a unit."""
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[f"{UNIT}.scale"]["data_offsets"][0]
    return raw[:start] + bits.to_bytes(2, "little") + raw[start + 2 :]


@pytest.mark.parametrize("kind", ["sound_checkpoint", "coded_checkpoint"])
@settings(max_examples=200)
@given(st.sampled_from([MANIFEST, MANIFEST, FIRST, LAST]), st.floats(0, 1, exclude_max=True), st.integers(0, 255))
@example(MANIFEST, 0.0, 0xFF)
def test_any_changed_byte_is_noticed_or_means_nothing(request, kind, name, position, byte):
    sound = request.getfixturevalue(kind)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(shutil.copytree(sound, Path(parent) / "copy"))
        raw = bytearray((folder / name).read_bytes())
        raw[int(position * len(raw))] = byte
        (folder / name).write_bytes(raw)
        found = content_or_refusal(folder)
        assert found == content(sound) if isinstance(found, tuple) else "\n" not in found
