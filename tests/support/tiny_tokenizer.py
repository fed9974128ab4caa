"""A small byte-level BPE tokenizer with a chat template, trained on Python's own library in a second."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tokenizer() -> Tokenizer:
    """The tokenizer: 1,024 tokens of vocabulary, all bytes among them."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library = Path(sysconfig.get_path("stdlib"))
    made.train([str(library / name) for name in ("argparse.py", "inspect.py", "typing.py")], trainer)
    return made


def rendered(payload: dict[str, Any]) -> str:
    """The prompt of a payload."""
    if "messages" not in payload:
        return str(payload["prompt"])
    turns = [f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in payload["messages"]]
    return "".join(turns) + "<|im_start|>assistant\n"


def count(payload: dict[str, Any]) -> int:
    """Tokens of a payload's prompt."""
    return len(tokenizer().encode(rendered(payload)))


def save(folder: Path) -> Path:
    """A model's folder, as far as its tokenizer goes."""
    folder.mkdir()
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
