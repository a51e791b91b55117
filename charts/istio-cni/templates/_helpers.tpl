{{/* Labels of every object. */}}
{{- define "istio-cni.labels" -}}
app: istio-cni
{{ include "istio-cni.common-labels" . }}
{{- end }}

{{/* Takes the root context with `Cni`, the values that hold. */}}
{{- define "istio-cni.common-labels" -}}
release: {{ .Release.Name | quote }}
istio.io/rev: {{ .Cni.revision | default "default" | quote }}
install.operator.istio.io/owning-resource: {{ .Cni.ownerName | default "unknown" | quote }}
operator.istio.io/component: Cni
{{ include "istio-cni.app-labels" . }}
{{- end }}

{{- define "istio-cni.app-labels" -}}
app.kubernetes.io/name: istio-cni
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/part-of: istio
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "cni-%s" .Chart.Version | replace "+" "_" | quote }}
{{- end }}

{{/* Whether objects of that scope, `cluster` or `namespace`, are to be made: `yes` or nothing. */}}
{{- define "istio-cni.makes" -}}
{{- if has .values.global.resourceScope (list "all" .scope) }}yes{{ end }}
{{- end }}

{{/* A scalar as the text that a variable holds; large numbers stay numbers. */}}
{{- define "istio-cni.text" -}}
{{- if kindIs "string" . }}{{ . }}{{ else if not (kindIs "invalid" .) }}{{ toJson . }}{{ end }}
{{- end }}

{{- define "istio-cni.tag" -}}
{{- include "istio-cni.text" (.tag | default .global.tag) }}
{{- end }}

{{/* The reference of the image. */}}
{{- define "istio-cni.image" -}}
{{- $whole := regexMatch "[/:@]" .image }}
{{- $hub := .hub | default .global.hub }}
{{- $tag := include "istio-cni.tag" . }}
{{- $reference := .image }}
{{- if not $whole }}
{{- if not (and $hub (or $tag .digest)) }}
{{- fail "istio-cni: which image? Give `image` as a whole reference, such as registry.example/meshcni/install-cni@sha256:…, or `hub` with `tag` or `digest` (or global.hub and global.tag)" }}
{{- end }}
{{- $reference = printf "%s/%s" (trimSuffix "/" $hub) (.image | default "install-cni") }}
{{- with $tag }}
{{- $reference = printf "%s:%s" $reference . }}
{{- $variant := $.variant | default $.global.variant }}
{{- if and $variant (not (hasSuffix (printf "-%s" $variant) .)) }}
{{- $reference = printf "%s-%s" $reference $variant }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .digest (contains "@" $reference) (not (hasSuffix (printf "@%s" .digest) $reference)) }}
{{- fail (printf "istio-cni: digest %s is not the one in the image reference %s; give one of them" .digest $reference) }}
{{- end }}
{{- if and .digest (not (contains "@" $reference)) }}
{{- $reference = printf "%s@%s" $reference .digest }}
{{- end }}
{{- $reference }}
{{- end }}

{{/* The ConfigMap's data, as YAML with sorted keys; what the pods are restarted for. */}}
{{- define "istio-cni.config" -}}
{{- $v := .Cni }}
{{- $data := dict
  "CURRENT_AGENT_VERSION" (include "istio-cni.tag" $v | default .Chart.AppVersion)
  "AMBIENT_ENABLED" $v.ambient.enabled
  "AMBIENT_DNS_CAPTURE" $v.ambient.dnsCapture
  "AMBIENT_IPV6" $v.ambient.ipv6
  "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP" $v.ambient.reconcileIptablesOnStartup
  "ENABLE_AMBIENT_DETECTION_RETRY" $v.ambient.enableAmbientDetectionRetry
  "ISTIO_OWNED_CNI_CONFIG" $v.istioOwnedCNIConfig
  "CHAINED_CNI_PLUGIN" $v.chained
  "EXCLUDE_NAMESPACES" (join "," $v.excludeNamespaces)
  "REPAIR_ENABLED" $v.repair.enabled
  "REPAIR_LABEL_PODS" $v.repair.labelPods
  "REPAIR_DELETE_PODS" $v.repair.deletePods
  "REPAIR_REPAIR_PODS" $v.repair.repairPods
  "REPAIR_INIT_CONTAINER_NAME" $v.repair.initContainerName
  "REPAIR_BROKEN_POD_LABEL_KEY" $v.repair.brokenPodLabelKey
  "REPAIR_BROKEN_POD_LABEL_VALUE" $v.repair.brokenPodLabelValue
  "NATIVE_NFTABLES" $v.global.nativeNftables
}}
{{- $_ := set $data "AMBIENT_ENABLEMENT_SELECTOR" ($v.ambient.enablementSelectors | default list | toYaml) }}
{{- with $v.cniConfFileName }}
{{- $_ := set $data "CNI_CONF_NAME" . }}
{{- end }}
{{- with $v.istioOwnedCNIConfigFileName }}
{{- $_ := set $data "ISTIO_OWNED_CNI_CONFIG_FILENAME" . }}
{{- /* Istio's chart writes this one, which its agent does not read. Ours reads both. */}}
{{- $_ := set $data "ISTIO_OWNED_CNI_CONF_FILENAME" . }}
{{- end }}
{{- include "istio-cni.own-config" (dict "data" $data "values" $v) }}
{{- range $name, $value := $data }}
{{- $_ := set $data $name (include "istio-cni.text" $value) }}
{{- end }}
{{- range $name, $value := $v.env }}
{{- $_ := set $data $name (include "istio-cni.text" $value) }}
{{- end }}
{{- toYaml $data }}
{{- end }}

{{/* Settings that only our agent has, where they differ from its defaults. */}}
{{- define "istio-cni.own-config" -}}
{{- $v := .values }}
{{- if ne $v.sidecarReconcile "heal" }}
{{- $_ := set .data "SIDECAR_RECONCILE" $v.sidecarReconcile }}
{{- end }}
{{- if $v.disableSafeUpgrade }}
{{- $_ := set .data "DISABLE_SAFE_UPGRADE" true }}
{{- /* Istio's own agent has this one, for ambient mode. */}}
{{- $_ := set .data "AMBIENT_DISABLE_SAFE_UPGRADE" true }}
{{- end }}
{{- if $v.uninstallRemovesBinary }}
{{- $_ := set .data "UNINSTALL_REMOVES_BINARY" true }}
{{- end }}
{{- if $v.ambient.unenrollOnUninstall }}
{{- $_ := set .data "AMBIENT_UNENROLL_ON_UNINSTALL" true }}
{{- end }}
{{- if ne (int $v.healthPort) 8000 }}
{{- $_ := set .data "HEALTH_PORT" (int $v.healthPort) }}
{{- end }}
{{- if ne (int $v.monitoringPort) 15014 }}
{{- $_ := set .data "MONITORING_PORT" (int $v.monitoringPort) }}
{{- end }}
{{- $grace := int $v.terminationGracePeriodSeconds }}
{{- if lt $grace 30 }}
{{- /* The agent must be done before the kill: 25 of 30 seconds, and in proportion. */}}
{{- $_ := set .data "SHUTDOWN_GRACE_SECONDS" (max 1 (div (mul $grace 5) 6)) }}
{{- end }}
{{- end }}
