"""HU of every transfer syntax against what was stored; imagecodecs, GDCM and pydicom code the images."""

import imagecodecs
import numpy as np
import pydicom
import pytest
import SimpleITK
from lidc_files import COLUMNS, ROWS, STORED, load, only, write_case
from pydicom.encaps import encapsulate
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    MPEG4HP41,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

HU = STORED[:, :, :3] - 1024
NATIVE = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]


def jpeg(stored, bits):
    return imagecodecs.jpeg8_encode(stored, lossless=True, bitspersample=bits)


def jpeg_of_other_predictor(stored, bits):
    return imagecodecs.jpeg8_encode(stored, lossless=True, bitspersample=bits, predictor=6)


def jpeg_ls(stored, bits):
    return imagecodecs.jpegls_encode(stored)


def jpeg_2000(stored, bits):
    return imagecodecs.jpeg2k_encode(stored, codecformat="j2k", reversible=True, bitspersample=bits)


def jp2_with_boxes(stored, bits):
    return imagecodecs.jpeg2k_encode(stored, codecformat="jp2", reversible=True, bitspersample=bits)


def high_throughput(stored, bits):
    return imagecodecs.htj2k_encode(stored, reversible=True)


CODED = {
    "JPEG Lossless": (JPEGLossless, jpeg_of_other_predictor),
    "JPEG Lossless SV1": (JPEGLosslessSV1, jpeg),
    "JPEG-LS": (JPEGLSLossless, jpeg_ls),
    "JPEG 2000 lossless": (JPEG2000Lossless, jpeg_2000),
    "JPEG 2000": (JPEG2000, jp2_with_boxes),
    "HTJ2K lossless": (HTJ2KLossless, high_throughput),
    "HTJ2K": (HTJ2K, high_throughput),
}
SYNTAXES = {syntax.name: (syntax, None) for syntax in [*NATIVE, RLELossless]} | CODED


def recode(folder, stored, syntax, encode, *, signed=False, bits=12, high_bit=None, coded_bits=16):
    """Give the slices of a case other pixels, uint16 (columns, rows, slices), in another transfer syntax."""
    for k, file in enumerate(sorted(folder.glob("*.dcm"), reverse=True)):
        dataset = pydicom.dcmread(file)
        dataset.BitsStored, dataset.HighBit = bits, bits - 1 if high_bit is None else high_bit
        dataset.PixelRepresentation, dataset.RescaleIntercept = int(signed), 0 if signed else -1024
        pixels = np.ascontiguousarray(stored[:, :, k].T.astype(np.uint16))
        dataset.PixelData = pixels.astype(">u2" if syntax == ExplicitVRBigEndian else "<u2").tobytes()
        if syntax == RLELossless:
            dataset.compress(RLELossless)
        elif encode:
            dataset.PixelData = encapsulate([encode(pixels, coded_bits)])
            dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
        pydicom.dcmwrite(
            file,
            dataset,
            implicit_vr=syntax == ImplicitVRLittleEndian,
            little_endian=syntax != ExplicitVRBigEndian,
            enforce_file_format=True,
        )


def case(top):
    return write_case(top, slices=range(3))


