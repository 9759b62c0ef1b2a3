"""Videos in the forms that rows give them, with the time of every frame: what a model's positions are made of."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from .image import image_size, local_file, open_image


VIDEO_FPS = 2.0  # of frames that come without a rate


@dataclass
class Video:
    """Frames [n, h, w, 3] that were chosen from a video, and which ones these are at which rate."""

    frames: np.ndarray
    metadata: VideoMetadata

    def __len__(self) -> int:
        return len(self.frames)


def read_video(source: Any, processor) -> Video:
    """
    Reads a video, choosing frames of a file as the processor does.

    Args:
        source (`Any`):
            A video file or its bytes, a folder of frames in the order of their names, a list or array of frames that
            were chosen before, or a mapping with `video` or `frames` and `fps`: the rate of the frames, or the rate
            at which to choose from a file. In place of `fps`, frames may have `timestamps`, the seconds at which each
            is shown: positions know one rate, the mean one. Frames without either are two per second.
        processor (`ProcessorMixin`):
            The processor: its video processor's `num_frames`, or `fps`, `min_frames` and `max_frames` count.

    Raises:
        `ValueError`: if it cannot be read.
        `ImportError`: if PyAV is missing, which files need.
    """
    if isinstance(source, Video):
        return source
    source, fps, timestamps = _unwrap(source)
    if not isinstance(source, str) and not hasattr(source, "read"):
        fps = _mean_rate(timestamps, len(source)) or fps
        return _from_frames([open_image(frame) for frame in source], fps)
    if isinstance(source, str) and Path(source).is_dir():
        files = frame_files(source)
        fps = _mean_rate(timestamps, len(files)) or fps
        metadata = VideoMetadata(total_num_frames=len(files), fps=fps or VIDEO_FPS)
        metadata.frames_indices = _frames_of_folder(processor, len(files), fps)
        return Video(_stack([open_image(files[index]) for index in metadata.frames_indices]), metadata)
    _refuse_timestamps(timestamps)
    return _read_file(source, processor, fps)


def check_video(source: Any) -> None:
    """Raises the `ValueError` of a video that is not there, decoding nothing."""
    if isinstance(source, Video):
        return
    source, _, timestamps = _unwrap(source)
    if hasattr(source, "read") or (isinstance(source, str) and not Path(source).is_dir()):
        _refuse_timestamps(timestamps)
        return
    if isinstance(source, str):
        files = frame_files(source)
        _mean_rate(timestamps, len(files))
        source = files[:1]
    else:
        _mean_rate(timestamps, len(source))
    if len(source) == 0:
        raise ValueError("it has no frames")
    for frame in source:
        image_size(frame)


def video_size(source: Any, processor) -> tuple[int, int, int]:
    """Returns frames, height and width of what [`read_video`] would return, from headers alone."""
    if isinstance(source, Video):
        return source.frames.shape[:3]
    source, fps, _ = _unwrap(source)
    if hasattr(source, "read") or (isinstance(source, str) and not Path(source).is_dir()):
        av = _import_av()
        metadata = _measure(av, source)
        return len(choose_frames(processor, metadata, fps)), metadata.height, metadata.width
    frames = frame_files(source) if isinstance(source, str) else source
    if len(frames) == 0:
        raise ValueError("it has no frames")
    n = len(_frames_of_folder(processor, len(frames), fps)) if isinstance(source, str) else len(frames)
    return n, *image_size(frames[0])


def choose_frames(processor, metadata: VideoMetadata, fps: float | None = None) -> list[int]:
    """Returns the indices of the frames that the processor takes of a video of that length and rate."""
    settings = processor.video_processor
    if metadata.total_num_frames < (getattr(settings, "temporal_patch_size", None) or 1):
        return list(range(metadata.total_num_frames))
    if fps is None and not (settings.num_frames or settings.fps):
        fps = VIDEO_FPS
    return [int(index) for index in settings.sample_frames(metadata=metadata, **({"fps": fps} if fps else {}))]


def _unwrap(source: Any) -> tuple[Any, float | None, Sequence[float] | None]:
    """The video itself, and its rate or the time stamps of its frames where these are given."""
    fps = timestamps = None
    while isinstance(source, Mapping) and (source.get("fps") is not None or source.get("timestamps") is not None):
        fps, timestamps = source.get("fps"), source.get("timestamps")
        source = {key: value for key, value in source.items() if key not in ("fps", "timestamps")}
    if fps is not None and timestamps is not None:
        raise ValueError("it has `fps` and `timestamps`, which say the same: leave one out")
    source = local_file(source, "frames", "video")
    if not isinstance(source, str) and not hasattr(source, "read") and not hasattr(source, "__len__"):
        raise ValueError(f"it is a {type(source).__name__}: give a file, a folder, or frames")
    try:
        rate = None if fps is None else float(fps)
    except (TypeError, ValueError):
        rate = -1.0
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"its fps={fps!r} must be a positive number of frames per second")
    return source, rate, timestamps


def _mean_rate(timestamps: Sequence[float] | None, n: int) -> float | None:
    """Frames per second of `n` frames shown at these seconds; `None` without time stamps, or of a single frame."""
    if timestamps is None:
        return None
    try:
        times = np.asarray(timestamps, dtype=np.float64)
    except (TypeError, ValueError):
        times = np.array(None, dtype=object)
    if times.shape != (n,) or not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise ValueError(
            f"its timestamps={timestamps!r:.80} must be {n} rising numbers, the seconds at which each frame is shown"
        )
    return float((n - 1) / (times[-1] - times[0])) if n > 1 else None


def _refuse_timestamps(timestamps: Sequence[float] | None) -> None:
    if timestamps is not None:
        raise ValueError("it has `timestamps`, and a file has its own: leave them out, or give the frames")


def _from_frames(frames: list[Any], fps: float | None) -> Video:
    if not frames:
        raise ValueError("it has no frames")
    metadata = VideoMetadata(
        total_num_frames=len(frames), fps=fps or VIDEO_FPS, frames_indices=list(range(len(frames)))
    )
    return Video(_stack(frames), metadata)


def _frames_of_folder(processor, n: int, fps: float | None) -> list[int]:
    """All frames of a folder, unless the processor wants a number of its own or fewer."""
    settings = processor.video_processor
    if settings.num_frames or n > (getattr(settings, "max_frames", None) or n):
        return choose_frames(processor, VideoMetadata(total_num_frames=n, fps=fps or VIDEO_FPS))
    return list(range(n))


def _stack(frames: list[Any]) -> np.ndarray:
    arrays = [np.asarray(frame) for frame in frames]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"its frames are of several sizes, {arrays[0].shape} and others: give them one size")
    return np.stack(arrays)


def frame_files(folder: str) -> list[str]:
    """Returns the frames of a video that is a folder, in the order of their names."""
    files = [str(file) for file in sorted(Path(folder).iterdir()) if file.is_file()]
    if not files:
        raise ValueError(f"{folder} is empty: a folder given as video holds one image per frame")
    return files


def _import_av():
    try:
        import av
    except ImportError as error:
        raise ImportError('reading video files needs PyAV: pip install "linmu-hf[video]"') from error
    return av


def _read_file(file: Any, processor, fps: float | None) -> Video:
    av = _import_av()
    try:
        metadata = _measure(av, file)
        metadata.frames_indices = choose_frames(processor, metadata, fps)
        return Video(_decode(av, file, metadata), metadata)
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        name = file if isinstance(file, str) else "it"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is not a video that PyAV can read: {reason}") from error


def _measure(av, file: Any) -> VideoMetadata:
    """Number of frames and rate, from the file's header, or from its packets where that has none."""
    with _opened(av, file) as container:
        stream = container.streams.video[0]
        fps, total = float(stream.average_rate or stream.guessed_rate or 0), stream.frames
        if not total or not fps:
            times = [
                float(packet.pts * packet.time_base) for packet in container.demux(stream) if packet.pts is not None
            ]
            span = max(times, default=0.0) - min(times, default=0.0)
            fps = fps or ((len(times) - 1) / span if span else VIDEO_FPS)
            total = round(span * fps) + 1 if times else 0
        if not total:
            raise ValueError("it has no frames")
        return VideoMetadata(
            total_num_frames=total,
            fps=fps,
            duration=total / fps,
            width=stream.width,
            height=stream.height,
            video_backend="pyav",
        )


def _decode(av, file: Any, metadata: VideoMetadata) -> np.ndarray:
    """The frames that are on screen at the chosen times: by their time stamps, as rates may vary within a file."""
    frames: list[np.ndarray] = []
    shown = start = None
    wanted = iter(metadata.frames_indices)
    index = next(wanted, None)
    with _opened(av, file) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number == 0:
                start = frame.time
            position = number if frame.time is None or start is None else round((frame.time - start) * metadata.fps)
            while shown is not None and index is not None and index < position:
                frames.append(_to_array(shown))
                index = next(wanted, None)
            if index is None:
                break
            shown = frame
    if shown is None:
        raise ValueError("no frame of it decodes")
    while index is not None:
        frames.append(_to_array(shown))
        index = next(wanted, None)
    return np.stack(frames)


def _to_array(frame) -> np.ndarray:
    turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise: how a phone was held
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _opened(av, file: Any):
    if not isinstance(file, str):
        file.seek(0)
    return av.open(file)
