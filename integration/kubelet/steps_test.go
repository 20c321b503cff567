package kubelet

import (
	"encoding/json"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func installed(t *testing.T, c *cluster) {
	c.kubectl("apply", "-f", c.file("testdata/pods.yaml"))
	for _, d := range []string{"prod/web", "staging/web", "prod/db"} {
		namespace, name, _ := strings.Cut(d, "/")
		c.kubectl("-n", namespace, "rollout", "status", "deployment/"+name, "--timeout=120s")
	}
	c.before = map[string][]string{}
	for _, node := range nodes() {
		c.before[node] = c.kernel(node)
	}
	_, tag := split(*name)
	c.apply(tag)
	c.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
	c.rollout("daemonset/egret-agent", "deployment/egret-crdsync")
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
	c.leaves(pods, ip, 0)
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

func rolled(t *testing.T, c *cluster) {
	before := map[string][]string{}
	var ends []func()
	for egress, pods := range c.webs() {
		ip, _ := c.gateway(egress)
		before[egress] = c.tenures(ip)
		ends = append(ends, c.lookedAt(pods, ip))
	}
	_, tag := split(*name)
	for _, to := range []string{*nextTag, tag} {
		c.apply(to)
		c.rollout("daemonset/egret-agent", "deployment/egret-crdsync")
		if out := c.egret("get", "nodes"); strings.Count(out, to+" ") < len(nodes()) {
			t.Errorf("after the rollout to %s, agents are:\n%s", to, out)
		}
	}
	for _, end := range ends {
		end()
	}
	for _, egress := range slices.Sorted(maps.Keys(before)) {
		ip, _ := c.gateway(egress)
		if diff := cmp.Diff(before[egress], c.tenures(ip)); diff != "" {
			t.Errorf("who held %v of %s (-before +after):\n%s", ip, egress, diff)
		}
	}
}

func (c *cluster) leader() string {
	c.t.Helper()
	// its exit status says how all is
	out, _ := c.tryKubectl("-n", "egret-system", "exec", "daemonset/egret-agent", "--", "egret", "status", "-o", "json")
	var status struct{ Crdsync string }
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		c.t.Fatalf("egret status: %v\n%s", err, out)
	}
	return status.Crdsync
}

func leaderDeleted(t *testing.T, c *cluster) {
	ip, _ := c.gateway("egress-staging-web")
	end := c.lookedAt(c.webs()["egress-staging-web"], ip)
	leader := c.leader()
	c.kubectl("-n", "egret-system", "delete", "pod", leader, "--wait=false")
	c.kubectl("-n", "staging", "scale", "deployment/web", "--replicas=4")
	c.kubectl("-n", "staging", "rollout", "status", "deployment/web", "--timeout=60s")
	c.leaves(c.webs()["egress-staging-web"], ip, 15*time.Second)
	if now := c.leader(); now == leader || now == "" {
		t.Errorf("crdsync's leader: got %q, want another than %s, which was deleted", now, leader)
	}
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

// uninstalled does what docs/install.md says.
func uninstalled(t *testing.T, c *cluster) {
	c.kubectl("delete", "egresses,externalippools", "--all")
	c.kubectl("-n", "egret-system", "patch", "daemonset", "egret-agent", "--type=json", "-p", `[
  {"op": "replace", "path": "/spec/updateStrategy/rollingUpdate/maxUnavailable", "value": "100%"},
  {"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": ["cleanup", "--stay"]}]`)
	c.rollout("daemonset/egret-agent")
	_, tag := split(*name)
	c.kubectl("delete", "-f", c.write(c.render(tag)), "--timeout=120s")
	for _, node := range nodes() {
		if diff := cmp.Diff(c.before[node], c.kernel(node)); diff != "" {
			t.Errorf("%s (-before Egret +after its end):\n%s", node, diff)
		}
	}
	for _, pods := range c.webs() {
		for _, p := range pods {
			c.leaves([]pod{p}, c.nodeIP(p.node), 10*time.Second)
		}
	}
}
