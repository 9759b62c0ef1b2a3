"""
Imported first: loads Transformers' models, and with them quantizers where they are installed, without complaints.

Transformers imports torchao whether or not anything is quantized, and torchao then logs which of its CUDA extensions
do not load and which calls of PyTorch it still makes. PEFT imports bitsandbytes, which on some processors misses a
kernel for 4-bit weights. Everything else that is logged stays.
"""

import logging


COMPLAINTS = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def keep(record: logging.LogRecord) -> bool:
    """Returns whether to keep a log record: all but these complaints."""
    return COMPLAINTS[record.name] not in record.getMessage()


for name in COMPLAINTS:
    logging.getLogger(name).addFilter(keep)
try:
    import transformers.modeling_utils  # noqa: F401
finally:
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).removeFilter(keep)
