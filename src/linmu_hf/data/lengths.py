"""How many tokens a row becomes, from its texts and the sizes of its media: nothing is decoded."""

from .formats import MEDIA, Row
from .image import image_size
from .rows import check_row, render
from .video import video_size


def count_tokens(processor, row: Row, number: int = 0) -> int:
    """
    Returns the number of tokens of an encoded row, without decoding its pictures and videos.

    It is exact for Qwen2.5-VL; for NVILA the line breaks between tiles are missing, and each of several images counts
    as if it were the only one. Of a video file the header is read.

    Args:
        processor (`ProcessorMixin`): The processor.
        row (`Mapping`): A row of any shape that [`read_row`] knows.
        number (`int`, *optional*, defaults to 0): The row's number, for errors.

    Raises:
        `ValueError`: The row, or one of its media, cannot be read; names the row.
    """
    row = check_row(row, number, processor)
    total = len(processor.tokenizer(render(processor, row["messages"]))["input_ids"])
    try:
        sizes: dict[str, list[tuple[int, ...]]] = {
            "image": [image_size(image) for image in row["images"]],
            "video": [video_size(video, processor) for video in row["videos"]],
        }
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"row {number}: {error}") from error
    for kind in MEDIA:
        if sizes[kind]:
            total += sum(_count_vision(processor, kind, sizes[kind])) - len(
                sizes[kind]
            )  # one placeholder is in the text
    return total


def _count_vision(processor, kind: str, sizes: list[tuple[int, ...]]) -> list[int]:
    """The tokens of each image or video. Qwen's processor cannot count videos in Transformers before 5.24."""
    settings = processor.video_processor
    if kind == "image" or not hasattr(settings, "get_num_of_video_patches"):
        return getattr(processor._get_num_multimodal_tokens(**{f"{kind}_sizes": sizes}), f"num_{kind}_tokens")
    every = settings.temporal_patch_size  # the last frame is repeated until frames come out even
    whole = [(n + -n % every, height, width) for n, height, width in sizes]
    return [settings.get_num_of_video_patches(*size, {}) // settings.merge_size**2 for size in whole]
