{{- define "egret.image" -}}
{{- with .Values.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end -}}
{{- end -}}

{{- /* The file of options of a command: the guide's under its own names, then whatever else was given. A key of
agent.config or crdsync.config that a value of its own sets would leave open which of both counts; at another
status-address the kubelet's probes would ask nobody. */ -}}
{{- define "egret.config.agent" -}}
{{- include "egret.twice" (dict "config" .Values.agent.config "at" "agent.config" "own" (concat (list "status-address" "egress" "nat-log" "egress.exceptCIDRs" "egress.snatFullyRandomPorts" "cluster-cidrs" "etcd-prefix" "endpoints" "insecure") (include "egret.metrics.options" . | fromJsonArray))) -}}
egress:
  exceptCIDRs: {{ toJson .Values.egress.exceptCIDRs }}
  snatFullyRandomPorts: {{ .Values.egress.snatFullyRandomPorts }}
{{- with .Values.clusterCIDRs }}
cluster-cidrs: {{ toJson . }}
{{- end }}
{{- if .Values.agent.natLog.enabled }}
nat-log: {{ if .Values.agent.natLog.hostPath }}/var/log/egret/nat.log{{ else }}"-"{{ end }}
{{- end }}
{{- with .Values.agent.config }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Where the log of connections is a file; empty: it is off, or goes to the standard output. */ -}}
{{- define "egret.natLog.hostPath" -}}
{{- if .Values.agent.natLog.enabled }}{{ .Values.agent.natLog.hostPath }}{{ end -}}
{{- end -}}

{{- define "egret.config.crdsync" -}}
{{- include "egret.twice" (dict "config" .Values.crdsync.config "at" "crdsync.config" "own" (concat (list "status-address" "egress" "egress.maxEgressIPsPerNode" "cluster-cidrs" "webhook" "webhook-address" "startup-taint" "etcd-prefix" "endpoints" "insecure") (include "egret.metrics.options" . | fromJsonArray))) -}}
egress:
  maxEgressIPsPerNode: {{ .Values.egress.maxEgressIPsPerNode }}
{{- with .Values.startupTaint }}
startup-taint: {{ . }}
{{- end }}
{{- with .Values.clusterCIDRs }}
cluster-cidrs: {{ toJson . }}
{{- end }}
{{- with .Values.crdsync.config }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* Whether there is a status page that asks agents, for what passes by egress IPs and what kernels have; empty: there is not. */ -}}
{{- define "egret.page.agents" -}}
{{- if and .Values.metrics.enabled (or .Values.page.secret (index .Values.crdsync.config "page-local-address")) }}true{{ end -}}
{{- end -}}

{{- /* The options that metrics.enabled gives, as JSON. */ -}}
{{- define "egret.metrics.options" -}}
{{- if .Values.metrics.enabled -}}
["metrics-address", "metrics-cert-file", "metrics-key-file", "metrics-client-ca-file", "agents-port", "agents-ca-file", "agents-cert-file", "agents-key-file", "agents-server-name"]
{{- else -}}
[]
{{- end -}}
{{- end -}}

{{- /* The arguments and the variable by which a daemon serves metrics at the address of its node: brackets are right for both families. */ -}}
{{- define "egret.metrics.args" -}}
- --metrics-address=[$(HOST_IP)]:{{ .port }}
- --metrics-cert-file=/etc/egret/metrics/tls.crt
- --metrics-key-file=/etc/egret/metrics/tls.key
- --metrics-client-ca-file=/etc/egret/metrics/ca.crt
{{- end -}}

{{- define "egret.metrics.env" -}}
- name: HOST_IP
  valueFrom:
    fieldRef:
      fieldPath: status.hostIP
{{- end -}}

{{- /* Its options are arguments. */ -}}
{{- define "egret.config.cloud" -}}{{- end -}}

