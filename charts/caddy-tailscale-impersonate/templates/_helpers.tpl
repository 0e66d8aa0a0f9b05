{{/* SPDX-License-Identifier: Apache-2.0 */}}

{{/* The name of most objects, and of the tailnet nodes. Kubernetes adds a number, and a hash to a label. */}}
{{- define "proxy.fullname" -}}
{{- default .Release.Name .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "proxy.serviceAccount" -}}
{{- default (include "proxy.fullname" .) .Values.serviceAccount.name -}}
{{- end }}

{{- define "proxy.clusterRole" -}}
{{- default (printf "%s-%s" .Release.Namespace (include "proxy.fullname" .)) .Values.rbac.name -}}
{{- end }}

{{- define "proxy.authSecret" -}}
{{- default (printf "%s-auth" (include "proxy.fullname" .)) .Values.auth.existingSecret -}}
{{- end }}

{{- define "proxy.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- end -}}
{{- end }}

{{/* The labels by which objects find the replicas. They never change. */}}
{{- define "proxy.selectorLabels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* The labels that say whose an object is, but for those of the selector. */}}
{{- define "proxy.commonLabels" -}}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "proxy.labels" -}}
{{ include "proxy.selectorLabels" . }}
{{ include "proxy.commonLabels" . }}
{{- end }}

{{/* The environment that the Caddyfile expects. */}}
{{- define "proxy.env" -}}
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
- name: TAILNET
  value: {{ .Values.tailscale.tailnet }}
# Go then collects garbage early enough. The program itself and the kernel's buffers
# need the rest of the limit. Callers share two fifths of this.
- name: GOMEMLIMIT
  value: {{ .Values.goMemLimit }}
{{- end }}

{{- define "proxy.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "proxy.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}
