# SPDX-License-Identifier: Apache-2.0
#
# Caddy with this plugin and caddy-tailscale, without root and without file
# capabilities: tsnet listens on the tailnet within the process, so even ports 80
# and 443 need no privilege. Build it from the root of a checkout:
#
#	docker build -f xcaddy.Dockerfile -t caddy-tailscale-impersonate .
#
# The base image is pinned by tag. For production, pin it by digest as well
# (FROM image:tag@sha256:...), with a digest that you have verified.

FROM golang:1.26.8-bookworm AS build

ARG CADDY_VERSION=v2.11.9
# github.com/tailscale/caddy-tailscale has no releases; this is commit 413764819c5e.
ARG CADDY_TAILSCALE_VERSION=v0.0.0-20251225051618-413764819c5e

# 1: with the storage of recordings in S3. Empty or 0: without.
ARG WITH_S3=

ENV CGO_ENABLED=0 GOTOOLCHAIN=local
# xcaddy v0.4.5, with the checksums of all its modules.
COPY lab/tools/xcaddy /tools/xcaddy
RUN cd /tools/xcaddy && go build -o /usr/local/bin/xcaddy github.com/caddyserver/xcaddy/cmd/xcaddy

COPY . /src
RUN if [ "${WITH_S3}" = 0 ]; then WITH_S3=; fi \
	&& xcaddy build ${CADDY_VERSION} \
	--with github.com/tailscale/caddy-tailscale@${CADDY_TAILSCALE_VERSION} \
	--with github.com/tailscale-impersonate/caddy-tailscale-impersonate@v0.0.0=/src \
	${WITH_S3:+--with github.com/tailscale-impersonate/caddy-tailscale-impersonate/s3@v0.0.0=/src/s3} \
	--output /out/usr/bin/caddy
# Fails if Caddy does not start or lacks a module.
RUN /out/usr/bin/caddy list-modules > /tmp/modules \
	&& grep -qx http.handlers.tailscale_impersonate /tmp/modules \
	&& grep -qx http.reverse_proxy.transport.kubernetes /tmp/modules \
	&& grep -qx tailscale /tmp/modules \
	&& case "${WITH_S3}" in ""|0) ;; *) grep -qx tailscale_impersonate.recordings.s3 /tmp/modules ;; esac
RUN mkdir -p /out/etc/caddy /out/data/config

# Only Caddy: no shell and no user database that an attacker could use. Caddy has the
# certificates of public authorities within itself. A file that you mount at
# /etc/ssl/certs/ca-certificates.crt replaces them.
FROM scratch

COPY --from=build /out/usr/bin/caddy /usr/bin/caddy
COPY --from=build /out/etc/caddy /etc/caddy
COPY --from=build --chown=65532:65532 /out/data /data

# Caddy's storage and the tailnet nodes' state. Keep this volume: without the state,
# nodes join as new ones with every start.
ENV XDG_CONFIG_HOME=/data/config XDG_DATA_HOME=/data
VOLUME /data

USER 65532:65532
WORKDIR /data
ENTRYPOINT ["/usr/bin/caddy"]
CMD ["run", "--config", "/etc/caddy/Caddyfile", "--adapter", "caddyfile"]