{{- define "egret.twice" -}}
{{- range .own -}}
{{- if hasKey $.config . -}}
{{- fail (printf "%s: option %q is the chart's own, or has a value of its own: set that one (see values.yaml)" $.at .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Of the bundled etcd it is its Service, by the variable that the kubelet sets: that takes no cluster DNS. Where it
has an IPv6 address, the programs put it in brackets. The clients learn the members' own addresses from it, and need it
no more. */ -}}
{{- define "egret.etcd.endpoints" -}}
{{- if and .Values.etcd.endpoints .Values.etcd.bundled.enabled -}}
{{- fail "etcd.endpoints: they are those of your own etcd, and etcd.bundled.enabled=true runs another one: want one of both" -}}
{{- end -}}
{{- range .Values.etcd.endpoints -}}
{{- if and $.Values.etcd.tls.enabled (not (hasPrefix "https://" .)) -}}
{{- fail (printf "etcd.endpoints: %s is not https: agents and crdsync do not start with it unless etcd.tls.enabled=false, which is for trials" .) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.etcd.bundled.enabled -}}
{{- required "etcd.endpoints: want the URLs of your etcd's members, like https://10.0.0.1:2379, or etcd.bundled.enabled=true" (join "," .Values.etcd.endpoints) -}}
{{- else -}}
https://$(EGRET_ETCD_SERVICE_HOST):8483
{{- end -}}
{{- end -}}

{{- define "egret.etcd.serverName" -}}
{{- if .Values.etcd.tls.serverName -}}
{{ .Values.etcd.tls.serverName }}
{{- else if .Values.etcd.bundled.enabled -}}
egret-etcd.{{ .Release.Namespace }}.svc
{{- end -}}
{{- end -}}

{{- /* The nodes of the bundled etcd, and of what comes with it. By default the label of the control plane counts with
any value: kubeadm gives it none, k3s and RKE2 "true", which a nodeSelector cannot say. */ -}}
{{- define "egret.etcd.nodes" -}}
nodeAffinity:
  requiredDuringSchedulingIgnoredDuringExecution:
    nodeSelectorTerms:
    - matchExpressions:
      {{- range $key, $value := .nodeSelector }}
      - key: {{ $key }}
        operator: In
        values: [{{ $value | quote }}]
      {{- else }}
      - key: node-role.kubernetes.io/control-plane
        operator: Exists
      {{- end }}
{{- end -}}

{{- /* What an agent needs to get ready is on nodes that wait for it, too. */ -}}
{{- define "egret.tolerations" -}}
{{- with .tolerations }}
{{ toYaml . }}
{{- end }}
{{- with .startupTaint }}
- key: {{ . }}
  operator: Exists
{{- end }}
{{- end -}}

{{- /* What would go wrong in a release that is there. Without a cluster (helm template) nothing is found. Agents are
replaced one after the other: with another etcd, or prefix, those of the former and of the new one would hold the same
IPs. */ -}}
{{- define "egret.upgrade" -}}
{{- with (lookup "v1" "ConfigMap" .Release.Namespace "egret").data -}}
{{- $remedy := "agents of two stores would hold the same IPs: clean the nodes up and uninstall the release before (docs/install.md, Another etcd)" -}}
{{- if and (hasKey . "endpoints") $.Values.etcd.bundled.enabled -}}
{{- fail (printf "etcd.bundled.enabled: this release uses the etcd at %s, and %s" .endpoints $remedy) -}}
{{- else if and (not (hasKey . "endpoints")) (not $.Values.etcd.bundled.enabled) -}}
{{- fail (printf "etcd.endpoints: this release runs an etcd of its own, and %s" $remedy) -}}
{{- else if ne (get . "etcd-prefix") $.Values.etcd.prefix -}}
{{- fail (printf "etcd.prefix: this release has its keys at %s, and %s" (get . "etcd-prefix") $remedy) -}}
{{- end -}}
{{- end -}}
{{- with lookup "v1" "Secret" .Release.Namespace "egret-gossip" -}}
{{- $owner := dig "metadata" "labels" "app.kubernetes.io/managed-by" "" . -}}
{{- if and (eq $owner "Helm") (ne (dig "metadata" "annotations" "helm.sh/resource-policy" "" .) "keep") -}}
{{- $why := "the Secret egret-gossip is of a former version of this chart: Helm would delete it, and agents of two keys do not hear each other" -}}
{{- fail (printf "%s. Have it stay: kubectl -n %s annotate secret egret-gossip helm.sh/resource-policy=keep" $why $.Release.Namespace) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The Secrets that `egret credentials` makes, as JSON; none: it does not run. */ -}}
{{- define "egret.secrets.credentials" -}}
{{- $secrets := list -}}
{{- if or .Values.etcd.bundled.enabled .Values.metrics.enabled (not .Values.gossip.existingSecret) -}}
{{- $secrets = append $secrets "egret-gossip" -}}
{{- end -}}
{{- if .Values.etcd.bundled.enabled -}}
{{- $secrets = concat $secrets (list "egret-etcd-ca" "egret-etcd-server" "egret-etcd-agent" "egret-etcd-crdsync"
  "egret-etcd-cloud" "egret-etcd-operator" "egret-etcd-root") -}}
{{- end -}}
{{- if .Values.metrics.enabled -}}
{{- $secrets = concat $secrets (list "egret-metrics-ca" "egret-metrics-agent" "egret-metrics-crdsync"
  "egret-metrics-operator" "egret-metrics-reader") -}}
{{- end -}}
{{- toJson $secrets -}}
{{- end -}}

{{- define "egret.gossip.secret" -}}
{{ .Values.gossip.existingSecret | default "egret-gossip" }}
{{- end -}}

{{- define "egret.etcd.env" -}}
# What kubectl exec runs here reads these, too, as egret get and egret drain.
- name: ETCDCTL_ENDPOINTS
  {{- if .Values.etcd.bundled.enabled }}
  value: {{ include "egret.etcd.endpoints" . }}
  {{- else }}
  valueFrom:
    configMapKeyRef:
      name: egret
      key: endpoints
  {{- end }}
- name: EGRET_ETCD_PREFIX
  valueFrom:
    configMapKeyRef:
      name: egret
      key: etcd-prefix
{{- if .Values.etcd.tls.enabled }}
- name: ETCDCTL_CACERT
  value: /etc/egret/etcd/ca.crt
- name: ETCDCTL_CERT
  value: /etc/egret/etcd/tls.crt
- name: ETCDCTL_KEY
  value: /etc/egret/etcd/tls.key
{{- with include "egret.etcd.serverName" . }}
- name: EGRET_ETCD_SERVER_NAME
  value: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- /* Pods do not see a ConfigMap's change in their variables and options: with this they are replaced, one after the other. */ -}}
{{- define "egret.checksum" -}}
{{ sha256sum (printf "%s %s %s" (include "egret.etcd.endpoints" .root) .root.Values.etcd.prefix (include .config .root)) }}
{{- end -}}
