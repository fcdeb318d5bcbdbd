"""Package metadata and dependencies. Tool settings are in pyproject.toml, exact versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# Upper bounds are tight where the project reaches below a library's public API
# (torch: attention kernels; transformers: attention interface; trl: PPO, removed in 1.13).
DEPENDENCIES = [
    "torch>=2.13,<2.14",
    "transformers>=5.23,<5.24",
    "trl>=1.8,<1.13",
    "peft>=0.21,<0.22",
    "accelerate>=1.15,<2",
    "datasets>=5.2,<6",
    "evaluate>=0.4.6,<0.5",
    "safetensors>=0.8,<0.9",
    "gguf>=0.19,<0.20",
    "numpy>=2.4,<3",
    "scipy>=1.17,<2",
    "scikit-learn>=1.9,<2",
    "pandas>=3.1,<4",
    "pyarrow>=26,<27",
    "pydantic>=2.14,<3",
    "pyyaml>=6,<7",
    "jsonargparse>=4.53,<5",
    "httpx2>=2.16,<3",
    "openai>=3.54,<4",
    "tenacity>=9.2,<10",
    "jinja2>=3.1,<4",
    "matplotlib>=3.11,<4",
    "rich>=15,<16",
    "if-verifiable>=0.1.2,<0.2",
]

EXTRAS = {
    "flash": ["flash-attn>=2.8,<3"],
    "serve": ["fastapi>=0.165,<1", "uvicorn>=0.54,<1"],
    "ray": ["ray>=2.50,<3"],
    "bench": ["any2jev>=0.1,<0.2"],  # the nearest peer, to be measured beside
    "dev": [
        "build>=1.6,<2",
        "hypothesis>=6.170,<7",
        "mypy>=2.4,<3",
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17.6,<0.18",
        "setuptools>=77",  # builds the wheel without isolation
    ],
}

setup(
    name="rubric-rm",
    version="0.1.0",
    description="Distilled rubric-conditioned reward models: judge, train, calibrate, audit, and use in RL",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["rubric_data*", "rm*", "policy*", "configs*"]),
    package_data={"": ["*.yaml", "*.txt", "*.jsonl", "*.jsonl.gz", "templates/*", "csrc/*"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["rubric-rm = policy.cli:main"]},
)
