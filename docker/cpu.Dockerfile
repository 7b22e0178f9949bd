# docker build -f docker/cpu.Dockerfile -t hstu:cpu .
# docker run --rm -it -v "$PWD/runs:/hstu/runs" hstu:cpu make demo
FROM python:3.11-slim

RUN apt-get update \
 && apt-get install --yes --no-install-recommends make \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /hstu

# To pull the small CPU build of torch, give pip its index here: --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL

# The environment first: it is built again only when a pin changes.
COPY Makefile ./
COPY requirements requirements
RUN PIP_NO_CACHE_DIR=1 make .venv/.requirements

COPY . .
# The copied pins may be newer than the environment above, but are those that it was made of.
RUN touch .venv/.requirements && make venv
ENV PATH=/hstu/.venv/bin:$PATH
CMD ["python", "-m", "hstu.cli.env"]
