package manifests

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const chart = "../charts/egret"

// programs are built once for all tests of the package, with the flags of `make build`, whose compiled packages they
// share.
var programs struct {
	once            sync.Once
	renderer, egret string
	err             error
}

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "egret-manifests-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	programs.renderer, programs.egret = filepath.Join(dir, "render"), filepath.Join(dir, "egret")
	code := m.Run()
	os.RemoveAll(dir) // what stays is in the folder for temporary files
	os.Exit(code)
}

func built(t testing.TB) {
	t.Helper()
	programs.once.Do(func() {
		for dir, args := range map[string][]string{"render": {programs.renderer, "."}, ".": {programs.egret, "../cmd/egret"}} {
			c := exec.Command("go", append([]string{"build", "-C", dir, "-trimpath", "-o"}, args...)...)
			c.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := c.CombinedOutput(); err != nil {
				programs.err = fmt.Errorf("%v: %w\n%s", c.Args, err, out)
			}
		}
	})
	if programs.err != nil {
		t.Fatal(programs.err)
	}
}

func renderer(t testing.TB) string { built(t); return programs.renderer }
func egret(t testing.TB) string    { built(t); return programs.egret }

// render renders the chart with values, as helm template does.
func render(t testing.TB, values string, args ...string) (string, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		t.Fatal(err)
	}
	var out, bad bytes.Buffer
	c := exec.Command(renderer(t), append(args, "-values", file, chart)...)
	c.Stdout, c.Stderr = &out, &bad
	if err := c.Run(); err != nil {
		return "", fmt.Errorf("%w: %s", err, bad.String())
	}
	return out.String(), nil
}

func TestPlainManifestsAreThoseOfTheChart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if out, err := exec.Command(renderer(t), "-values", "values.yaml", "-out", dir, chart).CombinedOutput(); err != nil {
		t.Fatalf("rendering the chart: %v\n%s", err, out)
	}
	for committed, made := range map[string]string{"deploy": dir, filepath.Join(chart, "files", "crds"): "crds"} {
		if d := cmp.Diff(contents(t, made), contents(t, committed)); d != "" {
			t.Errorf("%s is not up to date, run `make generate` (-want +got):\n%s", committed, d)
		}
	}
}

// contents returns the files of a folder by name.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		t.Fatalf("%s: %d files, %v", dir, len(entries), err)
	}
	out := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[e.Name()] = string(b)
	}
	return out
}

// A value that the schema does not know is refused, so one that values.yaml does not list cannot be found by anybody.
func TestEveryValueIsDocumented(t *testing.T) {
	var values map[string]any
	read(t, filepath.Join(chart, "values.yaml"), &values)
	var schema map[string]any
	read(t, filepath.Join(chart, "values.schema.json"), &schema)
	n := 0
	var walk func(path string, schema, values map[string]any)
	walk = func(path string, schema, values map[string]any) {
		properties := schema["properties"].(map[string]any)
		if schema["additionalProperties"] != false {
			t.Errorf("%s: the schema takes names that it does not list", path)
		}
		for name := range values {
			if _, ok := properties[name]; !ok {
				t.Errorf("%s%s is in values.yaml and not in the schema", path, name)
			}
		}
		for name, p := range properties {
			if path+name == "global" {
				continue
			}
			property := p.(map[string]any)
			if text, _ := property["description"].(string); !strings.HasSuffix(text, ".") {
				t.Errorf("%s%s: the schema says no sentence about it", path, name)
			}
			value, ok := values[name]
			if !ok {
				t.Errorf("%s%s is in the schema and has no default in values.yaml", path, name)
			}
			if _, ok := property["properties"]; ok {
				below, _ := value.(map[string]any)
				walk(path+name+".", property, below)
				continue
			}
			n++
		}
	}
	walk("", schema, values)
	if n < 20 {
		t.Errorf("looked at %d values alone", n)
	}
}

func read(t *testing.T, file string, into any) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if filepath.Ext(file) == ".json" {
		err = json.Unmarshal(b, into)
	} else {
		err = yaml.UnmarshalStrict(b, into)
	}
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

const ownEtcd = `
etcd: {endpoints: ["https://10.0.0.1:2379", "https://10.0.0.2:2379"]}
`

