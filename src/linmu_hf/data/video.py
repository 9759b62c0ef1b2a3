"""Videos in the forms that rows give them, with the time of every frame: what a model's positions are made of."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from .image import image_size, local_file, open_image


ROUNDING = 1e-6  # frames
VIDEO_FPS = 2.0  # of frames that come without a rate
TIMING = ("fps", "timestamps")  # of a video that comes as frames
CLIP = ("video_start", "video_end")  # seconds: the part of a file that is meant, by qwen-vl-utils' names


@dataclass
class Video:
    """Frames [n, h, w, 3] that were chosen from a video, and which ones these are at which rate."""

    frames: np.ndarray
    metadata: VideoMetadata

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class Given:
    """A video as a row gives it: the `medium` itself, and what the row says of time."""

    medium: Any
    fps: float | None = None
    timestamps: Sequence[float] | None = None
    clip: tuple[float, float] = (0.0, math.inf)

    @property
    def is_file(self) -> bool:
        return hasattr(self.medium, "read") or (isinstance(self.medium, str) and not Path(self.medium).is_dir())

    def rate(self, n: int) -> float | None:
        """Returns the frames per second, as given or as the mean rate of `n` time stamps."""
        return _mean_rate(self.timestamps, n) or self.fps


def read_video(source: Any, processor) -> Video:
    """
    Reads a video, choosing frames of a file as the processor does.

    Args:
        source (`Any`):
            A video file or its bytes, a folder of frames in the order of their names, a list or array of frames that
            were chosen before, or a mapping with `video` or `frames` and `fps`: the rate of the frames, or the rate
            at which to choose from a file. In place of `fps`, frames may have `timestamps`, the seconds at which each
            is shown: positions know one rate, the mean one. Frames without either are two per second. Of a file,
            `video_start` and `video_end`, in seconds, say which part is meant; its positions begin at 0.
        processor (`ProcessorMixin`):
            The processor: its video processor's `num_frames`, or `fps`, `min_frames` and `max_frames` count.

    Raises:
        `ValueError`: if it cannot be read.
        `ImportError`: if PyAV is missing, which files need.
    """
    if isinstance(source, Video):
        return source
    given = _unwrap(source)
    if given.is_file:
        return _read_file(given, processor)
    if not isinstance(given.medium, str):
        return _from_frames([open_image(frame) for frame in given.medium], given.rate(len(given.medium)))
    files = frame_files(given.medium)
    fps = given.rate(len(files))
    metadata = VideoMetadata(total_num_frames=len(files), fps=fps or VIDEO_FPS)
    metadata.frames_indices = _frames_of_folder(processor, len(files), fps)
    return Video(_stack([open_image(files[index]) for index in metadata.frames_indices]), metadata)


def check_video(source: Any) -> None:
    """Raises the `ValueError` of a video that is not there, decoding nothing."""
    if isinstance(source, Video):
        return
    given = _unwrap(source)
    if given.is_file:
        return
    frames = frame_files(given.medium) if isinstance(given.medium, str) else given.medium
    given.rate(len(frames))
    if len(frames) == 0:
        raise ValueError("it has no frames")
    for frame in frames[:1] if isinstance(given.medium, str) else frames:
        image_size(frame)


def video_size(source: Any, processor) -> tuple[int, int, int]:
    """Returns frames, height and width of what [`read_video`] would return, from headers alone."""
    if isinstance(source, Video):
        return source.frames.shape[:3]
    given = _unwrap(source)
    if given.is_file:
        metadata, _ = _measure(_import_av(), given)
        return len(choose_frames(processor, metadata, given.fps)), metadata.height, metadata.width
    folder = isinstance(given.medium, str)
    frames = frame_files(given.medium) if folder else given.medium
    if len(frames) == 0:
        raise ValueError("it has no frames")
    n = len(_frames_of_folder(processor, len(frames), given.fps)) if folder else len(frames)
    return n, *image_size(frames[0])


def choose_frames(processor, metadata: VideoMetadata, fps: float | None = None) -> list[int]:
    """Returns the indices of the frames that the processor takes of a video of that length and rate."""
    settings = processor.video_processor
    if metadata.total_num_frames < (getattr(settings, "temporal_patch_size", None) or 1):
        return list(range(metadata.total_num_frames))
    if fps is None and not (settings.num_frames or settings.fps):
        fps = VIDEO_FPS
    return [int(index) for index in settings.sample_frames(metadata=metadata, **({"fps": fps} if fps else {}))]


def _unwrap(source: Any) -> Given:
    """Reads what a row says of a video's time; whether a file has such a part is not known before it is opened."""
    said: dict[str, Any] = {}
    while isinstance(source, Mapping) and any(source.get(key) is not None for key in (*TIMING, *CLIP)):
        said |= {key: source[key] for key in (*TIMING, *CLIP) if source.get(key) is not None}
        source = {key: value for key, value in source.items() if key not in (*TIMING, *CLIP)}
    if all(key in said for key in TIMING):
        raise ValueError("it has `fps` and `timestamps`, which say the same: leave one out")
    medium = local_file(source, "frames", "video")
    if not isinstance(medium, str) and not hasattr(medium, "read") and not hasattr(medium, "__len__"):
        raise ValueError(f"it is a {type(medium).__name__}: give a file, a folder, or frames")
    rate = None if "fps" not in said else _number(said["fps"])
    if rate is not None and not 0 < rate < math.inf:
        raise ValueError(f"its fps={said['fps']!r} must be a positive number of frames per second")
    start, end = (_number(said.get(key, other)) for key, other in zip(CLIP, (0.0, math.inf)))
    if not 0 <= start < end:
        asked = ", ".join(f"{key}={said[key]!r}" for key in CLIP if key in said)
        raise ValueError(f"its {asked} must be seconds, the start before the end")
    given = Given(medium, rate, said.get("timestamps"), (start, end))
    if given.is_file and given.timestamps is not None:
        raise ValueError("it has `timestamps`, and a file has its own: leave them out, or give the frames")
    if not given.is_file and any(key in said for key in CLIP):
        raise ValueError(f"it has `{next(key for key in CLIP if key in said)}`, and frames: give those that are meant")
    return given


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


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


