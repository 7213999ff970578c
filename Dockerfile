# metadyn with JAX for CUDA (the driver comes from the host: docker run --gpus all), or by
# --build-arg EXTRA=tpu for TPUs. experiments/launch/ says how several of it make one run.
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