func TestFaultyValuesAreRefused(t *testing.T) {
	for name, tt := range map[string]struct{ values, want string }{
		"no etcd":                    {`{}`, "etcd.endpoints"},
		"unknown value":              {ownEtcd + "wings: 2", "wings"},
		"unknown value below":        {ownEtcd + "agent: {wings: 2}", "wings"},
		"endpoint without scheme":    {`etcd: {endpoints: ["10.0.0.1:2379"]}`, "endpoints"},
		"two endpoints in one":       {`etcd: {endpoints: ["https://10.0.0.1:2379,https://10.0.0.2:2379"]}`, "endpoints"},
		"address for a range":        {ownEtcd + "egress: {exceptCIDRs: [10.0.0.1]}", "exceptCIDRs"},
		"too many egress IPs":        {ownEtcd + "egress: {maxEgressIPsPerNode: 256}", "maxEgressIPsPerNode"},
		"digest without content":     {ownEtcd + "image: {digest: latest}", "digest"},
		"option with two values":     {ownEtcd + "agent: {config: {egress.exceptCIDRs: [10.0.0.0/8]}}", "egress.exceptCIDRs"},
		"options with two values":    {ownEtcd + "crdsync: {config: {egress: {maxEgressIPsPerNode: 3}}}", "crdsync.config"},
		"a volume that is too small": {`etcd: {bundled: {enabled: true, storageClass: fast, quotaBackendBytes: 2147483648}}`, "set etcd.bundled.storage"},
		"two etcds":                  {`etcd: {endpoints: ["https://10.0.0.1:2379"], bundled: {enabled: true}}`, "want one of both"},
		"bundled without TLS":        {`etcd: {tls: {enabled: false}, bundled: {enabled: true}}`, "etcd.tls.enabled"},
		"plain etcd with TLS":        {`etcd: {endpoints: ["https://10.0.0.1:2379", "http://10.0.0.2:2379"]}`, "http://10.0.0.2:2379 is not https"},
		"insecure by an option":      {ownEtcd + "agent: {config: {insecure: true}}", "agent.config"},
		"webhook at root's port":     {ownEtcd + "webhook: {port: 443}", "port"},
		"webhook by an option":       {ownEtcd + "crdsync: {config: {webhook-address: ':9444'}}", "crdsync.config"},
		"two names in one":           {ownEtcd + "webhook: {clients: {names: ['a,b']}}", "names"},
		"a label without value":      {`etcd: {bundled: {enabled: true, nodeSelector: {egret: null}}}`, "nodeSelector"},
		"two members":                {`etcd: {bundled: {enabled: true, replicas: 2}}`, "replicas"},
		"snapshot elsewhere":         {`etcd: {bundled: {enabled: true, restoreFrom: ../x.db}}`, "restoreFrom"},
		"taint without a domain":     {ownEtcd + "startupTaint: agent-not-ready", "startupTaint"},
		"taint with a policy":        {ownEtcd + "startupTaint: \"a/b' || 'a\"", "startupTaint"},
		"taint by an option":         {ownEtcd + "crdsync: {config: {startup-taint: a/b}}", "crdsync.config"},
		"rollout of nothing":         {ownEtcd + "agent: {maxUnavailable: 0}", "maxUnavailable"},
		"rollout of no percent":      {ownEtcd + "agent: {maxUnavailable: 0%}", "maxUnavailable"},
		"NAT log by an option":       {ownEtcd + "agent: {config: {nat-log: /x}}", "agent.config"},
		"NAT log elsewhere":          {ownEtcd + "agent: {natLog: {enabled: true, hostPath: ../x}}", "hostPath"},
		"NAT log over the node":      {ownEtcd + "agent: {natLog: {enabled: true, hostPath: /}}", "hostPath"},
		"NAT log over a way up":      {ownEtcd + "agent: {natLog: {enabled: true, hostPath: /var/..}}", "hostPath"},
		"page at no port":            {ownEtcd + "page: {secret: a, address: localhost}", "address"},
		"metrics by an option":       {ownEtcd + "metrics: {enabled: true}\nagent: {config: {metrics-address: '10.0.0.1:8481'}}", "agent.config"},
		"agents by an option":        {ownEtcd + "metrics: {enabled: true}\ncrdsync: {config: {agents-port: 1}}", "crdsync.config"},
		"metrics, half said":         {ownEtcd + "metrics: {enabled: yes please}", "metrics"},
		"a name for a VPC":           {ownEtcd + "cloud: {aws: {enabled: true, vpc: mine}}", "vpc"},
		"a name for a role":          {ownEtcd + "cloud: {aws: {enabled: true, roleARN: egret}}", "roleARN"},
		"status elsewhere":           {ownEtcd + "agent: {config: {status-address: '127.0.0.1:9999'}}", "status-address"},
		"crdsync's elsewhere":        {ownEtcd + "crdsync: {config: {status-address: '127.0.0.1:9999'}}", "status-address"},
		"no replica":                 {ownEtcd + "crdsync: {replicas: 0}", "replicas"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := render(t, tt.values); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v: want one that names %s", err, tt.want)
			}
		})
	}
}