@pytest.mark.parametrize("unused", ["zero", "overlay"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_syntax_gives_the_true_hu(tmp_path, syntax, signed, unused):
    truth = np.clip(HU, -1000, 1000) if signed else HU
    stored = (truth if signed else truth + 1024) & 0xFFF
    if unused == "overlay":
        stored = stored | np.random.default_rng(2).integers(0, 16, stored.shape) << 12
    recode(case(tmp_path), stored, *SYNTAXES[syntax], signed=signed)
    assert not only(tmp_path).excluded
    np.testing.assert_array_equal(load(tmp_path).ct.array, truth)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", ["JPEG Lossless SV1", "JPEG 2000 lossless"])
def test_images_of_as_many_bits_as_are_stored(tmp_path, syntax, signed):
    truth = np.clip(HU, -1000, 1000) if signed else HU
    stored = (truth if signed else truth + 1024) & 0xFFF
    recode(case(tmp_path), stored, *SYNTAXES[syntax], signed=signed, coded_bits=12)
    np.testing.assert_array_equal(load(tmp_path).ct.array, truth)


def test_images_that_say_they_are_signed(tmp_path):
    def encode(pixels, bits):
        return imagecodecs.jpeg2k_encode(pixels.view(np.int16), codecformat="j2k", reversible=True)

    recode(case(tmp_path), HU & 0xFFFF, JPEG2000Lossless, encode, signed=True, bits=16)
    np.testing.assert_array_equal(load(tmp_path).ct.array, HU)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_values_in_the_upper_bits(tmp_path, syntax, signed):
    truth = np.clip(HU, -1000, 1000) if signed else HU
    stored = (truth if signed else truth + 1024) & 0xFFF
    recode(case(tmp_path), stored << 4 | 0b1010, syntax, None, signed=signed, high_bit=15)
    np.testing.assert_array_equal(load(tmp_path).ct.array, truth)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_padding_beyond_the_stored_bits(tmp_path):
    stored = STORED[:, :, :3].astype(np.uint16)
    stored[2, 3] = 63536
    folder = case(tmp_path)
    recode(folder, stored, ExplicitVRLittleEndian, None)
    for file in folder.glob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.add_new("PixelPaddingValue", "US", 63536)
        dataset.save_as(file)
    truth = HU.copy()
    truth[2, 3] = -1024
    np.testing.assert_array_equal(load(tmp_path).ct.array, truth)


def test_lossy_jpeg_of_twelve_bits(tmp_path):
    def encode(pixels, bits):
        return imagecodecs.jpeg8_encode(pixels, bitspersample=12, level=100)

    recode(case(tmp_path), STORED[:, :, :3], JPEGExtended12Bit, encode)
    assert np.abs(load(tmp_path).ct.array - HU).max() <= 3


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_images_that_gdcm_has_coded(tmp_path, compressor):
    def encode(pixels, bits):
        writer = SimpleITK.ImageFileWriter()
        writer.SetFileName(str(tmp_path / "coded.dcm"))
        writer.UseCompressionOn()
        writer.SetCompressor(compressor)
        writer.Execute(SimpleITK.GetImageFromArray(pixels[None]))
        (frame,) = pydicom.encaps.generate_frames(pydicom.dcmread(tmp_path / "coded.dcm").PixelData, number_of_frames=1)
        return frame

    syntax = JPEGLosslessSV1 if compressor == "JPEG" else JPEG2000Lossless
    (tmp_path / "data").mkdir()
    recode(case(tmp_path / "data"), STORED[:, :, :3] | 0x1000, syntax, encode)
    np.testing.assert_array_equal(load(tmp_path / "data").ct.array, HU)


def test_a_syntax_without_a_decoder_is_named(tmp_path):
    recode(case(tmp_path), STORED[:, :, :3], MPEG4HP41, jpeg)
    assert f"is in a transfer syntax that cannot be decoded, {MPEG4HP41.name}" in only(tmp_path).excluded


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
@pytest.mark.parametrize("syntax", CODED)
def test_damaged_images_are_excluded_under_the_name_of_their_syntax(tmp_path, syntax, share):
    uid, encode = CODED[syntax]

    def encode_and_cut(pixels, bits):
        coded = encode(pixels, bits)
        return coded[: int(len(coded) * share)]

    recode(case(tmp_path), STORED[:, :, :3], uid, encode_and_cut)
    with pytest.raises(Exception, match="pixels cannot be decoded") as caught:
        load(tmp_path)
    assert uid.name in str(caught.value)


@pytest.mark.parametrize("syntax", CODED)
def test_images_of_another_size_are_refused_before_they_take_memory(tmp_path, syntax, monkeypatch):
    uid, encode = CODED[syntax]
    recode(case(tmp_path), STORED[:, :, :3], uid, lambda pixels, bits: encode(np.zeros((64, 64), np.uint16), bits))
    for name in ("jpeg8_decode", "jpegls_decode", "jpeg2k_decode"):
        monkeypatch.setattr(imagecodecs, name, lambda *_: pytest.fail("decoded"))
    with pytest.raises(Exception, match=rf"\(64, 64\) instead of \({ROWS}, {COLUMNS}\) pixels"):
        load(tmp_path)


def test_deflated_slices_are_unpacked_within_bounds(tmp_path):
    folder = case(tmp_path)
    recode(folder, STORED[:, :, :3], DeflatedExplicitVRLittleEndian, None)
    file = sorted(folder.glob("*.dcm"))[1]
    dataset = pydicom.dcmread(file)
    dataset.PixelData = bytes(65 << 20)
    pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    assert file.stat().st_size < 1 << 20
    assert f"{file.name}: decompresses to more than the 64 MiB allowed for a slice" in only(tmp_path).excluded


def test_a_truncated_deflated_slice(tmp_path):
    folder = case(tmp_path)
    recode(folder, STORED[:, :, :3], DeflatedExplicitVRLittleEndian, None)
    file = sorted(folder.glob("*.dcm"))[1]
    file.write_bytes(file.read_bytes()[:-60])
    assert f"{file.name}: is truncated" in only(tmp_path).excluded
