# The server on a CPU. Build: docker build -t metal-candle .
# Run with keys:  docker run -p 8080:8080 -v ./keys.toml:/etc/metal-candle/keys.toml:ro -v ./models:/models:ro \
#                     metal-candle serve --host 0.0.0.0 --api-key-file /etc/metal-candle/keys.toml --model /models/NAME
FROM rust:1.95-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --release --locked --package metal-candle-cli

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 metal-candle
COPY --from=build /source/target/release/metal-candle /usr/local/bin/metal-candle
COPY LICENSE /usr/share/doc/metal-candle/LICENSE
USER metal-candle
WORKDIR /home/metal-candle
EXPOSE 8080
# 200 while the server answers, 503 while it shuts down; no key is needed
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD curl --fail --silent --output /dev/null http://127.0.0.1:8080/health || exit 1
ENTRYPOINT ["metal-candle"]
CMD ["serve", "--host", "0.0.0.0", "--api-key-file", "/etc/metal-candle/keys.toml"]