// variants are values that change what there is.
var variants = map[string]string{
	"as it comes": ownEtcd,
	"bare": ownEtcd + `
webhook: {enabled: false}
crds: {install: false}
agent: {nodeSelector: {kubernetes.io/os: null}, tolerations: [], resources: {}, privileged: true}
crdsync: {tolerations: [], resources: {}, replicas: 1}
`,
	"without TLS": `
etcd: {endpoints: ["http://10.0.0.1:2379"], prefix: /mine/, tls: {enabled: false}}
`,
	"bundled etcd": `
etcd: {bundled: {enabled: true}}
`,
	"bundled etcd without roles": `
etcd: {bundled: {enabled: true, roles: false}}
`,
	"bundled etcd without tolerations": `
etcd: {bundled: {enabled: true, tolerations: []}}
`,
	"bundled etcd on volumes": `
etcd: {bundled: {enabled: true, replicas: 1, storageClass: fast, snapshots: {schedule: ""}, nodeSelector: {kubernetes.io/os: linux}}}
`,
	"webhook for API servers": ownEtcd + `
webhook: {clients: {names: [kube-apiserver, "system:api server"]}}
`,
	"webhook at another port": ownEtcd + `
webhook: {port: 9444}
`,
	"webhook for API servers of a CA": ownEtcd + `
webhook: {clients: {names: [kube-apiserver], caConfigMap: api-clients}}
`,
	"status page": ownEtcd + `
page: {secret: egret-page, address: "[::]:9000"}
`,
	"start-up taint": `
startupTaint: egret/agent-not-ready
etcd: {bundled: {enabled: true}}
`,
	"start-up taint alone": ownEtcd + `
startupTaint: startup-taint.cluster-autoscaler.kubernetes.io/egret
crdsync: {tolerations: []}
`,
	"NAT log": ownEtcd + `
agent: {natLog: {enabled: true, hostPath: /srv/log}, config: {nat-log-filter: [namespace=prod], nat-log-max-days: 7}}
`,
	"fast path": ownEtcd + `
agent: {config: {fast-path: true}}
`,
	"NAT log to the standard output": ownEtcd + `
agent: {natLog: {enabled: true, hostPath: ""}}
`,
	"metrics": ownEtcd + `
metrics: {enabled: true}
crdsync: {nodeSelector: {c: d}, priorityClassName: mine}
`,
	"metrics and the status page": ownEtcd + `
metrics: {enabled: true}
page: {secret: egret-page}
`,
	"metrics, and a page that asks no kernels": ownEtcd + `
metrics: {enabled: true}
page: {secret: egret-page}
agent: {config: {trace-clients: []}}
`,
	"metrics, and a page on loopback": `
etcd: {bundled: {enabled: true}}
metrics: {enabled: true}
crdsync: {config: {page-local-address: "127.0.0.1:8487"}}
startupTaint: egret/agent-not-ready
`,
	"bundled etcd restored": `
etcd: {bundled: {enabled: true, restoreFrom: egret-1.db}}
`,
	"bundled etcd on volumes, restored": `
etcd: {bundled: {enabled: true, storageClass: fast, restoreFrom: egret-1.db}}
`,
	"AWS": ownEtcd + `
cloud: {aws: {enabled: true, roleARN: "arn:aws:iam::123456789012:role/egret", region: eu-central-1, vpc: vpc-0123456789abcdef0, endpointURL: "https://ec2.example"}}
startupTaint: egret/agent-not-ready
`,
	"AWS, bundled etcd": `
etcd: {bundled: {enabled: true}}
cloud: {aws: {enabled: true, replicas: 1}}
`,
	"AWS, without TLS": `
etcd: {endpoints: ["http://10.0.0.1:2379"], tls: {enabled: false}}
cloud: {aws: {enabled: true}}
`,
	"all said": ownEtcd + `
namespace: {create: true}
egress: {exceptCIDRs: [192.168.0.0/16, "fd00::/8"], maxEgressIPsPerNode: 9, snatFullyRandomPorts: true}
clusterCIDRs: [10.244.0.0/16]
gossip: {existingSecret: mine}
agent:
  config: {rebalance: auto, gossip-port: 8490, lease-ttl: 12s, hold-unknown: 0s}
  nodeSelector: {a: b}
  tolerations: [{key: x, operator: Exists, effect: NoSchedule}]
  resources: {limits: {memory: 256Mi}, requests: {cpu: 1}}
  maxUnavailable: 100%
crdsync: {config: {block-size: 512, etcd-defragment: false}, nodeSelector: {c: d}}
`,
}

func TestNoVariantHasAnUnknownField(t *testing.T) {
	for name, values := range variants {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			docs := decoded(t, values)
			if n := len(docs); n < 7 {
				t.Errorf("%d objects alone", n)
			}
			// Each volume that is mounted is there, and each ConfigMap that is made is the one that is mounted.
			// the cluster's, in every namespace; the user's
			made := map[string]bool{"ConfigMap kube-root-ca.crt": true, "ConfigMap api-clients": true}
			for _, d := range docs {
				switch o := d.object.(type) {
				case *corev1.ConfigMap:
					made["ConfigMap "+o.Name] = true
				case *corev1.Secret:
					t.Errorf("the chart makes Secret %s: a rollback would write back what it was", o.Name)
				}
			}
			for command, s := range podsOf(docs) {
				var volumes []string
				for _, v := range s.Volumes {
					volumes = append(volumes, v.Name)
					if v.ConfigMap != nil && !made["ConfigMap "+v.ConfigMap.Name] {
						t.Errorf("%s: there is no ConfigMap %s", command, v.ConfigMap.Name)
					}
				}
				for _, m := range s.Containers[0].VolumeMounts {
					if !slices.Contains(volumes, m.Name) {
						t.Errorf("%s: there is no volume %s", command, m.Name)
					}
				}
			}
		})
	}
}

