"""Sampling and decoding, each against a decoder that reads every frame from the start."""

from __future__ import annotations

import wave
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from tokenreduce.errors import MediaError
from tokenreduce.media.reader import Index, Reader
from tokenreduce.media.video import VideoClip, decode_frames, read_video, sample_indices, video_info

WriteVideo = Callable[..., Path]
FRAMES, RATE, WIDTH, HEIGHT = 90, 25, 48, 32


@pytest.fixture
def write_video(tmp_path: Path) -> WriteVideo:
    def write(name: str, codec: str = "libx264", frames: int = FRAMES, **options: str) -> Path:
        path = tmp_path / name
        container_options = {"movflags": options.pop("movflags")} if "movflags" in options else {}
        noise = np.random.default_rng(0).integers(0, 255, (HEIGHT, 2 * WIDTH + frames, 3), dtype=np.uint8)
        with av.open(str(path), "w", options=container_options) as container:
            stream = container.add_stream(codec, rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for i in range(frames):
                image = np.ascontiguousarray(noise[:, i : i + WIDTH])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write


def every_frame(path: Path) -> list[NDArray[np.uint8]]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


class TestSampling:
    @pytest.mark.parametrize(
        ("total", "avg_fps", "fps", "max_frames", "expected"),
        [
            (100, 25.0, 1.0, 64, [0, 25, 50, 75]),
            (100, 29.97, 1.0, 64, [0, 30, 60, 90]),
            (100, 25.0, 2.0, 64, list(range(0, 100, 12))),  # round(12.5) is 12 in Python and upstream
            (101, 25.0, 1.0, 5, [0, 25, 50, 75, 100]),
            (101, 25.0, 1.0, 4, [0, 33, 66, 100]),
            (1, 25.0, 1.0, 64, [0]),
            (3, 0.2, 1.0, 64, [0, 1, 2]),
            (1000, 30.0, 1.0, 1, [0]),
        ],
    )
    def test_stride_unless_too_many(
        self, total: int, avg_fps: float, fps: float, max_frames: int, expected: list[int]
    ) -> None:
        assert sample_indices(total, avg_fps, fps, max_frames) == expected

    def test_force_sample_always_spreads(self) -> None:
        assert sample_indices(313, 25.0, 1.0, 4, force_sample=True) == [0, 104, 208, 312]
        assert sample_indices(3, 25.0, 1.0, 5, force_sample=True) == [0, 0, 1, 1, 2]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 25.0), "no frames"),
            ((10, 25.0, 0.0), "above 0"),
            ((10, 25.0, float("nan")), "above 0"),
            ((10, 25.0, 1.0, 0), "at least 1"),
        ],
    )
    def test_refuses_nonsense(self, arguments: tuple[float, ...], message: str) -> None:
        with pytest.raises(MediaError, match=message):
            sample_indices(*arguments)  # type: ignore[arg-type]


