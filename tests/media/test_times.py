"""Times, sampling and duration of files whose frames are not evenly spaced, or do not say all they should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from support.videos import TONE, tone_of, write_timed

from tokenreduce.errors import MediaError
from tokenreduce.media.video import decode_frames, read_video, sample_indices, video_info
from tokenreduce.models.minicpm_v.processing import sample_frames

RECORDING = [round(i * 1000 / 30) for i in range(60)] + list(range(2000, 60000, 2000))
"""Milliseconds of a screen recording: 2 seconds at 30 frames per second, then a frame every 2 seconds, up to 58 s."""
FORMATS = [
    ("a.mp4", "libx264"),
    ("a.mkv", "libx264"),
    ("a.webm", "libvpx"),
    ("nine.webm", "libvpx-vp9"),
    ("a.gif", "gif"),
    ("a.flv", "flv"),
    ("a.avi", "mpeg4"),
    ("a.ts", "libx264"),
]


@pytest.mark.parametrize(("name", "codec"), FORMATS, ids=[name for name, _ in FORMATS])
def test_a_variable_rate_is_sampled_by_time(tmp_path: Path, name: str, codec: str) -> None:
    path = write_timed(tmp_path / name, codec, RECORDING)
    info = video_info(path)
    assert info.frames == len(RECORDING)
    assert np.abs(info.times - np.array(RECORDING) / 1000).max() <= 0.0101  # GIF counts hundredths.
    assert 58.0 < info.duration <= 60.0
    assert not info.constant
    clip = read_video(path)
    assert clip.times == info.times[[0, 30, *range(60, 89)]].tolist()  # At most one per second, none twice.
    shown = [tone_of(frame) for frame in clip.frames]
    wanted = [TONE * index % 256 for index in clip.indices]
    assert np.abs(np.array(shown) - wanted).max() <= 6, "each frame is the one that its time says"
    few = info.pick(sample_indices, max_frames=8, count=True)
    assert np.abs(info.times[few] - np.linspace(0, info.duration, 8)).max() <= 2.0
    middles = info.pick(sample_frames, max_frames=8, count=True)
    assert np.abs(info.times[middles] - (np.arange(8) + 0.5) * info.duration / 8).max() <= 3.0
    assert len(info.pick(sample_indices, max_frames=40, force=True, count=True)) == 40


def test_a_constant_rate_is_sampled_as_the_authors_count(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "even.webm", "libvpx", [round(i * 1000 / 30) for i in range(100)])
    info = video_info(path)
    assert info.constant  # Though Matroska rounds to milliseconds: 33, 33, 34.
    assert info.fps == 30
    assert info.pick(sample_indices, count=True) == sample_indices(100, 30.0) == [0, 30, 60, 90]
    assert info.pick(sample_indices, max_frames=3, count=True) == [0, 49, 99]
    assert info.pick(sample_indices, fps=4.0) == [0, 7, 15, 22, 30, 37, 45, 52, 60, 67, 75, 82, 90, 97]  # By time.


def test_a_file_without_times_counts(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "raw.h264", "libx264", [round(i * 1000 / 30) for i in range(20)])
    info = video_info(path)
    assert info.frames == 20
    assert info.times[-1] == pytest.approx(19 / info.fps)
    assert len(decode_frames(path, [0, 19], info=info)) == 2


def test_an_edit_list_hides_frames_and_moves_times(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "cut.mp4", "libx264", [40 * i for i in range(50)], g="10")
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 8  # ISO 14496-12: after version and flags, the number of edits
    assert int.from_bytes(data[start : start + 4], "big") == 1
    scale = int.from_bytes(data[(at := data.index(b"mdhd") + 16) : at + 4], "big")
    data[start + 4 : start + 8] = (1000).to_bytes(4, "big")  # 1 s in the movie's time scale, 1000
    begin = int.from_bytes(data[start + 8 : start + 12], "big")
    data[start + 8 : start + 12] = (begin + scale // 2).to_bytes(4, "big")  # from half a second on
    path.write_bytes(data)
    info = video_info(path)
    shown = [tone_of(frame) for frame in decode_frames(path, [0, info.frames - 1], info=info)]
    assert info.times[0] == 0
    assert info.frames == pytest.approx(25, abs=2)
    assert info.duration == pytest.approx(1.0, abs=0.1)
    assert shown[0] == pytest.approx(TONE * 13 % 256, abs=TONE + 4), "what comes before half a second is not shown"


@pytest.mark.parametrize("name", ["late.mkv", "late.webm"])
def test_a_last_frame_that_stays_counts_where_the_header_says_so(tmp_path: Path, name: str) -> None:
    path = write_timed(tmp_path / name, "libvpx", [0, 500, 1000, 3000], hold_ms=7000)
    assert video_info(path).duration == pytest.approx(10.0, abs=0.05)


def test_a_joined_transport_stream_goes_on(tmp_path: Path) -> None:
    parts = [write_timed(tmp_path / f"{i}.ts", "libx264", [40 * n for n in range(50)], bf="0") for i in range(2)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info = video_info(path)
    assert info.frames == 100
    assert np.allclose(np.diff(info.times), 0.04)
    assert info.duration == pytest.approx(4.0, abs=0.05)


def test_animated_webp_has_its_own_delays(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    pictures = [Image.fromarray(np.full((32, 48, 3), 25 * i, np.uint8)) for i in range(5)]
    delays = [100, 500, 50, 1000, 200]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=delays, lossless=True)
    info = video_info(path)
    assert info.times.tolist() == [0.0, 0.1, 0.6, 0.65, 1.65]
    assert (info.duration, info.width, info.height) == (1.85, 48, 32)
    clip = read_video(path, fps=2.0)
    assert clip.indices == [0, 1, 3]  # On screen at 0, 0.5, 1.0 and 1.5 s; the last of them twice, and shown once.
    assert [tone_of(frame) for frame in clip.frames] == [0, 25, 75]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MediaError, match="truncated, 20 of"):
        video_info(path)


@pytest.mark.parametrize(("name", "codec"), [("change.webm", "libvpx"), ("change.ts", "libx264")])
def test_a_change_of_size_is_resized_to_the_first(
    tmp_path: Path, name: str, codec: str, join: Callable[[Path, str, Sequence[tuple[int, int]]], Path]
) -> None:
    path = join(tmp_path / name, codec, [(64, 48), (96, 32)])
    info = video_info(path)
    assert (info.frames, info.width, info.height) == (20, 64, 48)
    frames = decode_frames(path, [0, 9, 10, 19], info=info)
    assert {frame.shape for frame in frames} == {(48, 64, 3)}
    assert [round(tone_of(frame) / TONE) for frame in frames] == [0, 9, 10, 19]


@pytest.fixture
def join() -> Callable[[Path, str, Sequence[tuple[int, int]]], Path]:
    """Writes ten frames of each size into one stream."""

    def write(path: Path, codec: str, sizes: Sequence[tuple[int, int]]) -> Path:
        with av.open(str(path), "w") as container:
            stream, number = container.add_stream(codec, rate=25), 0
            stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
            for size in sizes:
                coder = av.CodecContext.create(codec, "w")
                coder.width, coder.height, coder.pix_fmt = *size, "yuv420p"
                coder.time_base, coder.framerate = Fraction(1, 25), Fraction(25)
                coder.options = {"bf": "0"} if codec == "libx264" else {}
                for _ in range(10):
                    frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), TONE * number, np.uint8))
                    frame.pts, frame.time_base, number = number, coder.time_base, number + 1
                    for packet in coder.encode(frame.reformat(format="yuv420p")):
                        packet.stream = stream
                        container.mux(packet)
                for packet in coder.encode(None):
                    packet.stream = stream
                    container.mux(packet)
        return path

    return write