func decoded(t testing.TB, values string) []document {
	t.Helper()
	out, err := render(t, values)
	if err != nil {
		t.Fatal(err)
	}
	var docs []document
	for _, doc := range strings.Split(out, "\n---\n") {
		docs = append(docs, decode(t, "chart", []byte(strings.TrimPrefix(doc, "---\n"))))
	}
	return docs
}

// Secrets that `egret credentials` makes, and the names that it puts into them, are those that the pods go by.
func TestPodsOfTheBundledEtcdFindTheirCredentials(t *testing.T) {
	t.Parallel()
	docs := decoded(t, variants["AWS, bundled etcd"])
	pods := podsOf(docs)
	var may []string
	for _, d := range docs {
		switch o := d.object.(type) {
		case *rbacv1.Role:
			if o.Name == "egret-credentials" {
				may = o.Rules[1].ResourceNames
			}
		}
	}
	for command, secrets := range map[string][]string{
		"agent": {"egret-etcd-agent", "egret-gossip"}, "crdsync": {"egret-etcd-crdsync"}, "cloud": {"egret-etcd-cloud"}, "snapshot": {"egret-etcd-root"},
		"etcd-rbac": {"egret-etcd-root"}, "run": {"egret-etcd-server", "egret-etcd-root"},
	} {
		var mounted []string
		for _, v := range pods[command].Volumes {
			if v.Secret == nil {
				continue
			}
			mounted = append(mounted, v.Secret.SecretName)
			// Only a member that has lost its data goes by it.
			want := command == "run" && v.Secret.SecretName == "egret-etcd-root"
			if got := v.Secret.Optional != nil && *v.Secret.Optional; got != want {
				t.Errorf("%s starts without the Secret %s: %t, want %t", command, v.Secret.SecretName, got, want)
			}
		}
		if d := cmp.Diff(secrets, mounted); d != "" {
			t.Errorf("%s mounts (-want +got):\n%s", command, d)
		}
		for _, s := range mounted {
			if !slices.Contains(may, s) {
				t.Errorf("credentials may not write Secret %s", s)
			}
		}
	}
	for _, command := range []string{"agent", "crdsync", "cloud", "etcd-rbac"} {
		env := map[string]string{}
		for _, e := range pods[command].Containers[0].Env {
			env[e.Name] = e.Value
		}
		if env["EGRET_ETCD_SERVER_NAME"] != "egret-etcd.egret-system.svc" || env["ETCDCTL_ENDPOINTS"] != "https://$(EGRET_ETCD_SERVICE_HOST):8483" {
			t.Errorf("%s goes to %s and expects %s", command, env["ETCDCTL_ENDPOINTS"], env["EGRET_ETCD_SERVER_NAME"])
		}
	}
	all := strings.Join(pods["run"].Containers[0].Args, " ")
	for _, want := range []string{"egret-etcd-0=https://egret-etcd-0.egret-etcd-peers.egret-system.svc:8484,", ",egret-etcd-2=https://egret-etcd-2.egret-etcd-peers", "--quota-backend-bytes=536870912",
		"--auto-compaction-retention=1h"} {
		if !strings.Contains(all, want) {
			t.Errorf("members run with %s: want %s", all, want)
		}
	}
}

// egret credentials makes the key of the gossip whosever etcd it is, but where the values name another Secret.
func TestTheKeyOfTheGossipIsMade(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{"as it comes": "egret-gossip", "bundled etcd": "egret-gossip", "metrics": "egret-gossip", "all said": "mine"} {
		docs := decoded(t, variants[name])
		pods := podsOf(docs)
		for _, v := range pods["agent"].Volumes {
			if v.Name == "gossip" && v.Secret.SecretName != want {
				t.Errorf("%s: agents read the key in Secret %s, want %s", name, v.Secret.SecretName, want)
			}
		}
		made := false
		for _, d := range docs {
			if o, ok := d.object.(*rbacv1.Role); ok && o.Name == "egret-credentials" {
				made = slices.Contains(o.Rules[1].ResourceNames, want)
			}
		}
		if _, runs := pods["credentials"]; runs != (want != "mine") || made != runs {
			t.Errorf("%s: egret credentials runs: %v, and may write Secret %s: %v", name, runs, want, made)
		}
	}
}

