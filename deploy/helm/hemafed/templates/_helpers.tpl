{{/* Name of everything of this release, for one part: "centre" or "hospital". */}}
{{- define "hemafed.name" -}}
{{- $release := .root.Release.Name -}}
{{- if not (contains "hemafed" $release) -}}{{- $release = printf "%s-hemafed" $release -}}{{- end -}}
{{- printf "%s-%s" ($release | trunc 50 | trimSuffix "-") .part -}}
{{- end -}}

{{/* By what a part's pods are found; never changes within a release. */}}
{{- define "hemafed.selector" -}}
app.kubernetes.io/name: hemafed
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end -}}

{{- define "hemafed.labels" -}}
{{ include "hemafed.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "hemafed.image" -}}
{{- $image := (index .root.Values .part).image -}}
{{- printf "%s:%s" $image.repository (default .root.Chart.AppVersion $image.tag) | quote -}}
{{- end -}}

{{/* Of every container: no rights, nothing to write but its volumes. */}}
{{- define "hemafed.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
