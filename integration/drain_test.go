package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// history returns the tenures of an IP, as "node why from".
func history(t *testing.T, ip netip.Addr) []string {
	t.Helper()
	var tenures []egress.Tenure
	if err := json.Unmarshal([]byte(egret(t, "history", ip.String(), "-o", "json")), &tenures); err != nil {
		t.Fatalf("egret history %s: %v", ip, err)
	}
	var out []string
	for _, h := range tenures {
		out = append(out, strings.TrimSpace(fmt.Sprint(h.Node, " ", h.Why, " ", h.From)))
	}
	return out
}

func TestDrainLosesNoPacketAndTheHistoryShowsIt(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("drain", "10.10.0.43")
	other := otherNode(gateway, otherNode(gateway)) // the pod is on the third
	podNode := otherNode(gateway)
	pinned := egret(t, "move", ip.String(), "--to", gateway, "--pin")
	if !strings.Contains(pinned, "already") || !strings.Contains(pinned, "pinned to "+gateway) {
		t.Errorf("egret move --pin to where it is: %s", pinned)
	}
	// Kubernetes' own cordon keeps the IP away from the pod's node: a move to it is not free for its pods.
	kubectl(t, "cordon", podNode)
	uncordon := func() {
		for _, args := range [][]string{{"kubectl", podNode}, {"egret", gateway}, {"egret", other}} {
			run := cluster.Kubectl
			if args[0] == "egret" {
				run = cluster.Egret
			}
			if out, err := run(context.Background(), "uncordon", args[1]); err != nil {
				t.Errorf("%s uncordon %s: %v\n%s", args[0], args[1], err, out)
			}
		}
	}
	t.Cleanup(uncordon)
	eventually(t, 5*time.Second, func() error {
		for _, node := range records[egress.Node](t, "nodes") {
			if node.Name == podNode && !node.Cordoned {
				return fmt.Errorf("%s is not cordoned in etcd", podNode)
			}
		}
		return nil
	})
	result := probe(t, pod, 3*time.Second, func() {
		t.Log(strings.TrimSpace(egret(t, "drain", gateway, "--wait", "--timeout", "20s")))
	})
	only(t, result, ip)
	lossless(t, "drain", result)
	if owner := ownership(t)[ip]; owner != other {
		t.Errorf("the owner is %s, want %s: %s is drained, %s cordoned in Kubernetes", owner, other, gateway, podNode)
	}
	got := history(t, ip)
	if want := other + " drain " + gateway; len(got) < 2 || got[len(got)-1] != want || !strings.HasSuffix(got[len(got)-2], " claim") {
		t.Errorf("history %q, want a claim, and %q at its end", got, want)
	}
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	shown := egret(t, "history", ip.String())
	if line := strings.Fields(shown[strings.LastIndex(strings.TrimSpace(shown), "\n")+1:]); !strings.HasSuffix(line[len(line)-1], "@"+host) {
		t.Errorf("the history does not say who drained:\n%s", shown)
	}
	t.Log("\n" + shown)

	// Nobody is left who could take it: it is served all the same.
	out, err := cluster.Egret(t.Context(), "drain", other, "--wait", "--timeout", "2s")
	if err == nil || !strings.Contains(fmt.Sprint(err, string(out)), "no other node that pool drain selects") {
		t.Errorf("draining the last node: %v\n%s\nwant an error that says who is missing", err, out)
	}
	leavesAs(t, pod, ip)
	// As soon as somebody can, it moves.
	result = probe(t, pod, 3*time.Second, func() {
		egret(t, "uncordon", gateway)
		eventually(t, 2*time.Second, func() error {
			if owner := ownership(t)[ip]; owner != gateway {
				return fmt.Errorf("the owner is %s, want %s", owner, gateway)
			}
			return nil
		})
	})
	only(t, result, ip)
	lossless(t, "when room appeared", result)
	if out := egret(t, "unpin", ip.String()); !strings.Contains(out, "unpinned") {
		t.Errorf("egret unpin: %s", out)
	}
}

// TestABrokenPoolHoldsUpNoMoveOfOthers has a pool whose gateway is the node that holds its IP: the kernel refuses such
// a route.
func TestABrokenPoolHoldsUpNoMoveOfOthers(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("healthy", "10.10.0.88")
	to := otherNode(gateway, otherNode(gateway))
	n.apply(map[string]any{"kind": "ExternalIPPool", "metadata": n.meta("broken"), "spec": map[string]any{
		"ipRanges":     []any{map[string]any{"start": "10.10.0.89", "end": "10.10.0.89"}},
		"subnetInfo":   map[string]any{"gateway": nodeIP(t, to).String(), "prefixLength": 24},
		"nodeSelector": map[string]any{"matchLabels": map[string]any{"kubernetes.io/hostname": to}}}})
	n.egress("broken", "broken", "none")
	etcd := etcdClient(t)
	eventually(t, 10*time.Second, func() error {
		r, err := etcd.Get(t.Context(), "/egret/agents/"+to)
		if err != nil || len(r.Kvs) != 1 || !strings.Contains(string(r.Kvs[0].Value), "faults") {
			return fmt.Errorf("%s is not at fault: %v, %v", to, r, err)
		}
		return nil
	})
	for _, to := range []string{to, gateway} {
		result := probe(t, pod, 2*time.Second, func() { t.Log(strings.TrimSpace(egret(t, "move", ip.String(), "--to", to, "--timeout", "4s"))) })
		only(t, result, ip)
		lossless(t, "move to "+to, result)
	}
}

