"""Where adapters go: the linear maps of the decoder, by kind, as a pattern for PEFT."""

_SCANS = r"(forward|reverse)_scan"
LORA_PARTS = {
    "mlp": r"mlp\.(gate|up|down)_proj",
    "flex_ma": rf"mixer\.flex_ma\.(x_proj|o_proj|{_SCANS}\.[bc]_proj)",
    "local_swin": r"mixer\.local_swin\.[qkvo]_proj",
    "attention": r"mixer\.[qkvo]_proj",
    "gates": rf"mixer\.((text_)?fusion_proj|flex_ma\.(gate_proj|{_SCANS}\.dt_proj))",
}
_DEFAULT = ("mlp", "flex_ma", "local_swin", "attention")


def lora_targets(*parts: str) -> str:
    """
    Returns a regular expression for `LoraConfig(target_modules=...)` that leaves the vision tower alone.

    PEFT's own `"all-linear"`, and lists such as `["gate_proj", "up_proj"]`, also reach into the vision tower, whose
    feed-forward layers have the same names.

    Args:
        parts (`str`, *optional*): Kinds of linear maps; all but the gates by default. `"mlp"`; `"flex_ma"` (x, B, C
            and output); `"local_swin"` (q, k, v and output); `"attention"` (layers of a hybrid that keep full
            attention); `"gates"` (step sizes, direction gate, fusion weight: small maps, train them whole instead).

    Returns:
        `str`: matches the full names of these modules in every LinMU model.

    Raises:
        `ValueError`: An unknown part.
    """
    unknown = sorted(set(parts) - set(LORA_PARTS))
    if unknown:
        raise ValueError(f"lora_targets has no parts {unknown}; choose out of {sorted(LORA_PARTS)}")
    return rf"(.*\.)?layers\.\d+\.({'|'.join(LORA_PARTS[part] for part in parts or _DEFAULT)})"
