# metadyn with JAX for CUDA (the host provides the driver: docker run --gpus all), or for TPUs with
# --build-arg EXTRA=tpu. experiments/launch/ explains how several containers make one run.
FROM python:3.12-slim
WORKDIR /metadyn
ARG EXTRA=cuda
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY metadyn metadyn
COPY experiments experiments
RUN pip install --no-cache-dir -e ".[$EXTRA]" -c constraints.txt
VOLUME /metadyn/runs
ENTRYPOINT ["metadyn"]
CMD ["devices"]