// Kubernetes gives the address of a Service as it is: that of a cluster without IPv4 has no brackets.
func TestEndpointsOfTheBundledEtcdAreURLsInAnyFamily(t *testing.T) {
	t.Parallel()
	n := 0
	for command, s := range podsOf(decoded(t, variants["AWS, bundled etcd"])) {
		texts := slices.Clone(s.Containers[0].Args)
		for _, e := range s.Containers[0].Env {
			texts = append(texts, e.Value)
		}
		for _, text := range texts {
			_, text, ok := strings.Cut(text, "https://$(")
			if !ok {
				continue
			}
			n++
			for _, ip := range []string{"10.96.0.7", "fd00:10:96::7"} {
				expanded := "https://" + strings.Replace(text, "EGRET_ETCD_SERVICE_HOST)", ip, 1)
				u, err := url.Parse(store.Endpoint(expanded))
				if err != nil || u.Hostname() != ip || u.Port() != "8483" {
					t.Errorf("%s goes to %s: %v, %v", command, expanded, u, err)
				}
			}
		}
	}
	if n != 5 {
		t.Errorf("%d pods name the Service of etcd, want the agent, crdsync, cloud, the snapshot, and what keeps roles", n)
	}
}

func TestEveryPodHasTheImageThatTheValuesName(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("0a", 32)
	pods := podsOf(decoded(t, variants["AWS, bundled etcd"]+`
image: {repository: "registry.example:5000/egret", digest: "`+digest+`", pullPolicy: Always, pullSecrets: [one, two]}
`))
	if len(pods) != 7 {
		t.Errorf("%d pods, want all that there can be", len(pods))
	}
	for command, s := range pods {
		c := s.Containers[0]
		if c.Image != "registry.example:5000/egret@"+digest || c.ImagePullPolicy != corev1.PullAlways || len(s.ImagePullSecrets) != 2 {
			t.Errorf("%s: image %s, pulled %s with %v", command, c.Image, c.ImagePullPolicy, s.ImagePullSecrets)
		}
		if s.PriorityClassName == "" || len(c.Resources.Requests) == 0 {
			t.Errorf("%s: priority class %q, requests %v: want it to have its room on a busy node", command, s.PriorityClassName, c.Resources.Requests)
		}
	}
}

func TestWhatIsSaidInValuesIsDone(t *testing.T) {
	t.Parallel()
	docs := decoded(t, variants["all said"])
	agent := podsOf(docs)["agent"]
	if agent.NodeSelector["a"] != "b" || len(agent.Tolerations) != 1 || agent.Containers[0].Resources.Limits.Memory().String() != "256Mi" {
		t.Errorf("agents go to %v, tolerate %v, may use %v", agent.NodeSelector, agent.Tolerations, agent.Containers[0].Resources.Limits)
	}
	for _, d := range docs {
		if o, ok := d.object.(*appsv1.DaemonSet); ok && o.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable.String() != "100%" {
			t.Errorf("a rollout replaces %v of the agents at a time, want 100%%", o.Spec.UpdateStrategy.RollingUpdate.MaxUnavailable)
		}
	}
	for name, s := range podsOf(decoded(t, variants["as it comes"])) {
		if slices.Contains(s.Containers[0].Args, "--insecure") {
			t.Errorf("%s goes on without TLS, which nobody said", name)
		}
	}
	for name, s := range podsOf(decoded(t, variants["without TLS"])) {
		if !slices.Contains(s.Containers[0].Args, "--insecure") && name != "credentials" { // which asks no etcd
			t.Errorf("%s does not start without TLS: its arguments are %q", name, s.Containers[0].Args)
		}
		for _, e := range s.Containers[0].Env {
			if strings.HasPrefix(e.Value, "/etc/egret/etcd") {
				t.Errorf("%s without TLS: %s is %s", name, e.Name, e.Value)
			}
		}
	}
	if slices.Contains(podsOf(decoded(t, variants["bare"]))["crdsync"].Containers[0].Args, "--webhook") {
		t.Error("crdsync serves a webhook that the API server does not know")
	}
}

func TestTheNATLogIsWrittenWhereTheValuesSay(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]struct{ option, hostPath string }{
		"as it comes":                    {"", ""},
		"NAT log":                        {"/var/log/egret/nat.log", "/srv/log"},
		"NAT log to the standard output": {"-", ""},
	} {
		var config struct {
			File string `json:"nat-log"`
		}
		docs := decoded(t, variants[name])
		for _, d := range docs {
			if m, ok := d.object.(*corev1.ConfigMap); ok {
				if err := yaml.Unmarshal([]byte(m.Data["egret-agent.conf"]), &config); err != nil {
					t.Fatal(err)
				}
			}
		}
		var hostPath string
		agent := podsOf(docs)["agent"]
		for _, v := range agent.Volumes {
			for _, m := range agent.Containers[0].VolumeMounts {
				if v.HostPath != nil && v.Name == m.Name && !m.ReadOnly && m.MountPath == filepath.Dir(config.File) {
					hostPath = v.HostPath.Path
				}
			}
		}
		if config.File != want.option || hostPath != want.hostPath {
			t.Errorf("%s: the log is %q, in %q of the node; want %q, in %q",
				name, config.File, hostPath, want.option, want.hostPath)
		}
	}
}

