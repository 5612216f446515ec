"""Files that broke off: refused, or read as far as they go, with a word on what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.videos import TONE, tone_of, write_timed

from tokenreduce.errors import MediaError
from tokenreduce.media.promised import promised_bytes
from tokenreduce.media.video import read_video, video_info

TIMES = [40 * i for i in range(100)]
KINDS = [("a.mkv", "libx264"), ("a.webm", "libvpx"), ("a.avi", "mpeg4"), ("a.flv", "flv")]


@pytest.mark.parametrize(("name", "codec"), KINDS, ids=[name for name, _ in KINDS])
@pytest.mark.parametrize("share", [0.4, 0.97])
def test_refused_or_read_as_far_as_it_goes(tmp_path: Path, name: str, codec: str, share: float) -> None:
    path = write_timed(tmp_path / name, codec, TIMES)
    data = path.read_bytes()
    assert promised_bytes(path) == len(data)
    assert video_info(path).missing == ""
    cut = int(len(data) * share)
    path.write_bytes(data[:cut])
    lost = rf"truncated, {len(data) - cut:,} of {len(data):,} bytes are missing \({1 - cut / len(data):.0%}\)"
    with pytest.raises(MediaError, match=rf"{name}: {lost}.*copy it again.*allow_truncated=True, --allow-truncated"):
        video_info(path)
    with pytest.warns(UserWarning, match=rf"{lost}.*going on with what is there"):
        clip = read_video(path, fps=5.0, allow_truncated=True)
    assert clip.info is not None
    assert clip.info.missing.startswith(f"{len(data) - cut:,} of {len(data):,} bytes")
    if share < 0.5:
        assert 0.3 <= clip.duration < 3.9, "it lasts as long as what is there"
    assert len(clip.frames) >= 3
    assert clip.times == sorted(clip.times)
    shown = [tone_of(frame) for frame in clip.frames]
    wanted = [TONE * round(25 * time) % 256 for time in clip.times]
    assert np.abs(np.array(shown) - wanted).max() <= 8


def test_mp4_says_how_many_frames(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.mp4", "libx264", TIMES, movflags="+faststart", g="10")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(MediaError, match=r"truncated, it should have 100 frames and holds \d\d; [\d,]+ of"):
        video_info(path)
    with pytest.warns(UserWarning, match="it should have 100 frames"):
        clip = read_video(path, fps=25.0, max_frames=100, allow_truncated=True)
    assert 20 <= len(clip.frames) < 100
    assert [round(tone_of(frame) / TONE) for frame in clip.frames[:20]] == clip.indices[:20]
    path.write_bytes(data[: data.index(b"mdat") // 2])
    with pytest.raises(MediaError, match=r"not a readable video.*truncated"):
        video_info(path, allow_truncated=True)


def test_a_file_of_which_only_the_header_is_there(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.avi", "mpeg4", TIMES)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"movi") + 4])
    with pytest.raises(MediaError, match=r"truncated, [\d,]+ of"):
        video_info(path)
    with pytest.warns(UserWarning, match="truncated"), pytest.raises(MediaError, match="the video has no frames"):
        video_info(path, allow_truncated=True)


def test_a_size_that_nobody_promised(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.ts", "libx264", TIMES)
    path.write_bytes(path.read_bytes()[:-5000])
    assert promised_bytes(path) is None
    assert video_info(path).missing == ""  # A transport stream may end anywhere.


def test_flv_without_a_size_is_held_to_its_duration(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.flv", "flv", [40 * i for i in range(200)])
    data = path.read_bytes()
    place = data.index(b"filesize\x00") + 9
    data = data[:place] + bytes(8) + data[place + 8 :]
    path.write_bytes(data)
    assert video_info(path).frames == 200
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"truncated, [\d.]+ of 8\.0 seconds are missing"):
        video_info(path)


def test_what_follows_the_last_box_promises_nothing(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "a.mp4", "libx264", TIMES)
    path.write_bytes(path.read_bytes() + b"\xff\xff\xff\xffjunk" + bytes(100))
    assert video_info(path).frames == 100
