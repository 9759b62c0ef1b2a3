"""Ask a LinMU model about an image through `pipeline`.

python examples/ask.py MODEL IMAGE "row 2 column 3?"
"""

import sys

from PIL import Image
from transformers import pipeline

import linmu_hf  # noqa: F401  (registers the classes)


def main(model: str, image: str, question: str) -> None:
    ask = pipeline("image-text-to-text", model=model)
    picture = {"type": "image", "image": Image.open(image)}
    message = {"role": "user", "content": [picture, {"type": "text", "text": question}]}
    (answer,) = ask(text=[message], max_new_tokens=64, return_full_text=False)
    print(answer["generated_text"])


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
