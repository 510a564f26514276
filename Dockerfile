# The server on CPUs: docker build -t mtpf . && docker run --rm -p 8080:8080 -v "$PWD/apps:/apps:ro" mtpf \
#     --backbone packaged --adapter /apps/intent
FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY modeling_mtpf modeling_mtpf
COPY hub_cards hub_cards
COPY train/recipes train/recipes
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt \
        --index-url https://download.pytorch.org/whl/cpu torch \
    && /venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[serve,onnx,demo]' \
    && find /venv -name __pycache__ -prune -exec rm -r {} +

FROM python:3.11-slim
COPY --from=build /venv /venv
RUN useradd --system --create-home mtpf
USER mtpf
WORKDIR /home/mtpf
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8080
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8080/ready', timeout=3)"]
# Inside a container all addresses are meant: what the outside sees is decided by -p.
ENTRYPOINT ["mtpf", "serve", "--host", "0.0.0.0", "--port", "8080"]
CMD ["--help"]