CONTAINERS = [
    ("short_gop.mp4", "libx264", {"g": "12"}),
    ("long_gop.mp4", "libx264", {"g": "250"}),
    ("tiny_gop.mp4", "libx264", {"g": "2", "bf": "3"}),
    ("open_gop.mkv", "libx264", {"x264-params": "open-gop=1:keyint=20"}),
    ("hidden_frames.webm", "libvpx", {"g": "40", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    ("decoding_order.avi", "libx264", {"g": "24"}),
    ("no_index.ts", "libx264", {"g": "24"}),
]


class TestDecoding:
    @pytest.mark.parametrize(("name", "codec", "options"), CONTAINERS, ids=[name for name, _, _ in CONTAINERS])
    def test_any_frames_of_any_container(
        self, write_video: WriteVideo, name: str, codec: str, options: dict[str, str]
    ) -> None:
        path = write_video(name, codec, **options)
        expected, info = every_frame(path), video_info(path)
        assert (info.frames, info.fps, info.width, info.height) == (FRAMES, RATE, WIDTH, HEIGHT)
        for indices in ([0, 45, 89], [89], [3, 3, 88, 40, 41], list(range(FRAMES))):
            frames = decode_frames(path, indices, info=info)
            assert all(np.array_equal(frame, expected[i]) for frame, i in zip(frames, indices, strict=True))

    def test_jumps_over_what_nobody_asked_for(self, write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write_video("clip.mp4", g="10", bf="0")
        decoded = 0
        frames = Reader.frames

        def counting(reader: Reader) -> object:
            nonlocal decoded
            for frame in frames(reader):
                decoded += 1
                yield frame

        monkeypatch.setattr(Reader, "frames", counting)
        decode_frames(path, [0, 60, 62])
        assert decoded == 1 + 3

    def test_a_landing_beyond_the_target_is_read_from_the_start(self, write_video: WriteVideo) -> None:
        path = write_video("clip.mp4", g="12")
        info = video_info(path)
        assert info.index is not None
        lying = replace(info, index=Index(info.index.pts, info.index.pts[[0, 59]]))
        assert np.array_equal(decode_frames(path, [59], info=lying)[0], every_frame(path)[59])

    def test_a_clip_knows_its_times(self, write_video: WriteVideo) -> None:
        path = write_video("clip.mp4")
        seen: list[tuple[int, int]] = []
        clip = read_video(path, max_frames=3, progress=lambda *done: seen.append(done))
        assert (clip.indices, clip.times, clip.total) == ([0, 44, 89], [0.0, 1.76, 3.56], FRAMES)
        assert (clip.duration, clip.fps, clip.array().shape) == (3.6, 25.0, (3, HEIGHT, WIDTH, 3))
        assert seen == [(1, 3), (2, 3), (3, 3)]
        assert [image.size for image in clip.images()] == [(WIDTH, HEIGHT)] * 3

    def test_one_frame_is_a_video(self, write_video: WriteVideo) -> None:
        clip = read_video(write_video("one.mp4", frames=1))
        assert (clip.indices, clip.times, len(clip.frames)) == ([0], [0.0], 1)

    @pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (180, 2), (270, 3)])
    def test_turned_videos_come_out_upright(self, write_video: WriteVideo, degrees: int, turns: int) -> None:
        path = write_video("phone.mp4", frames=2)
        flat = every_frame(path)
        cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
        matrix = b"".join((v << 16).to_bytes(4, "big", signed=True) for v in (cos, -sin, 0, sin, cos, 0, 0, 0))
        data = bytearray(path.read_bytes())
        start = data.index(b"tkhd") + 4 + 40  # ISO 14496-12: the matrix of a version 0 track header
        data[start : start + 32] = matrix
        path.write_bytes(data)
        assert np.array_equal(decode_frames(path, [1])[0], np.rot90(flat[1], turns))

    def test_frames_of_several_sizes_make_no_array(self) -> None:
        frames = [np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]
        clip = VideoClip(frames, [0.0, 1.0], 2.0, 1.0, [0, 1])
        with pytest.raises(MediaError, match=r"differ in size.*\(4, 6, 3\)"):
            clip.array()


class TestBadInput:
    def refused(self, path: Path, *message: str) -> None:
        with pytest.raises(MediaError) as error:
            read_video(path)
        text = str(error.value)
        assert str(path) in text
        assert "\n" not in text
        assert all(part in text for part in message), text

    def test_no_such_file(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "gone.mp4", "no such file")

    def test_a_directory(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "a directory")

    @pytest.mark.parametrize(
        "content", [b"", b"hello\nworld\n", bytes(range(256)) * 64], ids=["empty", "text", "bytes"]
    )
    def test_not_a_video(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "file.mp4"
        path.write_bytes(content)
        self.refused(path, "not a readable video")

    def test_sound_only(self, tmp_path: Path) -> None:
        path = tmp_path / "sound.wav"
        with wave.open(str(path), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes(1600))
        self.refused(path, "no video stream")

    def test_no_frames(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.avi"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            container.start_encoding()
        self.refused(path, "no frames")

    def test_truncated_before_its_index(self, write_video: WriteVideo) -> None:
        path = write_video("clip.mp4")
        path.write_bytes(path.read_bytes()[:-2000])
        self.refused(path, "truncated")

    def test_truncated_after_its_index(self, write_video: WriteVideo) -> None:
        path = write_video("clip.mp4", movflags="+faststart")
        data = path.read_bytes()
        path.write_bytes(data[: len(data) * 2 // 3])
        self.refused(path, "truncated", f"should have {FRAMES} frames")

    def test_a_frame_that_is_not_there(self, write_video: WriteVideo) -> None:
        path = write_video("clip.mp4", frames=5)
        with pytest.raises(MediaError, match=r"no frame 5; the video has frames 0 … 4"):
            decode_frames(path, [0, 5])

    def test_frames_that_cannot_be_decoded(self, write_video: WriteVideo) -> None:
        path = write_video("clip.avi", "mpeg4")
        more = replace(video_info(path), times=np.arange(FRAMES + 5) / RATE)
        with pytest.raises(MediaError, match=rf"frame {FRAMES + 4} of {FRAMES + 5} cannot be decoded"):
            decode_frames(path, [0, FRAMES + 4], info=more)