func TestIPLeavesANodeThatStopsMatchingWithinASecond(t *testing.T) {
	n := newNamespace(t)
	for _, node := range nodes() {
		kubectl(t, "label", "node", node, "gateway=yes")
	}
	t.Cleanup(func() {
		for _, node := range nodes() {
			_, _ = cluster.Kubectl(context.Background(), "label", "node", node, "gateway-") // the lab ends anyway
		}
	})
	n.apply(map[string]any{"kind": "ExternalIPPool", "metadata": n.meta("labels"), "spec": map[string]any{
		"ipRanges":     []any{map[string]any{"start": "10.10.0.44", "end": "10.10.0.44"}},
		"nodeSelector": map[string]any{"matchLabels": map[string]any{"gateway": "yes"}}}})
	n.egress("labels", "labels", "web")
	ip, gateway := held(t, "labels")
	pod := n.pod("web", otherNode(gateway), "web")
	selected(t, pod, ip)
	result := probe(t, pod, 3*time.Second, func() { kubectl(t, "label", "node", gateway, "gateway-") })
	only(t, result, ip)
	if result.LongestGap > 1500*time.Millisecond {
		t.Errorf("%v without an answer, want a second and a half at most", result.LongestGap)
	}
	if owner := ownership(t)[ip]; owner == gateway || owner == "" {
		t.Errorf("the owner is %q, and the pool does not select %s any more", owner, gateway)
	}
	if got := history(t, ip); len(got) != 3 || got[1] != "release "+gateway {
		t.Errorf("history %q, want that %s gave it back", got, gateway)
	}
	t.Logf("longest gap %v", result.LongestGap)
}

func TestIPsComeBackToTheirNodeOneAtATimeAfterTheHoldDown(t *testing.T) {
	const holdDown = 3 * time.Second
	l, err := lab.Up(t.Context(), lab.Config{
		Name: lab.OwnName("rebalance"), Nodes: 2, LeaseTTL: leaseTTL, AgentFlags: []string{"--rebalance=auto", "--rebalance-hold-down=" + holdDown.String()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	run := func(what string, run func(context.Context, ...string) ([]byte, error), args ...string) []byte {
		t.Helper()
		out, err := run(t.Context(), args...)
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", what, args, err, out)
		}
		return out
	}
	objects := []string{`{"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": {"name": "pool"},
		"spec": {"ipRanges": [{"start": "10.10.0.11", "end": "10.10.0.14"}], "nodeSelector": {}}}`}
	for i := range 4 {
		objects = append(objects, fmt.Sprintf(`{"apiVersion": "crd.antrea.io/v1beta1", "kind": "Egress", "metadata": {"name": "e%d"},
			"spec": {"externalIPPool": "pool", "appliedTo": {"podSelector": {"matchLabels": {"app": "e%d"}}}}}`, i, i))
	}
	for i, object := range objects {
		file := fmt.Sprintf("%s/%d.json", t.TempDir(), i)
		if err := os.WriteFile(file, []byte(object), 0o600); err != nil {
			t.Fatal(err)
		}
		run("kubectl", l.Kubectl, "apply", "-f", file)
	}
	spread := func(want ...int) (owners []egress.Owner) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			owners = nil
			if err := json.Unmarshal(run("egret", l.Egret, "get", "owners", "-o", "json"), &owners); err != nil {
				return err
			}
			got := []int{0, 0}
			for _, o := range owners {
				got[o.Node[len("node-")]-'1']++
			}
			if !slices.Equal(got, want) {
				return fmt.Errorf("the nodes hold %v, want %v", got, want)
			}
			return nil
		})
		return owners
	}
	first := spread(2, 2)
	if err := l.Crash(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	spread(0, 4)
	if err := l.Recover(t.Context(), "node-1"); err != nil {
		t.Fatal(err)
	}
	back := time.Now()
	last := spread(2, 2)
	if took := time.Since(back); took < holdDown {
		t.Errorf("back after %v, want %v at least", took, holdDown)
	}
	for i, o := range last {
		if o.Node != first[i].Node {
			t.Errorf("%s is on %s, and was on %s", o.IP, o.Node, first[i].Node)
		}
		if o.Node == "node-1" && o.Why != egress.ReasonRebalance {
			t.Errorf("%s came back by %q, want %q", o.IP, o.Why, egress.ReasonRebalance)
		}
		if o.Node == "node-1" {
			t.Log("\n" + string(run("egret", l.Egret, "history", o.IP.String())))
		}
	}
}