// Pods without which no agent gets ready wait for none, and crdsync may change nodes where it is to take a taint off
// them, and else not.
func TestTheStartupTaintIsTolerated(t *testing.T) {
	t.Parallel()
	for name, taint := range map[string]string{
		"as it comes": "", "bundled etcd": "", "metrics": "", "start-up taint": "egret/agent-not-ready", "metrics, and a page on loopback": "egret/agent-not-ready", "start-up taint alone": "startup-taint.cluster-autoscaler.kubernetes.io/egret",
	} {
		docs := decoded(t, variants[name])
		for command, s := range podsOf(docs) {
			tolerates := slices.ContainsFunc(s.Tolerations, func(o corev1.Toleration) bool {
				return o.Operator == corev1.TolerationOpExists && o.Effect == "" && (o.Key == taint && taint != "" || o.Key == "")
			})
			if want := taint != "" || command == "agent"; tolerates != want {
				t.Errorf("%s: %s tolerates %v: want the taint in it: %t", name, command, s.Tolerations, want)
			}
		}
		for _, d := range docs {
			r, ok := d.object.(*rbacv1.ClusterRole)
			if !ok {
				continue
			}
			for _, rule := range r.Rules {
				if !slices.Contains(rule.Resources, "nodes") || slices.Equal(rule.Verbs, []string{"get", "list", "watch"}) {
					continue
				}
				if taint == "" || r.Name != "egret-crdsync-nodes" || !slices.Equal(rule.Verbs, []string{"patch"}) {
					t.Errorf("%s: ClusterRole %s may %v nodes", name, r.Name, rule.Verbs)
				}
			}
		}
	}
}

// Kubernetes takes pods from a node that is away for five minutes, and three members that all come back to other nodes
// than theirs would find no data there.
func TestAMemberStaysWhereItsDataIs(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]int{"bundled etcd": 2, "bundled etcd without tolerations": 2, "bundled etcd on volumes": 0, "bundled etcd on volumes, restored": 0} {
		n, members := 0, 0
		for _, d := range decoded(t, variants[name]) {
			set, ok := d.object.(*appsv1.StatefulSet)
			if !ok {
				continue
			}
			members++
			for _, o := range set.Spec.Template.Spec.Tolerations {
				away := o.Key == corev1.TaintNodeNotReady || o.Key == corev1.TaintNodeUnreachable
				if away && o.Operator == corev1.TolerationOpExists && o.Effect == corev1.TaintEffectNoExecute && o.TolerationSeconds == nil {
					n++
				}
			}
		}
		if members != 1 || n != want {
			t.Errorf("%s: members stay at a node with %d of the two taints of one that is away, want %d", name, n, want)
		}
	}
}

// helm uninstall would delete all Egress and ExternalIPPool objects with their CRDs.
func TestObjectsOutliveTheRelease(t *testing.T) {
	t.Parallel()
	n := 0
	for _, d := range decoded(t, ownEtcd) {
		if crd, ok := d.object.(*apiextensionsv1.CustomResourceDefinition); ok {
			n++
			if crd.Annotations["helm.sh/resource-policy"] != "keep" {
				t.Errorf("CRD %s goes with the release: annotations %v", crd.Name, crd.Annotations)
			}
		}
	}
	if n != 2 {
		t.Errorf("the chart installs %d CRDs, want 2", n)
	}
}

// The files of options are read by the program itself, which refuses what it does not know. It is made to end by a
// faulty option of the command line, and has nothing else to say.
func TestOptionsOfTheChartAreUnderstood(t *testing.T) {
	for name, values := range variants {
		for _, d := range decoded(t, values) {
			config, ok := d.object.(*corev1.ConfigMap)
			if !ok {
				continue
			}
			for command, fault := range map[string]string{"agent": "--log-level=loud", "crdsync": "--log-level=loud"} {
				file := filepath.Join(t.TempDir(), "options")
				if err := os.WriteFile(file, []byte(config.Data["egret-"+command+".conf"]), 0o600); err != nil {
					t.Fatal(err)
				}
				// The variables of a pod, which say where etcd is, are not here.
				// always fails: the output is looked at
				out, _ := exec.Command(egret(t), command, "--config", file, "--insecure", fault).CombinedOutput()
				if want := "egret: --log-level \"loud\": want debug, info, warn or error\n"; string(out) != want {
					t.Errorf("%s: egret %s says %q of\n%s", name, command, out, config.Data["egret-"+command+".conf"])
				}
			}
		}
	}
}

func TestOptionsOfTheCloudExist(t *testing.T) {
	t.Parallel()
	help, err := exec.Command(egret(t), "cloud", "aws", "--help").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	args := podsOf(decoded(t, variants["AWS"]))["cloud"].Containers[0].Args
	if want := []string{"cloud", "aws", "--id=$(POD_NAME)", "--region=eu-central-1", "--vpc=vpc-0123456789abcdef0", "--endpoint-url=https://ec2.example"}; !slices.Equal(args, want) {
		t.Errorf("arguments %q, want %q", args, want)
	}
	for _, arg := range args[2:] {
		if flag, _, _ := strings.Cut(arg, "="); !strings.Contains(string(help), flag+" ") {
			t.Errorf("egret cloud aws has no flag %s", flag)
		}
	}
}

