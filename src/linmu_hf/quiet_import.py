"""
Imported first: loads Transformers' models, and with them torchao where it is installed, without torchao's complaints.

Transformers imports torchao for a quantizer whether or not anything is quantized, and torchao then logs which of its
CUDA extensions do not load and which calls of PyTorch it still makes. Everything else that is logged stays.
"""

import logging


COMPLAINTS = {
    "torchao": "Failed to load",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
}


def keep(record: logging.LogRecord) -> bool:
    """Returns whether to keep a log record: all but torchao's complaints."""
    return COMPLAINTS[record.name] not in record.getMessage()


for name in COMPLAINTS:
    logging.getLogger(name).addFilter(keep)
try:
    import transformers.modeling_utils  # noqa: F401
finally:
    for name in COMPLAINTS:
        logging.getLogger(name).removeFilter(keep)
