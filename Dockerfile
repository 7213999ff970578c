# metadyn with JAX's CUDA wheels; the driver comes from the host (docker run --gpus all).
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
WORKDIR /metadyn
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY metadyn metadyn
COPY experiments experiments
RUN pip install --no-cache-dir -e '.[cuda]' -c constraints.txt
VOLUME /metadyn/runs
ENTRYPOINT ["metadyn"]
CMD ["devices"]
