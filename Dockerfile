# docker build -t dejavu . && docker run --rm -p 8888:8888 -v "$PWD/runs:/dejavu/runs" dejavu
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 reader \
    && install --directory --owner=reader /dejavu
USER reader
WORKDIR /dejavu

# First what changes seldom: the packages.
COPY --chown=reader Makefile pyproject.toml requirements.lock ./
RUN make .venv/.installed

COPY --chown=reader . .

EXPOSE 8888
CMD [".venv/bin/python", "-m", "jupyterlab", "--ip=0.0.0.0", "--no-browser", \
     "--ServerApp.root_dir=/dejavu", "--LabApp.default_url=/lab/tree/notebooks"]
