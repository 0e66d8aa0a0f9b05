{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{/* An argument. The schema refuses backquotes and braces. */}}
{{- define "proxy.argument" -}}
{{- if regexMatch "^[A-Za-z0-9_./:*@+=~-]+$" . -}}
{{ . }}
{{- else -}}
{{ printf "`%s`" . }}
{{- end -}}
{{- end }}

{{/* An option with its arguments: nothing if the value is false or empty. */}}
{{- define "proxy.option" -}}
{{- if kindIs "bool" .value -}}
{{- if .value }}{{ .name }}{{ end -}}
{{- else if kindIs "slice" .value -}}
{{- $arguments := list -}}
{{- range .value }}{{ $arguments = append $arguments (include "proxy.argument" .) }}{{ end -}}
{{- if $arguments }}{{ .name }} {{ join " " $arguments }}{{ end -}}
{{- else if .value -}}
{{ .name }} {{ include "proxy.argument" .value }}
{{- end -}}
{{- end }}

{{/* The option record_to. */}}
{{- define "proxy.recordTo" -}}
{{- include "proxy.option" (dict "name" "record_to" "value" (prepend .arguments .storage)) -}}
{{- $lines := list -}}
{{- range $name, $value := .options -}}
{{- with include "proxy.option" (dict "name" $name "value" $value) }}{{ $lines = append $lines . }}{{ end -}}
{{- end -}}
{{- if $lines }} {
	{{ join "\n\t" $lines }}
}
{{- end -}}
{{- end }}

{{/* The options of tailscale_kubernetes, one a line. */}}
{{- define "proxy.options" -}}
{{- $lines := list -}}
{{- range $name, $value := .Values.options -}}
{{- if hasPrefix "event_body_" $name -}}
{{- else if eq $name "record_to" -}}
{{- if $value.storage }}{{ $lines = append $lines (include "proxy.recordTo" $value) }}{{ end -}}
{{- else -}}
{{- with include "proxy.option" (dict "name" $name "value" $value) }}{{ $lines = append $lines . }}{{ end -}}
{{- end -}}
{{- end -}}
{{- /* Two values are one option, of which the first is the handler's default. */ -}}
{{- with .Values.options -}}
{{- if .event_body_refuse -}}
{{- $lines = append $lines (printf "event_body_limit %s refuse" (default "64KiB" .event_body_limit)) -}}
{{- else if .event_body_limit -}}
{{- $lines = append $lines (printf "event_body_limit %s" .event_body_limit) -}}
{{- end -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end }}

{{- define "proxy.caddyfile" -}}
{{- if .Values.caddyfile.raw -}}
{{ .Values.caddyfile.raw }}
{{- else -}}
# Every replica is a tailnet node of its own, with the name of its pod.
{
	tailscale {
		# The node joins with the key in TS_AUTHKEY. Once its state is here, it no
		# longer needs the key.
		state_dir /data/tailscale
		{{- with .Values.tailscale.controlURL }}
		control_url {{ . }}
		{{- end }}
		{{- with .Values.tailscale.tags }}
		tags {{ join " " . }}
		{{- end }}
		{{- if not .Values.persistence.state.enabled }}
		# The state ends with the pod, and so does the node.
		ephemeral
		{{- end }}
	}
	# Caddy exits after this time, even if a request does not end or a tailnet node
	# does not close.
	grace_period {{ .Values.gracePeriodSeconds }}s
	servers {
		# HTTP/3 is refused: its connections cannot be matched to a tailnet node.
		protocols h1 h2
		# kubectl exec puts its command into the URL. Caddy allows 16 KiB of headers.
		max_header_size 32KiB
		# Otherwise Caddy disconnects a client that reads nothing for a minute, such
		# as a followed log in a pager. What such a client makes the proxy hold is
		# bounded all the same.
		timeouts {
			write_idle 1h
		}
	}
	metrics
	{{- if eq .Values.tls.issuer "internal" }}
	# There is no store of certificates to install the root into.
	skip_install_trust
	# For clients that send no server name, such as kubectl proxy with some kubeconfigs.
	default_sni {$POD_NAME}.{$TAILNET}
	{{- end }}
	{{- with .Values.caddyfile.globalOptions }}
	{{- . | trim | printf "\n%s" | replace "\n" "\n\t" }}
	{{- end }}
}

https://{$POD_NAME}.{$TAILNET} {
	bind tailscale/{$POD_NAME}
	{{- if eq .Values.tls.issuer "internal" }}
	tls internal
	{{- else if eq .Values.tls.issuer "secret" }}
	tls /etc/caddy-tls/tls.crt /etc/caddy-tls/tls.key
	{{- end }}
	{{- with .Values.caddyfile.site }}
	{{- . | trim | printf "\n%s" | replace "\n" "\n\t" }}
	{{- end }}

	tailscale_kubernetes {
		in_cluster
		{{- with include "proxy.options" . }}
		{{- . | printf "\n%s" | replace "\n" "\n\t\t" }}
		{{- end }}
	}
}

# For probes and Prometheus, on the pod's own address. Nothing here reaches the API
# server.
http://:8080 {
	metrics /metrics
	respond /healthz ok
	# The pod is not ready while its node is not on the tailnet, and once Caddy begins
	# to exit.
	handle /readyz {
		@down not tailnet_up
		respond @down "the tailnet node is not connected, or Caddy exits" 503
		respond ok
	}
}
{{- end }}
{{- end }}
