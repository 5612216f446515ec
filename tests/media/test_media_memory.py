"""Memory of probing and of decoding does not grow with the file."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tokenreduce.media.video import video_info

PEAK = """
import resource, sys
from tokenreduce.media.video import read_video, video_info
def peak():  # KiB; of this process alone, where a child begins with its parent's
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
info = video_info(sys.argv[1])
probed = peak()
clip = read_video(sys.argv[1], fps=25, max_frames=8)
print(info.frames, len(clip.frames), probed - before, peak() - probed)
"""


def write_large(path: Path, mebibytes: int, per_frame: int = 1 << 20) -> Path:
    """JPEG frames, each with zeros behind its end up to `per_frame` bytes, which a decoder skips."""
    coder = av.CodecContext.create("mjpeg", "w")
    coder.width, coder.height, coder.pix_fmt, coder.time_base = 64, 48, "yuvj420p", Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8)).reformat(format="yuvj420p")
    frame.pts = 0
    picture = bytes((coder.encode(frame) + coder.encode(None))[0])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number in range(mebibytes * (1 << 20) // per_frame):
            packet = av.Packet(picture + bytes(per_frame - len(picture)))
            packet.pts = packet.dts = number
            packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
            container.mux(packet)
    return path


def test_probing_keeps_no_packet(tmp_path: Path) -> None:
    path = write_large(tmp_path / "many.mkv", 24, per_frame=1200)
    tracemalloc.start()
    try:
        info = video_info(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert info.frames == 24 * (1 << 20) // 1200
    assert peak / info.frames < 100, f"{peak / info.frames:.0f} bytes a frame: a packet alone has more"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["large.mkv", "large.mp4", "large.avi"])
def test_memory_is_that_of_a_small_file(tmp_path: Path, name: str) -> None:
    peaks = {}
    for size in (50, 400, 1200):
        path = write_large(tmp_path / name, size)
        out = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True).stdout
        frames, shown, *peaks[size] = map(int, out.split())
        assert (frames, shown) == (size, 8)
        path.unlink()
    print(name, "KiB while probing and while decoding, by MiB of the file:", peaks)
    for probing, decoding in peaks.values():
        assert probing < peaks[50][0] + 20_000
        assert decoding < peaks[50][1] + 20_000
