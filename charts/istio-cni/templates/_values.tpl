{{/*
The values that hold, as JSON. Later wins:
  the defaults; the profile; the compatibility version; the platform; the values without prefix; those below `cni`.
What somebody wrote for this release thus always wins over a file of the chart.
*/}}
{{- define "istio-cni.values" -}}
{{- if hasKey .Values "defaults" }}
{{- fail "istio-cni: `defaults` is not a value. Drop the prefix: `defaults.ambient.enabled` is `ambient.enabled`" }}
{{- end }}
{{- $values := .Files.Get "files/own-values.yaml" | fromYaml }}
{{- include "istio-cni.overlay" (dict "on" $values "by" (.Values._internal_defaults_do_not_set | toJson | fromJson)) }}
{{- $plain := omit .Values "_internal_defaults_do_not_set" "cni" | toJson | fromJson }}
{{- $prefixed := .Values.cni | default dict | toJson | fromJson }}
{{- $asked := deepCopy $values }}
{{- include "istio-cni.overlay" (dict "on" $asked "by" (deepCopy $plain)) }}
{{- include "istio-cni.overlay" (dict "on" $asked "by" (deepCopy $prefixed)) }}
{{- range $kind, $prefix := dict "1 profile" "" "2 compatibilityVersion" "compatibility-version-" "3 platform" "platform-" }}
{{- $key := substr 2 -1 $kind }}
{{- $name := get $asked $key | default (get $asked.global $key) }}
{{- with $name }}
{{- $text := $.Files.Get (printf "files/profile-%s%v.yaml" $prefix .) }}
{{- if not $text }}
{{- include "istio-cni.unknown" (dict "files" $.Files "key" $key "prefix" $prefix "name" .) }}
{{- end }}
{{- include "istio-cni.overlay" (dict "on" $values "by" (fromYaml $text)) }}
{{- end }}
{{- end }}
{{- include "istio-cni.overlay" (dict "on" $values "by" $plain) }}
{{- include "istio-cni.overlay" (dict "on" $values "by" $prefixed) }}
{{- include "istio-cni.check" $values }}
{{- toJson $values }}
{{- end }}

{{/*
Puts the map `by` over the map `on`, in place. Unlike mergeOverwrite it knows false, 0, "" and [] from nothing said.
A null says nothing, but over a list: that it empties.
*/}}
{{- define "istio-cni.overlay" -}}
{{- range $key, $value := .by }}
{{- $old := get $.on $key }}
{{- if and (kindIs "map" $value) (kindIs "map" $old) }}
{{- include "istio-cni.overlay" (dict "on" $old "by" $value) }}
{{- else if not (kindIs "invalid" $value) }}
{{- $_ := set $.on $key $value }}
{{- else if kindIs "slice" $old }}
{{- $_ := set $.on $key list }}
{{- end }}
{{- end }}
{{- end }}

{{/* Fails with the names that there are. */}}
{{- define "istio-cni.unknown" -}}
{{- $known := list }}
{{- range $path, $_ := .files.Glob "files/profile-*.yaml" }}
{{- $name := $path | trimPrefix "files/profile-" | trimSuffix ".yaml" }}
{{- if hasPrefix $.prefix $name }}
{{- $known = append $known (trimPrefix $.prefix $name) }}
{{- end }}
{{- end }}
{{- fail (printf "istio-cni: unknown %s %q; there are: %s" .key (toString .name) ($known | sortAlpha | join ", ")) }}
{{- end }}

{{/* What no schema can say: values that do not go together. */}}
{{- define "istio-cni.check" -}}
{{- $modes := list }}
{{- range list "repairPods" "deletePods" "labelPods" }}
{{- if get $.repair . }}
{{- $modes = append $modes (printf "repair.%s" .) }}
{{- end }}
{{- end }}
{{- if and .repair.enabled (gt (len $modes) 1) }}
{{- fail (printf "istio-cni: %s are true, but the agent does one of them: set the others to false (repair.repairPods is true by default)" (join " and " $modes)) }}
{{- end }}
{{- $rolling := .updateStrategy.rollingUpdate | default dict }}
{{- if eq (.updateStrategy.type | default "RollingUpdate") "RollingUpdate" }}
{{- if and (has (toString $rolling.maxSurge) (list "" "0" "0%" "<nil>")) (has (toString $rolling.maxUnavailable) (list "" "0" "0%")) }}
{{- fail "istio-cni: updateStrategy.rollingUpdate: one of maxUnavailable and maxSurge must be above 0" }}
{{- end }}
{{- if not (or (has (toString $rolling.maxSurge) (list "" "0" "0%" "<nil>")) (has (toString $rolling.maxUnavailable) (list "" "0" "0%" "<nil>"))) }}
{{- fail "istio-cni: updateStrategy.rollingUpdate: with maxSurge, maxUnavailable must be 0 (it is 1 by default)" }}
{{- end }}
{{- end }}
{{- end }}
