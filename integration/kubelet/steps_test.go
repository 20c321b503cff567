package kubelet

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// begin has the guide's pods run, and notes what nodes are like before Egret.
func (c *cluster) begin() {
	c.t.Helper()
	c.kubectl("apply", "-f", c.file("testdata/pods.yaml"))
	for _, d := range []string{"prod/web", "staging/web", "prod/db"} {
		namespace, name, _ := strings.Cut(d, "/")
		c.kubectl("-n", namespace, "rollout", "status", "deployment/"+name, "--timeout=120s")
	}
	c.before = map[string][]string{}
	for _, node := range nodes() {
		c.before[node] = c.kernel(node)
	}
}

// appliedWithOwnEtcd installs what the chart makes for the lab's etcd, which is without TLS.
func appliedWithOwnEtcd(t *testing.T, c *cluster) {
	c.begin()
	_, tag := split(*name)
	c.kubectl("apply", "-f", c.write(c.render(tag)))
	c.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
	c.rollout("daemonset/egret-agent", "deployment/egret-crdsync")
}

// helmInstalled does what docs/install.md says under Quick, on nodes with the label that kubeadm gives those of the
// control plane.
func helmInstalled(t *testing.T, c *cluster) {
	c.begin()
	c.kubectl("label", "nodes", "--all", "node-role.kubernetes.io/control-plane=")
	c.workloads = []string{"statefulset/egret-etcd", "deployment/egret-etcd-rbac", "deployment/egret-credentials",
		"daemonset/egret-agent", "deployment/egret-crdsync"}
	repository, tag := split(*name)
	c.helmInstall(documented(t, "Quick", "helm install", map[string]string{"REPOSITORY": repository, "TAG": tag}))
}

