"""The real SGLang server on a machine without a GPU.

SGLang publishes no CPU wheel. Its ordinary one runs on CPU with torch's own attention
(`--device cpu --attention-backend torch_native`), once what only CUDA has is absent or declared.
`build` makes such an environment. To start the server in it:

    SGLANG_USE_CPU_ENGINE=1 python -m sglang.launch_server --model-path MODEL --device cpu
        --attention-backend torch_native --max-total-tokens 65536 --host 127.0.0.1 --port PORT
"""

import glob
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

# What the server imports. SGLang itself comes without its dependencies: they are a CUDA torch and gigabytes of kernels.
# torch stands in the same command, so that no dependency can bring another one.
# fmt: off
NEEDED = [
    "torch==2.13.0", "transformers==5.19.0", "tokenizers==0.23.2", "xgrammar==0.2.7", "apache-tvm-ffi==0.1.11",
    "compressed-tensors==0.18.0", "openai==2.8.0", "openai-harmony==0.0.4", "outlines==0.1.11",
    "sentencepiece==0.2.1", "soundfile==0.13.1", "llguidance>=1.7.6,<2", "mistral_common>=1.11.5",
    "python-dateutil<3", "uvicorn>=0.51",
    "aiohttp", "anthropic", "datasets", "distro", "einops", "fastapi", "gguf", "interegular", "IPython", "msgspec",
    "ninja", "numpy", "orjson", "packaging", "partial_json_parser", "pillow", "prometheus-client", "psutil",
    "pybase64", "pydantic", "python-multipart", "pyzmq", "regex", "requests", "scipy", "setproctitle", "tiktoken",
    "tqdm", "uvloop", "watchfiles", "xxhash", "zstandard",
]
# fmt: on
WITHOUT_DEPENDENCIES = ["sglang==0.5.23", "torchvision==0.29.1"]
KERNELS = "sglang-kernel==0.4.10"

# torchvision's extension is built for another torch and does not load; its import then misses these two operators.
DECLARED_OPERATORS = """

for _name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

# SGLang imports, by name, kernels that only sglang-kernel's CPU build has. The model under test calls none of them.
ABSENT_KERNELS = """

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} is not in this build")

    return absent
"""


def build(folder: Path) -> None:
    """Make `folder` a virtual environment in which SGLang serves on CPU: some 2 minutes, 3.1 GB."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    _pip(python, "install", *NEEDED)
    _pip(python, "install", "--no-deps", *WITHOUT_DEPENDENCIES)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip())
    _append(site / "torchvision" / "extension.py", DECLARED_OPERATORS)
    _kernels_without_cuda(python, site)


def clean_shared_memory() -> None:
    """Remove what killed SGLang servers leave in shared memory: call it only while none of them runs."""
    for pattern in ("sglang_loads_*", "sgl_shm_mq_*"):
        for path in glob.glob(f"/dev/shm/{pattern}"):
            Path(path).unlink(missing_ok=True)


def _kernels_without_cuda(python: Path, site: Path) -> None:
    """Unpack only the Python files of the kernels' wheel: its libraries are 1.2 GB and need CUDA to load."""
    with tempfile.TemporaryDirectory() as scratch:
        _pip(python, "download", "--no-deps", "--only-binary", ":all:", "--dest", scratch, KERNELS)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            keep = [n for n in archive.namelist() if n.startswith(("sgl_kernel/", "sglang_kernel-"))]
            archive.extractall(site, [n for n in keep if not n.endswith(".so")])
    operators = site / "sgl_kernel" / "sm100" / "common_ops.py"  # where it looks on a machine without a GPU
    operators.parent.mkdir(exist_ok=True)
    operators.write_text("")
    _append(site / "sgl_kernel" / "__init__.py", ABSENT_KERNELS)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _pip(python: Path, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "-qq", "--disable-pip-version-check", *arguments], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