def _read_file(given: Given, processor) -> Video:
    av = _import_av()
    try:
        metadata, first = _measure(av, given)
        metadata.frames_indices = choose_frames(processor, metadata, given.fps)
        return Video(_decode(av, given.medium, metadata, first), metadata)
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        name = given.medium if isinstance(given.medium, str) else "it"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is not a video that PyAV can read: {reason}") from error


def _measure(av, given: Given) -> tuple[VideoMetadata, int]:
    """
    Number of frames and rate, from the file's header, or from its packets where that has none; of a clip its own, with
    the number of its first frame.
    """
    with _opened(av, given.medium) as container:
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
        start, end = given.clip
        # 0.28 seconds at 25 frames per second are 7.000000000000001 frames
        first, last = math.ceil(start * fps - ROUNDING), min(end * fps + ROUNDING, total - 1)
        if first > last:
            raise ValueError(f"its video_start={start:g} leaves no frame of {total / fps:g} seconds")
        total = math.floor(last) - first + 1
        metadata = VideoMetadata(
            total_num_frames=total,
            fps=fps,
            duration=total / fps,
            width=stream.width,
            height=stream.height,
            video_backend="pyav",
        )
        return metadata, first


def _decode(av, file: Any, metadata: VideoMetadata, first: int) -> np.ndarray:
    """The frames that are on screen at the chosen times: by their time stamps, as rates may vary within a file."""
    frames: list[np.ndarray] = []
    shown = None
    wanted = iter(first + index for index in metadata.frames_indices)
    index = next(wanted, None)
    for position, frame in _numbered_frames(av, file, metadata.fps, first):
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


def _numbered_frames(av, file: Any, fps: float, first: int) -> Iterator[tuple[int, Any]]:
    """Yields frames and their numbers by time, from a key frame before number `first` on if a search finds it."""
    for search in (True, False) if first else (False,):
        with _opened(av, file) as container:
            stream = container.streams.video[0]
            start = None
            if search and stream.start_time is not None:
                start = float(stream.start_time * stream.time_base)
                container.seek(int((start + first / fps) / stream.time_base), stream=stream)
            found = False
            for count, frame in enumerate(container.decode(stream)):
                if start is None:
                    start = frame.time
                number = count if frame.time is None or start is None else round((frame.time - start) * fps)
                if search and not found and (number > first or frame.time is None):
                    break  # it went too far
                found = True
                yield number, frame
            if found:
                return


def _to_array(frame) -> np.ndarray:
    turns = round(getattr(frame, "rotation", 0) / 90)  # counter-clockwise: how a phone was held
    return np.rot90(frame.to_ndarray(format="rgb24"), turns)


def _opened(av, file: Any):
    if not isinstance(file, str):
        file.seek(0)
    return av.open(file)
