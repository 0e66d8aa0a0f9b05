module github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/tools/prometheus-operator

go 1.26.6

require github.com/prometheus-operator/prometheus-operator v0.85.0
