package kubelet

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// cluster is the lab in the hands of a test: what fails there fails the test.
type cluster struct {
	t   *testing.T // of the step
	way *testing.T // of all steps
	lab *lab.Lab
	// workloads are what of Egret runs in egret-system, and root the folder with the certificate of etcd's user root,
	// where etcd is somebody else's.
	workloads []string
	root      string
	// before is what each node had before Egret, by its name; see kernel.
	before map[string][]string
	// rendered is what render made, by the tag: what is applied is what is deleted, and to link the renderer takes
	// seconds.
	rendered map[string]string
}

// in returns the cluster for a step of the test.
func (c *cluster) in(t *testing.T) *cluster {
	c.t = t
	return c
}

func (c *cluster) kubectl(args ...string) string {
	c.t.Helper()
	out, err := c.tryKubectl(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *cluster) tryKubectl(args ...string) (string, error) {
	out, err := c.lab.Kubectl(c.t.Context(), args...)
	return strings.TrimSpace(string(out)), err
}

// egret runs egret in a pod of crdsync, which knows etcd and may read all that it has.
func (c *cluster) egret(args ...string) string {
	c.t.Helper()
	out, err := c.tryEgret(args...)
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

func (c *cluster) tryEgret(args ...string) (string, error) {
	return c.tryKubectl(append([]string{"-n", "egret-system", "exec", "deployment/egret-crdsync", "--", "egret"}, args...)...)
}

// settled waits until all workloads are as their objects say.
func (c *cluster) settled() {
	c.t.Helper()
	c.rollout(c.workloads...)
}

// rollout waits until what it names in egret-system is as its object says.
func (c *cluster) rollout(what ...string) {
	c.t.Helper()
	for _, w := range what {
		c.kubectl("-n", "egret-system", "rollout", "status", w, "--timeout=180s")
	}
}

// helm runs Helm on the release of Egret, as who installs it does.
func (c *cluster) helm(args ...string) string {
	c.t.Helper()
	cmd := exec.CommandContext(c.t.Context(), c.lab.KubeProgram("helm"), args...)
	home := c.t.TempDir()
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.lab.Kubeconfig(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	out, err := cmd.CombinedOutput()
	if err != nil {
		c.t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// operator runs egret on a machine that knows the cluster alone: it has the kubeconfig of an administrator and no way
// to etcd.
func (c *cluster) operator(args ...string) (string, error) {
	c.t.Helper()
	return c.byKubeconfig(append(args, "--kubeconfig", c.lab.Kubeconfig())...)
}

// byKubeconfig is operator with arguments that name the kubeconfig.
func (c *cluster) byKubeconfig(args ...string) (string, error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.lab.EgretPath(), args...)
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("egret %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return out.String(), nil
}

func (c *cluster) render(tag string) string {
	c.t.Helper()
	if text, ok := c.rendered[tag]; ok {
		return text
	}
	repository, _ := split(*name)
	values := c.write(fmt.Sprintf("image: {repository: %q, tag: %q}\n", repository, tag))
	cmd := exec.CommandContext(c.t.Context(), "go", "run", "-C", "../../manifests/render", ".",
		"-values", c.file("testdata/values.yaml"), "-values", values, c.file("../../charts/egret"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		c.t.Fatalf("rendering the chart: %v", err)
	}
	c.rendered[tag] = string(out)
	return c.rendered[tag]
}

// pod is a pod that runs.
type pod struct {
	name string // namespace/name
	node string
}

// pods returns those of a namespace that have a label app, sorted by node.
func (c *cluster) pods(namespace, app string) []pod {
	c.t.Helper()
	out := c.kubectl("-n", namespace, "get", "pods", "-l", "app="+app, "--field-selector=status.phase=Running", "-o",
		`go-template={{range .items}}{{if not .metadata.deletionTimestamp}}{{.metadata.name}} {{.spec.nodeName}}{{"\n"}}{{end}}{{end}}`)
	var pods []pod
	for line := range strings.Lines(out) {
		name, node, _ := strings.Cut(strings.TrimSpace(line), " ")
		pods = append(pods, pod{namespace + "/" + name, node})
	}
	if len(pods) == 0 {
		c.t.Fatalf("namespace %s has no pod with app=%s", namespace, app)
	}
	slices.SortFunc(pods, func(a, b pod) int { return strings.Compare(a.node, b.node) })
	return pods
}

// webs are the pods that the guide's egresses select: the egress by the namespace.
func (c *cluster) webs() map[string][]pod {
	c.t.Helper()
	return map[string][]pod{"egress-prod-web": c.pods("prod", "web"), "egress-staging-web": c.pods("staging", "web")}
}

// gateway returns the egress IP of an egress, and the node that holds it.
func (c *cluster) gateway(egress string) (ip netip.Addr, node string) {
	c.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		out := c.kubectl("get", "egress", egress, "-o", "jsonpath={.status.egressIP} {.status.egressNode}")
		text, node, _ := strings.Cut(out, " ")
		if ip, err := netip.ParseAddr(text); err == nil && node != "" {
			return ip, node
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("status of egress %s: got %q, want an IP and a node", egress, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// leaves fails the test unless each pod is seen outside with an address, within a time.
func (c *cluster) leaves(pods []pod, want netip.Addr, within time.Duration) {
	c.t.Helper()
	for _, p := range pods {
		deadline := time.Now().Add(within)
		for {
			seen, err := c.lab.Source(c.t.Context(), p.name)
			if err == nil && seen == want {
				break
			}
			if time.Now().After(deadline) {
				c.t.Errorf("source of %s on %s outside: got %v, error %v, want %v", p.name, p.node, seen, err, want)
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// lookedAt starts a probe every 1 ms and an open TCP connection on which the outside host speaks every 10 ms, for each
// pod, and returns what fails the test unless all of it came through, as ip, but for what the probe sent around a time
// in which the machine did not let it send: the agents, which renew their permits, had no time either.
func (c *cluster) lookedAt(pods []pod, ip netip.Addr) (end func()) {
	c.t.Helper()
	ctx, stop := context.WithCancel(c.t.Context())
	type outcome struct {
		lab.ProbeResult
		err error
	}
	var ends []func()
	for _, p := range pods {
		result := make(chan outcome, 1)
		go func() {
			r, err := c.lab.Probe(ctx, p.name, time.Millisecond, 10*time.Minute)
			result <- outcome{r, err}
		}()
		conversation, err := c.lab.Converse(ctx, p.name, lab.OutsideIP)
		if err != nil {
			stop()
			c.t.Fatal(err)
		}
		heard := conversation.Push(10 * time.Millisecond)
		ends = append(ends, func() {
			c.t.Helper()
			if err := heard(20 * time.Second); err != nil {
				c.t.Errorf("%s on %s: %v", p.name, p.node, err)
			}
			conversation.Close()
			r := <-result
			if r.err != nil {
				c.t.Errorf("probing from %s: %v", p.name, r.err)
			}
			c.t.Logf("%s on %s: sent %d, lost %d, longest gap %v, sources %v; the machine stood still for %v, and has nothing to do with %d that were lost",
				p.name, p.node, r.Sent, r.Lost, r.LongestGap, r.Sources, r.Stalled, r.LostAwake)
			// Permits are renewed four times in their half a second. Of a machine that stands still for longer in all, in
			// pieces, some renewals come late, by what the pieces exceed.
			late := 0
			if r.Stalled > 500*time.Millisecond {
				late = int(r.Stalled / (20 * time.Millisecond))
			}
			if r.LostAwake > late || len(r.Sources) != 1 || r.Sources[ip] == 0 || len(r.Ports) != 1 {
				c.t.Errorf("probe of %s on %s: lost %d of %d while the machine ran, sources %v, %d ports, want no loss, %v alone, one port",
					p.name, p.node, r.LostAwake, r.Sent, r.Sources, len(r.Ports), ip)
			}
		})
	}
	return func() {
		c.t.Helper()
		stop()
		for _, end := range ends {
			end()
		}
	}
}

// volatile is what ip prints of the kernel's own doing: how long something lasts, and whether the node's bridge has
// pods, whose MTU it has then.
var volatile = regexp.MustCompile(` (expires|valid_lft|preferred_lft|state) \S+| linkdown|cni0: <\S+> mtu \d+|cni0\.mtu = \d+| <\S+>`)

// until waits for what is to be so within a time.
func (c *cluster) until(within time.Duration, what string, ok func() (bool, string)) {
	c.t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(200 * time.Millisecond) {
		good, have := ok()
		if good {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: not within %v: %s", what, within, have)
		}
	}
}

// kernel returns what a node has of tables, chains, rules, routes, links, addresses and settings, without what belongs
// to single pods and what kube-proxy puts into its own tables.
func (c *cluster) kernel(node string) []string {
	c.t.Helper()
	var all []string
	for _, line := range []string{
		"ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all", "ip -o link", "ip -o addr",
		"ip neigh show nud permanent", "ip -6 neigh show proxy", "nft list tables", "sysctl -a --pattern net.ipv[46].(conf|neigh)",
	} {
		out, err := c.lab.Exec(c.t.Context(), "node", node, strings.Fields(line)...)
		if err != nil {
			c.t.Fatal(err)
		}
		for _, l := range strings.Split(volatile.ReplaceAllString(string(out), ""), "\n") {
			if !strings.Contains(l, "veth") {
				all = append(all, line+": "+strings.TrimSpace(l))
			}
		}
	}
	return all
}

func nodes() []string { return []string{lab.NodeName(1), lab.NodeName(2), lab.NodeName(3)} }

// nodeIP returns the address of a node.
func (c *cluster) nodeIP(node string) netip.Addr {
	c.t.Helper()
	n, err := c.lab.NodeNumber(node)
	if err != nil {
		c.t.Fatal(err)
	}
	return lab.NodeIP(n)
}

// tenures returns who held an IP, as etcd has it.
func (c *cluster) tenures(ip netip.Addr) []string {
	c.t.Helper()
	var all []struct{ Node, Why string }
	out := c.egret("history", ip.String(), "-o", "json")
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		c.t.Fatalf("egret history %v: %v\n%s", ip, err, out)
	}
	var lines []string
	for _, one := range all {
		lines = append(lines, one.Node+" "+one.Why)
	}
	return lines
}

// explain logs what a person would look at.
func (c *cluster) explain() {
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"}, {"get", "nodes,egress"}, {"-n", "egret-system", "get", "events"},
		{"-n", "egret-system", "logs", "-l", "app.kubernetes.io/name=egret-agent", "--prefix", "--tail=30"},
		{"-n", "egret-system", "logs", "-l", "app.kubernetes.io/name=egret-crdsync", "--prefix", "--tail=30"},
		{"-n", "egret-system", "logs", "-l", "app.kubernetes.io/name=egret-credentials", "--prefix", "--tail=30"},
		{"-n", "egret-system", "logs", "deployment/egret-etcd-rbac", "--tail=20"},
		{"-n", "egret-system", "logs", "-l", "app.kubernetes.io/name=egret-etcd", "--prefix", "--tail=30"},
	} {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		out, err := c.lab.Kubectl(ctx, args...)
		cancel()
		var text strings.Builder
		for line := range strings.Lines(string(out)) {
			text.WriteString(line[:min(len(line), 300)])
		}
		c.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, text.String())
	}
}

func (c *cluster) file(path string) string {
	c.t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		c.t.Fatal(err)
	}
	return path
}

func (c *cluster) write(text string) string {
	c.t.Helper()
	// not a folder of the test, whose name may have commas: for kubectl they are between files
	dir, err := os.MkdirTemp("", "egret-kubelet-")
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "file.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}
