{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{/* What the schema cannot say in a sentence: values that contradict one another. */}}
{{- define "proxy.validate" -}}
{{- $problems := list -}}
{{- $options := .Values.options -}}
{{- if not (or .Values.image.tag .Values.image.digest) -}}
{{- $problems = append $problems "image: give the tag or the digest of the image that you built; none has been published" -}}
{{- end -}}
{{- if and .Values.auth.existingSecret .Values.auth.value -}}
{{- $problems = append $problems "auth: give existingSecret or value, not both" -}}
{{- else if not (or .Values.auth.existingSecret .Values.auth.value) -}}
{{- $problems = append $problems "auth: give existingSecret, the name of a Secret with an auth key or an OAuth client secret, or value" -}}
{{- end -}}
{{- if and (eq .Values.auth.method "oauth") (not .Values.tailscale.tags) -}}
{{- $problems = append $problems "auth.method oauth: needs tailscale.tags, as keys of an OAuth client have tags" -}}
{{- end -}}
{{- if and .Values.auth.preauthorized (ne .Values.auth.method "oauth") -}}
{{- $problems = append $problems "auth.preauthorized: needs auth.method oauth; an auth key says for itself whether its devices need approval" -}}
{{- end -}}
{{- if and (eq .Values.auth.method "oauth") (contains "?" .Values.auth.value) -}}
{{- $problems = append $problems "auth.value: give the client secret without ? and what follows; persistence.state.enabled and auth.preauthorized say that" -}}
{{- end -}}
{{- if and .Values.tailscale.controlURL (eq .Values.tls.issuer "tailscale") -}}
{{- $problems = append $problems "tls.issuer tailscale: only Tailscale's control server issues certificates, so with tailscale.controlURL use internal or secret" -}}
{{- end -}}
{{- if and (eq .Values.tls.issuer "secret") (not .Values.tls.secretName) -}}
{{- $problems = append $problems "tls.issuer secret: needs tls.secretName" -}}
{{- else if and .Values.tls.secretName (ne .Values.tls.issuer "secret") -}}
{{- $problems = append $problems "tls.secretName: needs tls.issuer secret" -}}
{{- end -}}
{{- range $name := list "record_max_size" "record_retention" "record_required" "record_to" "recordings" -}}
{{- if and (get $options $name) (not $options.record) (or (ne $name "record_to") $options.record_to.storage) -}}
{{- $problems = append $problems (printf "options.%s: needs options.record, the directory to record to" $name) -}}
{{- end -}}
{{- end -}}
{{- range $name := list "record_remove_stored" "record_store_within" -}}
{{- if and (get $options $name) (not $options.record_to.storage) -}}
{{- $problems = append $problems (printf "options.%s: needs options.record_to.storage, which gets the recordings" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (or $options.record_to.arguments $options.record_to.options) (not $options.record_to.storage) -}}
{{- $problems = append $problems "options.record_to: needs storage, whose arguments and options it gives" -}}
{{- end -}}
{{- if and $options.recordings (not $options.recordings_readers) -}}
{{- $problems = append $problems "options.recordings: needs options.recordings_readers, the groups whose members may read recordings" -}}
{{- end -}}
{{- if and $options.record (not .Values.persistence.recordings.enabled) -}}
{{- $problems = append $problems "options.record: needs persistence.recordings.enabled, as the root file system is read-only" -}}
{{- end -}}
{{- if and $options.event_body_refuse (has $options.event_body_limit (list "0" "0B")) -}}
{{- $problems = append $problems "options.event_body_limit 0: omits all bodies, so event_body_refuse can refuse none for its length" -}}
{{- end -}}
{{- range $name := list "user_prefix" "device_user_prefix" "group_prefix" -}}
{{- if hasPrefix "system:" (get $options $name) -}}
{{- $problems = append $problems (printf "options.%s: names that start with system: are reserved for the cluster's own components" $name) -}}
{{- end -}}
{{- end -}}
{{- if and (eq $options.client_impersonation "authorize") .Values.rbac.constrained -}}
{{- $problems = append $problems "options.client_impersonation authorize: needs the older verb, which rbac.constrained leaves out" -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- $problems = append $problems "serviceAccount.create false: needs serviceAccount.name" -}}
{{- end -}}
{{- if and .Values.caddyfile.raw (or .Values.caddyfile.globalOptions .Values.caddyfile.site) -}}
{{- $problems = append $problems "caddyfile.raw: is the whole Caddyfile, so globalOptions and site have no place in it" -}}
{{- end -}}
{{- if le (int .Values.terminationGracePeriodSeconds) (int .Values.gracePeriodSeconds) -}}
{{- $problems = append $problems "terminationGracePeriodSeconds: must be more than gracePeriodSeconds, or Kubernetes kills Caddy before it has told its clients" -}}
{{- end -}}
{{- if $problems -}}
{{- fail (printf "\n%s" (join "\n" $problems)) -}}
{{- end -}}
{{- end }}