// Files of values that users begin with are the chart's, and each says whose etcd it is.
func TestExamplesOfValuesAreTheCharts(t *testing.T) {
	t.Parallel()
	for file, want := range map[string]string{"own-etcd.yaml": "https://10.0.0.2:2379", "bundled-etcd.yaml": "https://$(EGRET_ETCD_SERVICE_HOST):8483"} {
		b, err := os.ReadFile(filepath.Join("examples", "values", file))
		if err != nil {
			t.Fatal(err)
		}
		docs := decoded(t, string(b))
		_, bundled := podsOf(docs)["run"]
		if text, err := render(t, string(b)); err != nil || !strings.Contains(text, want) || bundled != (file == "bundled-etcd.yaml") {
			t.Errorf("%s: its own etcd %v, %v; want that of %s", file, bundled, err, want)
		}
	}
}

// The bundled etcd is held to roles unless the values say otherwise, and crdsync tries nothing then that its role does
// not allow, but what a user asks for.
func TestTheBundledEtcdHasRoles(t *testing.T) {
	t.Parallel()
	help, err := exec.Command(egret(t), "etcd-rbac", "--help").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	keeps := []string{"etcd-rbac", "--apply", "--enable", "--keep=1m", "--make-room"}
	for name, tt := range map[string]struct {
		values string
		args   []string // of what keeps the roles
		asks   bool     // crdsync is told to leave defragmenting to it
	}{
		"bundled etcd":               {variants["bundled etcd"], keeps, true},
		"AWS, bundled etcd":          {variants["AWS, bundled etcd"], append(slices.Clone(keeps), "--cloud=egret-cloud"), true},
		"bundled etcd without roles": {variants["bundled etcd without roles"], nil, false},
		"etcd of one's own":          {ownEtcd, nil, false},
		"said by a user":             {variants["bundled etcd"] + "crdsync: {config: {etcd-defragment: true}}", keeps, false},
	} {
		pods := podsOf(decoded(t, tt.values))
		var args []string
		if pod, ok := pods["etcd-rbac"]; ok {
			args = pod.Containers[0].Args
		}
		if !slices.Equal(args, tt.args) {
			t.Errorf("%s: roles are kept by %q, want %q", name, args, tt.args)
		}
		for _, arg := range args[min(1, len(args)):] {
			if flag, _, _ := strings.Cut(arg, "="); !strings.Contains(string(help), flag+" ") {
				t.Errorf("egret etcd-rbac has no flag %s", flag)
			}
		}
		if got := slices.Contains(pods["crdsync"].Containers[0].Args, "--etcd-defragment=false"); got != tt.asks {
			t.Errorf("%s: crdsync is told to defragment nothing: %v, want %v", name, got, tt.asks)
		}
	}
}

// A pod sees the options that it was started with. Other options are other pods, and the same are the same.
func TestPodsAreReplacedWhenTheirOptionsChange(t *testing.T) {
	t.Parallel()
	const plus = "\nagent: {config: {rebalance: auto}}"
	before, after := annotations(decoded(t, ownEtcd)), annotations(decoded(t, ownEtcd+plus))
	if before["egret-agent"] == after["egret-agent"] || before["egret-crdsync"] != after["egret-crdsync"] {
		t.Errorf("with other options of the agent: agents before %s after %s, crdsync %s and %s",
			before["egret-agent"], after["egret-agent"], before["egret-crdsync"], after["egret-crdsync"])
	}
}

func annotations(docs []document) map[string]string {
	out := map[string]string{}
	for _, d := range docs {
		switch o := d.object.(type) {
		case *appsv1.DaemonSet:
			out[o.Name] = o.Spec.Template.Annotations["egret/config"]
		case *appsv1.Deployment:
			out[o.Name] = o.Spec.Template.Annotations["egret/config"]
		}
	}
	return out
}

// The kubelet asks at the loopback address of the node, where the daemons answer to nobody else, and a rollout waits
// for the answer.
func TestProbesAskWhereTheDaemonsAnswer(t *testing.T) {
	t.Parallel()
	for _, variant := range []string{"AWS", "AWS, bundled etcd"} {
		pods := podsOf(decoded(t, variants[variant]))
		for command, port := range map[string]int{"agent": egress.StatusPort, "crdsync": egress.SyncStatusPort, "cloud": egress.CloudStatusPort} {
			c := pods[command].Containers[0]
			for path, probe := range map[string]*corev1.Probe{"/healthz": c.StartupProbe, "/readyz": c.ReadinessProbe} {
				if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Host != "127.0.0.1" || probe.HTTPGet.Port.IntValue() != port || probe.HTTPGet.Path != path {
					t.Errorf("%s: probe %+v, want %s at 127.0.0.1:%d", command, probe, path, port)
				}
			}
			if c.LivenessProbe != nil {
				t.Errorf("%s has a liveness probe: without etcd all would be restarted", command)
			}
		}
	}
}

