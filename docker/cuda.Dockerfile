# docker build -f docker/cuda.Dockerfile -t hstu:cuda .
# docker run --rm -it --gpus all --shm-size 8g -v "$PWD/runs:/hstu/runs" hstu:cuda
# The wheels bring the CUDA 13 libraries; the host needs only a driver for them and the container toolkit.
FROM python:3.11-slim

# Triton compiles its launcher with a C compiler at run time.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /hstu

# The large wheels first: they are fetched again only when pyproject.toml changes.
COPY pyproject.toml LICENSE README.md ./
COPY hstu/__init__.py hstu/__init__.py
RUN pip install --no-cache-dir --editable '.[hf,fast,serve,docs,dev]'

COPY . .
CMD ["python", "-m", "hstu.cli.env"]
