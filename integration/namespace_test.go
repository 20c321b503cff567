package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// namespace gives a test names of its own, and removes what it made.
type namespace struct {
	t    *testing.T
	name string
	pods []string
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	n := &namespace{t: t, name: "t-" + strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name()))}
	n.name = strings.TrimRight(n.name[:min(len(n.name), 40)], "-")
	t.Cleanup(n.clean)
	return n
}

func (n *namespace) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if _, err := cluster.Kubectl(ctx, "delete", "egress,externalippool", "-l", "test="+n.name, "--ignore-not-found"); err != nil {
		n.t.Errorf("removing the egresses of the test: %v", err)
	}
	for _, name := range n.pods {
		if err := cluster.RemovePod(ctx, name); err != nil {
			n.t.Errorf("removing pod %s: %v", name, err)
		}
	}
}

// pod makes a pod and returns its full name.
func (n *namespace) pod(name, node, app string) string {
	n.t.Helper()
	full := n.name + "/" + name
	if _, err := cluster.Pod(n.t.Context(), lab.PodConfig{Name: full, Node: node, Labels: map[string]string{"app": app}}); err != nil {
		n.t.Fatal(err)
	}
	n.pods = append(n.pods, full)
	return full
}

// remove removes a pod before the test's end.
func (n *namespace) remove(pod string) {
	n.t.Helper()
	n.pods = slices.DeleteFunc(n.pods, func(p string) bool { return p == pod })
	if err := cluster.RemovePod(n.t.Context(), pod); err != nil {
		n.t.Fatal(err)
	}
}

// pool makes a pool with the given first and last address.
func (n *namespace) pool(name, start, end string) {
	n.t.Helper()
	n.apply(map[string]any{"kind": "ExternalIPPool", "metadata": n.meta(name), "spec": map[string]any{
		"ipRanges": []any{map[string]any{"start": start, "end": end}}, "nodeSelector": map[string]any{}}})
}

// egress makes an egress for the test's pods with the label app=<app>.
func (n *namespace) egress(name, pool, app string) {
	n.t.Helper()
	n.apply(map[string]any{"kind": "Egress", "metadata": n.meta(name), "spec": map[string]any{
		"externalIPPool": pool, "appliedTo": map[string]any{
			"namespaceSelector": map[string]any{"matchLabels": map[string]any{"kubernetes.io/metadata.name": n.name}},
			"podSelector":       map[string]any{"matchLabels": map[string]any{"app": app}}}}})
}

// remote makes a pool of one address with an egress for app=web, both of that name, and a pod that is selected, on
// another node than the gateway's.
func (n *namespace) remote(name, address string) (ip netip.Addr, gateway, pod string) {
	n.t.Helper()
	n.pool(name, address, address)
	n.egress(name, name, "web")
	ip, gateway = held(n.t, name)
	pod = n.pod("web", otherNode(gateway), "web")
	selected(n.t, pod, ip)
	return ip, gateway, pod
}

func (n *namespace) meta(name string) map[string]any {
	return map[string]any{"name": name, "labels": map[string]any{"test": n.name}}
}

func (n *namespace) apply(object map[string]any) {
	n.t.Helper()
	object["apiVersion"] = "crd.antrea.io/v1beta1"
	b, err := json.Marshal(object)
	if err != nil {
		n.t.Fatal(err)
	}
	path := n.t.TempDir() + "/object.json"
	if err := os.WriteFile(path, b, 0o600); err != nil {
		n.t.Fatal(err)
	}
	kubectl(n.t, "apply", "-f", path)
}

func kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := cluster.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// egret runs the operator's command.
func egret(t *testing.T, args ...string) string {
	t.Helper()
	out, err := cluster.Egret(t.Context(), args...)
	if err != nil {
		t.Fatalf("egret %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// records returns what etcd holds of a kind.
func records[T any](t *testing.T, kind string) []T {
	t.Helper()
	var out []T
	if err := json.Unmarshal([]byte(egret(t, "get", kind, "-o", "json")), &out); err != nil {
		t.Fatalf("egret get %s: %v", kind, err)
	}
	return out
}

// held waits until the egress has an IP and an owner, and returns both.
func held(t *testing.T, name string) (netip.Addr, string) {
	t.Helper()
	var ip netip.Addr
	var node string
	eventually(t, 15*time.Second, func() error {
		ip, node = lookUp(t, name)
		if node == "" {
			return fmt.Errorf("egress %s: IP %v, no owner", name, ip)
		}
		return nil
	})
	return ip, node
}

func lookUp(t *testing.T, name string) (netip.Addr, string) {
	t.Helper()
	for _, p := range records[egress.Policy](t, "egresses") {
		if p.Name == name && len(p.Addresses) > 0 {
			ip := p.Addresses[0].IP
			for _, o := range records[egress.Owner](t, "owners") {
				if o.IP == ip {
					return ip, o.Node
				}
			}
			return ip, ""
		}
	}
	return netip.Addr{}, ""
}

// eventually repeats f until it returns nil.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(20 * time.Millisecond) // a poll from outside: no event says when it is there
	}
}

// leavesAs waits until the outside host sees the pod come from want.
func leavesAs(t *testing.T, pod string, want netip.Addr) {
	t.Helper()
	leavesWithin(t, 5*time.Second, pod, want)
}

// leavesWithin waits until the outside host sees the pod come from want.
func leavesWithin(t *testing.T, limit time.Duration, pod string, want netip.Addr) {
	t.Helper()
	eventually(t, limit, func() error {
		// A connection that the pod opened before its node knew it is cut off when it does: the next one tells.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		got, err := cluster.SourceTo(ctx, pod, outsideOf(want))
		if err == nil && got != want {
			err = fmt.Errorf("the outside host saw %s, want %s", got, want)
		}
		if err != nil {
			return fmt.Errorf("pod %s: %w", pod, err)
		}
		return nil
	})
}

func nodeIP(t *testing.T, node string) netip.Addr {
	t.Helper()
	n, err := cluster.NodeNumber(node)
	if err != nil {
		t.Fatal(err)
	}
	return lab.NodeIP(n)
}

func nodes() []string { return []string{"node-1", "node-2", "node-3"} }

// otherNode returns a node that is none of those.
func otherNode(not ...string) string {
	for _, n := range nodes() {
		if !slices.Contains(not, n) {
			return n
		}
	}
	panic("no node is left")
}

// probe is probeTo lab.OutsideIP.
func probe(t *testing.T, pod string, d time.Duration, f func()) lab.ProbeResult {
	t.Helper()
	return probeTo(t, lab.OutsideIP, pod, d, f)
}

// probeTo runs a probe from the pod to an address of the outside host every 1 ms, and f after its first half second.
func probeTo(t *testing.T, to netip.Addr, pod string, d time.Duration, f func()) lab.ProbeResult {
	t.Helper()
	type outcome struct {
		lab.ProbeResult
		err error
	}
	done := make(chan outcome, 1)
	go func() {
		r, err := cluster.ProbeTo(t.Context(), pod, to, time.Millisecond, d)
		done <- outcome{r, err}
	}()
	time.Sleep(500 * time.Millisecond) // the probe runs by then, with something to compare with
	f()
	o := <-done
	if o.err != nil {
		t.Fatalf("probing from %s: %v", pod, o.err)
	}
	return o.ProbeResult
}

// only fails the test when the probe was seen with another source than ip, or with several source ports, or not at all.
func only(t *testing.T, r lab.ProbeResult, ip netip.Addr) {
	t.Helper()
	if len(r.Sources) != 1 || r.Sources[ip] == 0 {
		t.Errorf("sources %v, want only %s", r.Sources, ip)
	}
	if len(r.Ports) > 1 {
		t.Errorf("source ports %v: SNAT did not keep the port", r.Ports)
	}
}

// lossless fails the test when a probe of an interval of 1 ms lost packets. Where the machine stalled, the agents had
// no time to renew their permits either: as long as it stalled, packets may be lost.
func lossless(t *testing.T, what string, r lab.ProbeResult) {
	t.Helper()
	if r.Lost > 0 {
		t.Logf("%s: %d of %d packets lost, longest gap %v; the machine stalled for %v", what, r.Lost, r.Sent, r.LongestGap, r.Stalled)
	}
	if time.Duration(r.Lost)*time.Millisecond > r.Stalled {
		t.Errorf("%s: %d of %d packets lost, want none", what, r.Lost, r.Sent)
	}
}

// volatile is what nft prints that changes by itself, as what renews the permits does, and whether a table is owned,
// which an agent does while it runs.
var volatile = regexp.MustCompile(`(?ms)^\tset (alive|ticket) \{.*?^\t\}\n|counter packets \d+ bytes \d+| ?expires \S+|# handle \d+| # progname \S+|(?m)^\tflags( owner| )?\n`)

// clocks are the sets in what nft prints by which permits end: their elements come and go with every renewal.
var clocks = regexp.MustCompile(`(?s)\tset (alive|ticket) \{.*?\n\t\}\n`)

// renewal is what nft monitor prints of permits that are renewed by a commit.
var renewal = regexp.MustCompile(`^((add|delete) element (inet|arp|netdev) egret (permit4|permit6|answer6|alive) |# new generation )`)

// takeover is what nft monitor prints of tables that get an owner.
var takeover = regexp.MustCompile(`^add table (inet|arp|netdev) egret\b`)

// stable returns what a command printed without what changes by itself.
func stable(s string) string { return strings.TrimSpace(volatile.ReplaceAllString(s, "")) }

// ownership returns who holds what.
func ownership(t *testing.T) map[netip.Addr]string {
	t.Helper()
	out := map[netip.Addr]string{}
	for _, o := range records[egress.Owner](t, "owners") {
		out[o.IP] = o.Node
	}
	return out
}