// In the network of a node one process alone has a port. What pods declare the scheduler keeps apart, and a rollout
// that first starts one more would wait for a node that is not there.
func TestTheSchedulerKeepsApartWhatListensInTheNetworkOfTheNode(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]map[string][]int32{
		"AWS, bundled etcd": {"crdsync": {egress.SyncStatusPort, 9443}, "cloud": {egress.CloudStatusPort}},
		"bare":              {"crdsync": {egress.SyncStatusPort}},

		"webhook at another port": {"crdsync": {egress.SyncStatusPort, 9444}},
	} {
		docs := decoded(t, variants[name])
		for command, ports := range want {
			var declared []int32
			for _, p := range podsOf(docs)[command].Containers[0].Ports {
				if p.HostPort != p.ContainerPort {
					t.Errorf("%s: %s: port %d of the node is %d of the pod", name, command, p.HostPort, p.ContainerPort)
				}
				declared = append(declared, p.HostPort)
			}
			if !slices.Equal(declared, ports) {
				t.Errorf("%s: %s declares ports %d, listens at %d", name, command, declared, ports)
			}
		}
		for _, d := range docs {
			o, ok := d.object.(*appsv1.Deployment)
			if !ok || len(o.Spec.Template.Spec.Containers[0].Ports) == 0 {
				continue
			}
			if r := o.Spec.Strategy.RollingUpdate; r == nil || r.MaxSurge.String() != "0" || r.MaxUnavailable.String() != "1" {
				t.Errorf("%s: the rollout of %s: %+v, want one less and none more", name, o.Name, o.Spec.Strategy)
			}
		}
	}
}

// Replicas that wait for etcd do not keep a node from being drained. A member of etcd that is not ready may go while
// the others decide without it, and not else.
func TestADrainWaitsForNoReplicaThatIsNotReady(t *testing.T) {
	t.Parallel()
	got := map[string]string{}
	for _, variant := range []string{"AWS", "bundled etcd"} {
		for _, d := range decoded(t, variants[variant]) {
			if o, ok := d.object.(*policyv1.PodDisruptionBudget); ok {
				policy := policyv1.IfHealthyBudget // where nothing is said
				if o.Spec.UnhealthyPodEvictionPolicy != nil {
					policy = *o.Spec.UnhealthyPodEvictionPolicy
				}
				got[o.Name] = string(policy)
			}
		}
	}
	want := map[string]string{"egret-crdsync": "AlwaysAllow", "egret-cloud": "AlwaysAllow", "egret-etcd": "IfHealthyBudget"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("what is evicted though it is not ready (-want +got):\n%s", d)
	}
}

// The Service finds crdsync's port by its name, so that it leads to pods of both ports while they are replaced.
func TestTheWebhookListensWhereItsServiceLeads(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]int32{"as it comes": 9443, "webhook at another port": 9444} {
		docs := decoded(t, variants[name])
		c := podsOf(docs)["crdsync"].Containers[0]
		at := slices.IndexFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == "webhook" })
		if at < 0 || c.Ports[at].HostPort != want || !slices.Contains(c.Args, fmt.Sprintf("--webhook-address=:%d", want)) {
			t.Errorf("%s: ports %+v, arguments %q, want the webhook at %d", name, c.Ports, c.Args, want)
		}
		for _, d := range docs {
			if s, ok := d.object.(*corev1.Service); ok && s.Name == "egret-crdsync" && s.Spec.Ports[0].TargetPort.StrVal != "webhook" {
				t.Errorf("%s: the Service leads to %v, want the port webhook", name, s.Spec.Ports[0].TargetPort)
			}
		}
	}
}

func TestTheWebhookAnswersWhomTheValuesName(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]struct {
		args      []string
		configMap string
	}{
		"as it comes":             {nil, ""},
		"webhook for API servers": {[]string{"--webhook-client-ca-file=/etc/egret/webhook/ca.crt", "--webhook-clients=kube-apiserver,system:api server"}, "kube-root-ca.crt"},
		"webhook for API servers of a CA": {
			[]string{"--webhook-client-ca-file=/etc/egret/webhook/ca.crt", "--webhook-clients=kube-apiserver"}, "api-clients"},
	} {
		pod := podsOf(decoded(t, variants[name]))["crdsync"]
		var args []string
		for _, a := range pod.Containers[0].Args {
			if strings.HasPrefix(a, "--webhook-client") {
				args = append(args, a)
			}
		}
		configMap := ""
		for _, m := range pod.Containers[0].VolumeMounts {
			for _, v := range pod.Volumes {
				if v.Name == m.Name && m.MountPath == "/etc/egret/webhook" {
					configMap = v.ConfigMap.Name
				}
			}
		}
		if !slices.Equal(args, want.args) || configMap != want.configMap {
			t.Errorf("%s: %q with the ConfigMap %q, want %q with %q", name, args, configMap, want.args, want.configMap)
		}
	}
}
