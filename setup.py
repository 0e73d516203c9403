"""Package metadata. Ranges are open here; the exact versions that the tests run with are in requirements/."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="unified-megatron",
    version="0.1.0",
    description="Unified vision-language training on Megatron-Core with task-specific token reduction",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_ext", "megatron_ext.*"]),
    package_data={
        "megatron_ext.analysis": ["published.json"],
        "megatron_ext.conversion": ["*.jinja"],
        "megatron_ext.report": ["templates/*"],
        "megatron_ext.export_hf": ["templates/*"],
    },
    py_modules=["pretrain_unified"],
    install_requires=[
        "megatron-core>=0.16.1,<0.20",
        "torch>=2.6",
        "numpy",
        "scipy",
        "pandas>=2.1",
        "tabulate",
        "packaging",
        "psutil",
        "pyyaml",
        "sentencepiece>=0.2",
        "safetensors",
        "tokenizers>=0.22",
        "transformers>=5.0",
        "pillow",
        "jinja2",
        "matplotlib",
        "tensorboard",
        "tqdm",
        "webdataset>=1.0",
        "braceexpand",
    ],
    extras_require={
        "dali": ["nvidia-dali-cuda130>=2.0"],
        # Newer libraries of Transformer Engine do not load with the cuBLAS of torch's wheels for CUDA 13.0; older ones
        # have no attention for packed documents (docs/installation.md).
        "gpu": ["transformer-engine[pytorch]>=2.11,<2.13", "nvidia-dali-cuda130>=2.0"],
        "gpu-cuda12": ["transformer-engine[pytorch]>=2.11,<2.13", "nvidia-dali-cuda120>=2.0"],
        "wandb": ["wandb"],
        "object-store": ["boto3", "multi-storage-client"],
        # Its ft_launcher may start runs (docs/cluster.md); nothing here imports it. Newer ones need glibc 2.39.
        "resilience": ["nvidia-resiliency-ext>=0.4.1"],
        "dev": ["pytest", "ruff", "scikit-learn", "torchmetrics", "triton"],
    },
)