// helmInstall runs a command that installs the chart, with what the tests look at besides, and waits for all that it
// makes, which is all that there is.
func (c *cluster) helmInstall(command []string) {
	c.t.Helper()
	c.helm(append(command[1:], "--set", "crdsync.config.page-local-address=127.0.0.1:8487")...)
	c.settled()
	c.until(30*time.Second, "the webhook's certificate", func() (bool, string) {
		out := c.kubectl("get", "validatingwebhookconfiguration", "egret-crdsync", "-o", "jsonpath={.webhooks[0].clientConfig.caBundle}")
		return out != "", "there is no caBundle"
	})
	for _, p := range strings.Fields(c.kubectl("-n", "egret-system", "get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}`)) {
		if !strings.HasPrefix(p, "egret-") {
			c.t.Errorf("pod %s is not of the chart", p)
		}
	}
}

// eachItsOwn has etcd hold its clients to their roles, under a probe where it did not so far, and tries what an agent
// may not.
func eachItsOwn(t *testing.T, c *cluster) {
	if c.root != "" {
		at := func(name string) string { return filepath.Join(c.root, name) }
		ip, _ := c.gateway("egress-prod-web")
		end := c.lookedAt(c.webs()["egress-prod-web"], ip)
		said, err := c.byKubeconfig(documented(t, "Your own etcd", "egret etcd-rbac", map[string]string{
			"~/.kube/config": c.lab.Kubeconfig(), "ca.crt": at("ca.crt"), "root.crt": at("tls.crt"), "root.key": at("tls.key"),
		})[1:]...)
		if err != nil || !strings.HasSuffix(said, "etcdctl auth enable\n") {
			t.Errorf("egret etcd-rbac: %v, said:\n%s", err, said)
		}
		time.Sleep(2 * time.Second) // in which an agent without its rights would fall silent
		end()
	}
	asAgent := func(args ...string) error {
		_, err := c.tryKubectl(append([]string{"-n", "egret-system", "exec", "daemonset/egret-agent", "--", "egret"}, args...)...)
		return err
	}
	refused := func(err error) bool { return err != nil && strings.Contains(err.Error(), "permission denied") }
	c.until(30*time.Second, "etcd does not let an agent read what persons did", func() (bool, string) {
		err := asAgent("get", "acts")
		return refused(err), fmt.Sprint("it says ", err)
	})
	if err := asAgent("cordon", nodes()[0], "--yes"); !refused(err) {
		t.Errorf("an agent cordons a node: %v, want that it is refused", err)
	}
	if err := asAgent("get", "owners"); err != nil {
		t.Errorf("an agent reads its locks: %v", err)
	}
	ip, _ := c.gateway("egress-prod-web")
	for _, args := range [][]string{{"who", netip.AddrPortFrom(ip, 2048).String()}, {"trace", c.webs()["egress-prod-web"][0].name}} {
		if err := asAgent(args...); refused(err) {
			t.Errorf("egret %v in an agent's pod: %v", args, err)
		}
	}
	if out := c.egret("get", "allocations"); !strings.Contains(out, "egress-prod-web") {
		t.Errorf("crdsync reads of allocations:\n%s", out)
	}
}

// readers has the controller manager add the chart's rules to Kubernetes' own roles.
func readers(t *testing.T, c *cluster) {
	for role, may := range map[string]map[string]bool{
		"view":  {"list egresses": true, "list externalippools": true, "create egresses": false, "update externalippools": false},
		"edit":  {"list egresses": true, "create egresses": false},
		"admin": {"list egresses": true, "create egresses": true, "delete externalippools": true},
	} {
		c.kubectl("create", "clusterrolebinding", "reader-"+role, "--clusterrole="+role, "--user=reader-"+role)
		for what, want := range may {
			verb, resource, _ := strings.Cut(what, " ")
			answer := map[bool]string{true: "yes", false: "no"}[want]
			c.until(20*time.Second, role+" may "+what+": "+answer, func() (bool, string) {
				// its exit status is 1 when the answer is no
				out, err := c.tryKubectl("auth", "can-i", verb, resource+".crd.antrea.io", "--as=reader-"+role)
				said := strings.TrimSpace(out)
				return said == answer || !want && err != nil && strings.HasPrefix(said, answer), fmt.Sprintf("it says %q, %v", out, err)
			})
		}
		c.kubectl("delete", "clusterrolebinding", "reader-"+role)
	}
}

// nodeBeside returns a node that is another one.
func nodeBeside(node string) string {
	if node == nodes()[0] {
		return nodes()[1]
	}
	return nodes()[0]
}

// operated has the commands of an operator who is not in the cluster.
func operated(t *testing.T, c *cluster) {
	must := func(args ...string) string {
		t.Helper()
		out, err := c.operator(args...)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
	out := must("get", "nodes")
	for _, node := range nodes() {
		if !strings.Contains(out, node+" ") {
			t.Errorf("egret get nodes has no %s:\n%s", node, out)
		}
	}
	// its exit status says that all is well
	status := documented(t, "An operator's machine", "egret status", map[string]string{"~/.kube/config": c.lab.Kubeconfig()})[1:]
	c.until(30*time.Second, "egret status says that all is well", func() (bool, string) {
		out, err := c.byKubeconfig(status...)
		return err == nil, fmt.Sprintf("%v\n%s", err, out)
	})
	ip, gateway := c.gateway("egress-prod-web")
	p := c.webs()["egress-prod-web"][0]
	if out := must("trace", p.name); !strings.Contains(out, ip.String()) || !strings.Contains(out, gateway) {
		t.Errorf("egret trace %s says nothing of %v on %s:\n%s", p.name, ip, gateway, out)
	}
	to := nodeBeside(gateway)
	end := c.lookedAt(c.webs()["egress-prod-web"], ip)
	must("move", ip.String(), "--to", to)
	end()
	if _, at := c.gateway("egress-prod-web"); at != to {
		c.until(10*time.Second, "the move's node in the status", func() (bool, string) {
			_, at := c.gateway("egress-prod-web")
			return at == to, "it is " + at
		})
	}
}

// keptApart leaves one node for the replicas of crdsync: one runs, the other one waits for a node and is not started,
// where it would find its ports taken and be taken for ready by the probe of the other one.
func keptApart(t *testing.T, c *cluster) {
	const replicas = "app.kubernetes.io/name=egret-crdsync"
	c.kubectl("cordon", nodes()[0], nodes()[1])
	c.kubectl("-n", "egret-system", "delete", "pods", "-l", replicas)
	states := func() string {
		return c.kubectl("-n", "egret-system", "get", "pods", "-l", replicas, "-o",
			`jsonpath={range .items[*]}{.spec.nodeName}:{.status.phase}:{.status.containerStatuses[0].restartCount}:{.status.containerStatuses[0].ready}{"\n"}{end}`)
	}
	want := []string{":Pending::", nodes()[2] + ":Running:0:true"}
	c.until(60*time.Second, "one replica that runs, and one that waits", func() (bool, string) {
		have := strings.Fields(states())
		slices.Sort(have)
		return slices.Equal(have, want), fmt.Sprintf("%q, want %q", have, want)
	})
	c.kubectl("uncordon", nodes()[0], nodes()[1])
	c.rollout("deployment/egret-crdsync")
	if have := states(); strings.Count(have, "Running:0:true") != 2 {
		t.Errorf("with three nodes: %q, want two that never restarted", have)
	}
}

func guide(t *testing.T, c *cluster) {
	c.kubectl("apply", "-f", c.file("../../manifests/examples"))
	for egress, pods := range c.webs() {
		ip, node := c.gateway(egress)
		t.Logf("%s: %v on %s", egress, ip, node)
		c.leaves(pods, ip, 20*time.Second)
	}
	for _, db := range c.pods("prod", "db") {
		c.leaves([]pod{db}, c.nodeIP(db.node), 5*time.Second)
	}
	// as a user sees it: by kubectl alone
	for _, out := range []string{c.kubectl("get", "egress", "-o", "wide"), c.kubectl("describe", "egress", "egress-prod-web")} {
		if ip, node := c.gateway("egress-prod-web"); !strings.Contains(out, ip.String()) || !strings.Contains(out, node) {
			t.Errorf("%v on %s is not in:\n%s", ip, node, out)
		}
	}
	name := strings.Split(c.webs()["egress-prod-web"][0].name, "/")[1]
	ip, _ := c.gateway("egress-prod-web")
	out := c.kubectl("-n", "prod", "exec", name, "--", "nc", "203.0.113.10", "7")
	if seen, err := netip.ParseAddrPort(out); err != nil || seen.Addr() != ip {
		t.Errorf("kubectl exec %s -- nc: got %q, want %v and a port", name, out, ip)
	}
	out, err := c.tryKubectl("apply", "-f", c.file("testdata/faulty.yaml"))
	if err == nil || !strings.Contains(err.Error(), "10.10.0.9") {
		t.Errorf("applying a pool whose range ends before it begins: got %q, error %v, want that the webhook refuses it", out, err)
	}
}

// deadKubelet has the node not ready: the controller manager of the lab finds that after 16 s.
func deadKubelet(t *testing.T, c *cluster) {
	ip, node := c.gateway("egress-prod-web")
	pods := c.webs()["egress-prod-web"]
	dead := []string{"kubelet", "containerd"}
	end := c.lookedAt(pods, ip)
	if err := c.lab.KillServices(t.Context(), node, dead...); err != nil {
		t.Fatal(err)
	}
	c.kubectl("wait", "--for=condition=Ready=Unknown", "node/"+node, "--timeout=60s")
	time.Sleep(2 * time.Second) // in which an IP would move that followed the state of its node
	c.leaves(pods, ip, 5*time.Second)
	if err := c.lab.RestartServices(node, dead...); err != nil {
		t.Fatal(err)
	}
	c.kubectl("wait", "--for=condition=Ready", "node/"+node, "--timeout=60s")
	c.rollout("daemonset/egret-agent")
	end()
	if now, at := c.gateway("egress-prod-web"); now != ip || at != node {
		t.Errorf("egress-prod-web: got %v on %s, want %v on %s as before", now, at, ip, node)
	}
}

// allLookedAt is lookedAt for the pods of webs, and end also checks that nobody else held their IPs meanwhile.
func (c *cluster) allLookedAt() (end func()) {
	c.t.Helper()
	before := map[string][]string{}
	var ends []func()
	for egress, pods := range c.webs() {
		ip, _ := c.gateway(egress)
		before[egress] = c.tenures(ip)
		ends = append(ends, c.lookedAt(pods, ip))
	}
	return func() {
		c.t.Helper()
		for _, end := range ends {
			end()
		}
		for _, egress := range slices.Sorted(maps.Keys(before)) {
			ip, _ := c.gateway(egress)
			if diff := cmp.Diff(before[egress], c.tenures(ip)); diff != "" {
				c.t.Errorf("who held %v of %s (-before +after):\n%s", ip, egress, diff)
			}
		}
	}
}

func rolled(t *testing.T, c *cluster) {
	end := c.allLookedAt()
	_, tag := split(*name)
	for _, one := range []struct {
		to      string
		command []string
	}{
		{*nextTag, documented(t, "Upgrade and rollback", "helm upgrade", map[string]string{"TAG": *nextTag})},
		{tag, documented(t, "Upgrade and rollback", "helm rollback", nil)},
	} {
		to := one.to
		c.helm(one.command[1:]...)
		c.kubectl(append(documented(t, "Upgrade and rollback", "kubectl -n egret-system rollout status", nil)[1:], "--timeout=180s")...)
		c.settled()
		if out := c.egret("get", "nodes"); strings.Count(out, to+" ") < len(nodes()) {
			t.Errorf("after the rollout to %s, agents are:\n%s", to, out)
		}
	}
	end()
}

// stopsAtTheFirst upgrades to agents that do not start: one node's is replaced, whose kernel serves on, and no other.
// The rollback comes within the time for which the kernel does.
func stopsAtTheFirst(t *testing.T, c *cluster) {
	end := c.allLookedAt()
	c.helm("upgrade", "egret", c.file("../../charts/egret"), "-n", "egret-system", "--reset-then-reuse-values",
		"--set", "agent.config.lease-ttl=1s")
	var have []string
	c.until(60*time.Second, "an agent that did not start, twice", func() (bool, string) {
		have = strings.Fields(c.kubectl("-n", "egret-system", "get", "pods", "-l", "app.kubernetes.io/name=egret-agent", "-o",
			`jsonpath={range .items[*]}{.status.containerStatuses[0].restartCount}:{.status.containerStatuses[0].ready}{"\n"}{end}`))
		slices.Sort(have)
		return len(have) == len(nodes()) && have[len(have)-1] == "1:false", fmt.Sprintf("%q", have)
	})
	if want := []string{"0:true", "0:true", "1:false"}; !slices.Equal(have, want) {
		t.Errorf("agents, as restarts:ready: %q, want %q", have, want)
	}
	c.helm("rollback", "egret", "-n", "egret-system")
	c.settled()
	end()
}

// keptOff has a node join anew, whose kubelet registers it with the start-up taint: a pod that waits for it finds its
// egress at its first connection.
func keptOff(t *testing.T, c *cluster) {
	c.helm(documented(t, "Start-up taint", "helm upgrade", nil)[1:]...)
	c.settled()
	ip, gateway := c.gateway("egress-prod-web")
	node := nodeBeside(gateway)
	ranges := c.kubectl("get", "node", node, "-o", "jsonpath={.spec.podCIDRs}")
	first, _, _ := strings.Cut(strings.TrimPrefix(ranges, `["`), `"`)

	c.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
	c.kubectl("delete", "node", node)
	c.kubectl("delete", "pods", "-A", "--field-selector=spec.nodeName="+node, "--timeout=60s")
	c.until(60*time.Second, "etcd forgets the agent of a node that is gone", func() (bool, string) {
		out := c.egret("get", "agents")
		return !strings.Contains(out, node+" "), out
	})
	if err := errors.Join(c.lab.KillServices(t.Context(), node, "kubelet"),
		c.lab.ConfigureKubelet(node, "registerWithTaints: [{key: egret/agent-not-ready, effect: NoSchedule}]\n")); err != nil {
		t.Fatal(err)
	}
	c.kubectl("apply", "-f", c.write(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: early, namespace: prod, labels: {app: web}}
spec:
  terminationGracePeriodSeconds: 1
  nodeSelector: {kubernetes.io/hostname: %s}
  containers:
  - {name: c, image: "egret.test/busybox:1", imagePullPolicy: IfNotPresent, command: [sh, -c, "nc 203.0.113.10 7; sleep 1000"]}
`, node)))
	if err := c.lab.RestartServices(node, "kubelet"); err != nil {
		t.Fatal(err)
	}
	taints := func() (string, error) {
		return c.tryKubectl("get", "node", node, "-o", "jsonpath={.spec.taints[*].key}")
	}
	c.until(30*time.Second, "the kubelet registers with the taint", func() (bool, string) {
		have, err := taints()
		return strings.Contains(have, "egret/agent-not-ready"), fmt.Sprintf("taints %q, error %v", have, err)
	})
	// as the controller manager of a cluster does
	c.kubectl("patch", "node", node, "-p", fmt.Sprintf(`{"spec": {"podCIDR": %q, "podCIDRs": %s}}`, first, ranges))
	c.kubectl("-n", "prod", "wait", "--for=condition=Ready", "pod/early", "--timeout=120s")
	if have, err := taints(); err != nil || strings.Contains(have, "egret/agent-not-ready") {
		t.Errorf("taints %q, error %v, while a pod runs there that does not tolerate it", have, err)
	}
	var said string
	c.until(30*time.Second, "the first connection of a pod on a new node", func() (bool, string) {
		said = c.kubectl("-n", "prod", "logs", "early")
		return said != "", "no answer"
	})
	if seen, err := netip.ParseAddrPort(said); err != nil || seen.Addr() != ip {
		t.Errorf("the first connection of a pod on a new node comes from %q, want %v", said, ip)
	}
	c.kubectl("-n", "prod", "delete", "pod", "early")
	c.settled()
}

// leader returns the replica of crdsync that etcd says leads, empty where that was not to be had.
func (c *cluster) leader() (pod, have string) {
	c.t.Helper()
	out, err := c.tryEgret("status", "-o", "json") // its exit status says how all is
	var status struct{ Crdsync string }
	if bad := json.Unmarshal([]byte(out), &status); bad != nil {
		return "", fmt.Sprintf("egret status says %q: %v, %v", out, bad, err)
	}
	return status.Crdsync, fmt.Sprintf("%q leads", status.Crdsync)
}

func leaderDeleted(t *testing.T, c *cluster) {
	ip, _ := c.gateway("egress-staging-web")
	end := c.lookedAt(c.webs()["egress-staging-web"], ip)
	var leader string
	// that of before the rollout may be told until its lease ends
	c.until(30*time.Second, "a leader of crdsync that is there", func() (bool, string) {
		var have string
		leader, have = c.leader()
		names := strings.Fields(c.kubectl("-n", "egret-system", "get", "pods", "-o", "jsonpath={.items[*].metadata.name}"))
		return leader != "" && slices.Contains(names, leader), fmt.Sprintf("%s of %q", have, names)
	})
	c.kubectl("-n", "egret-system", "delete", "pod", leader, "--wait=false")
	c.kubectl("-n", "staging", "scale", "deployment/web", "--replicas=4")
	c.kubectl("-n", "staging", "rollout", "status", "deployment/web", "--timeout=60s")
	c.leaves(c.webs()["egress-staging-web"], ip, 15*time.Second)
	c.until(30*time.Second, "another leader than "+leader+", which was deleted", func() (bool, string) {
		now, have := c.leader()
		return now != leader && now != "", have
	})
	c.rollout("deployment/egret-crdsync")
	end()
	c.kubectl("-n", "staging", "scale", "deployment/web", "--replicas=3")
}

func drained(t *testing.T, c *cluster) {
	c.kubectl("-n", "staging", "rollout", "status", "deployment/web", "--timeout=60s")
	ip, gateway := c.gateway("egress-prod-web")
	others := slices.DeleteFunc(c.webs()["egress-prod-web"], func(p pod) bool { return p.node == gateway })
	end := c.lookedAt(others, ip)
	c.kubectl("drain", gateway, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=120s")
	deadline := time.Now().Add(30 * time.Second)
	for {
		if _, at := c.gateway("egress-prod-web"); at != gateway {
			t.Logf("%v moved from %s to %s", ip, gateway, at)
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v is still on %s, which is drained", ip, gateway)
		}
		time.Sleep(100 * time.Millisecond)
	}
	for _, d := range []string{"prod", "staging"} {
		c.kubectl("-n", d, "rollout", "status", "deployment/web", "--timeout=60s")
	}
	end()
	for egress, pods := range c.webs() {
		ip, _ := c.gateway(egress)
		c.leaves(pods, ip, 10*time.Second)
	}
	c.kubectl("uncordon", gateway)
	c.rollout("deployment/egret-crdsync")
}

// restored takes a snapshot by the CronJob of the chart, writes something after it, and has all members begin with it,
// as docs/install.md says.
func restored(t *testing.T, c *cluster) {
	const system = "egret-system"
	before := map[string]string{}
	for egress := range c.webs() {
		ip, _ := c.gateway(egress)
		before[egress] = ip.String()
	}
	job := map[string]string{"JOB": "snapshot"}
	c.kubectl(documented(t, "An etcd of its own", "kubectl -n egret-system create job", job)[1:]...)
	c.kubectl(documented(t, "An etcd of its own", "kubectl -n egret-system wait --for=condition=Complete", job)[1:]...)
	said := c.kubectl(documented(t, "An etcd of its own", "kubectl -n egret-system logs", job)[1:]...)
	path, _, ok := strings.Cut(said, ": revision ")
	if !ok {
		t.Fatalf("the snapshot says %q", said)
	}
	file := filepath.Base(path)
	node := c.kubectl("-n", system, "get", "pods", "-l", "job-name=snapshot", "-o", "jsonpath={.items[0].spec.nodeName}")
	if out, err := c.operator("cordon", nodes()[0], "--yes"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}

	// What is on a node is done as by ssh.
	at := func(node, path string) string {
		root, err := c.lab.NodeRoot(node)
		if err != nil {
			t.Fatal(err)
		}
		return root + "/var/lib/egret-etcd/" + path
	}
	snapshot, err := os.ReadFile(at(node, "snapshots/"+file))
	if err != nil {
		t.Fatal(err)
	}
	c.kubectl(documented(t, "An etcd of its own", "kubectl -n egret-system scale", nil)[1:]...)
	c.kubectl(documented(t, "An etcd of its own", "kubectl -n egret-system wait --for=delete", nil)[1:]...)
	for _, node := range nodes() {
		if err := errors.Join(os.MkdirAll(at(node, "snapshots"), 0o700), os.WriteFile(at(node, "snapshots/"+file), snapshot, 0o600)); err != nil {
			t.Fatal(err)
		}
		members, err := filepath.Glob(at(node, "egret-etcd-*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range members {
			_, number, _ := strings.Cut(filepath.Base(m), "egret-etcd")
			mv := documented(t, "An etcd of its own", "mv ", map[string]string{"-N": number})
			if err := os.Rename(at(node, filepath.Base(mv[1])), at(node, filepath.Base(mv[2]))); err != nil {
				t.Fatal(err)
			}
		}
	}
	c.helm(documented(t, "An etcd of its own", "helm upgrade egret charts/egret -n egret-system --reset-then-reuse-values --set etcd.bundled.restoreFrom=FILE", map[string]string{"FILE": file})[1:]...)
	c.settled()
	for egress, pods := range c.webs() {
		ip, _ := c.gateway(egress)
		if ip.String() != before[egress] {
			t.Errorf("%s: %v after the restore, want %s as before", egress, ip, before[egress])
		}
		c.leaves(pods, ip, 60*time.Second)
	}
	if out, err := c.operator("get", "cordons"); err != nil || strings.Contains(out, nodes()[0]) {
		t.Errorf("cordons: %q, error %v; want none: it was written after the snapshot", out, err)
	}
	c.helm(documented(t, "An etcd of its own", "helm upgrade egret charts/egret -n egret-system --reset-then-reuse-values --set etcd.bundled.restoreFrom=", nil)[1:]...)
	c.settled()

	// A node that comes back without its disk.
	pod := c.kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/name=egret-etcd", "--field-selector=spec.nodeName="+nodes()[0], "-o", "jsonpath={.items[0].metadata.name}")
	if err := os.Rename(at(nodes()[0], pod), at(nodes()[0], "lost")); err != nil {
		t.Fatal(err)
	}
	c.kubectl("-n", system, "delete", "pod", pod)
	c.rollout("statefulset/egret-etcd")
	if has, err := filepath.Glob(at(nodes()[0], pod+"/member/wal/*.wal")); err != nil || len(has) == 0 {
		t.Errorf("%s, whose data was lost, is ready, and has no data: %v", pod, err)
	}
}

// gone does what docs/install.md says of the kernels, and uninstall what it says of the objects.
func (c *cluster) gone(uninstall func()) {
	c.t.Helper()
	t := c.t
	c.kubectl(documented(t, "Uninstall", "kubectl delete egresses,externalippools", nil)[1:]...)
	c.kubectl(documented(t, "Uninstall", "kubectl -n egret-system patch daemonset", nil)[1:]...)
	c.kubectl(append(documented(t, "Uninstall", "kubectl -n egret-system rollout status", nil)[1:], "--timeout=180s")...)
	uninstall()
	for _, node := range nodes() {
		if diff := cmp.Diff(c.before[node], c.kernel(node)); diff != "" {
			c.t.Errorf("%s (-before Egret +after its end):\n%s", node, diff)
		}
	}
	for _, pods := range c.webs() {
		for _, p := range pods {
			c.leaves([]pod{p}, c.nodeIP(p.node), 10*time.Second)
		}
	}
}

func deletedByKubectl(t *testing.T, c *cluster) {
	c.gone(func() {
		_, tag := split(*name)
		c.kubectl("delete", "-f", c.write(c.render(tag)), "--timeout=120s")
	})
}

func uninstalledByHelm(t *testing.T, c *cluster) {
	c.gone(func() {
		c.helm(append(documented(t, "Uninstall", "helm uninstall", nil)[1:], "--wait")...)
		c.kubectl("delete", "namespace", "egret-system", "--timeout=120s")
		if out := c.kubectl("get", "clusterroles,clusterrolebindings,validatingwebhookconfigurations,validatingadmissionpolicies", "-o", "name"); strings.Contains(out, "egret") {
			t.Errorf("after helm uninstall there are:\n%s", out)
		}
	})
}
