package integration

import (
	"context"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/egret-project/egret/integration/lab"
)

// shareLimit has the pods of an egress send as much as they can at once, while it is limited.
func shareLimit(t *testing.T, name, gateway string, pods []string) {
	t.Helper()
	patch := func(bandwidth string) {
		t.Helper()
		kubectl(t, "patch", "egress", name, "--type", "merge", "-p", `{"spec":{"bandwidth":`+bandwidth+`}}`)
	}
	patch(`{"rate":"10M","burst":"1M"}`)
	defer patch("null")
	eventually(t, 5*time.Second, func() error {
		out, err := cluster.Exec(t.Context(), "node", gateway, "nft", "list", "limits", "table", "inet", "egret")
		if err == nil && !strings.Contains(string(out), "rate over 1210938 bytes/second") { // 31/32 of it
			err = fmt.Errorf("no limit on %s:\n%s", gateway, out)
		}
		return err
	})
	var sending errgroup.Group
	each := make([]float64, len(pods))
	for i, pod := range pods {
		sending.Go(func() (err error) {
			each[i], err = cluster.Throughput(t.Context(), pod, lab.OutsideIP, 10*time.Second)
			return err
		})
	}
	if err := sending.Wait(); err != nil {
		t.Fatal(err)
	}
	all := 0.0
	for _, one := range each {
		all += one / 1e6
	}
	t.Logf("limit 10 Mbit/s: %.1f of %d pods", all, len(pods))
	if math.Abs(all-10) > 1.5 {
		t.Errorf("limit 10 Mbit/s: %.1f arrived of %d pods, %.0f: want that they share it", all, len(pods), each)
	}
}

// TestAStaticIPIsServedWhereItIs follows an IP that an administrator puts on nodes by hand. The second of two nodes
// that have it, and the one that has it for kube-proxy alone, keep silent about it in ARP, as those of such a cluster
// do.
func TestAStaticIPIsServedWhereItIs(t *testing.T) {
	const name, address = "static", "10.10.0.60"
	ip := netip.MustParseAddr(address)
	n := newNamespace(t)
	on := func(node string, lines ...string) {
		t.Helper()
		for _, line := range lines {
			if out, err := cluster.Exec(context.Background(), "node", node, strings.Fields(line)...); err != nil {
				t.Fatalf("%s: %s: %v\n%s", node, line, err, out)
			}
		}
	}
	has := map[string]bool{}
	put := func(node string) {
		t.Helper()
		on(node, "ip addr add "+address+"/32 dev eth0")
		has[node] = true
		// as an announcement does
		if _, err := cluster.Exec(t.Context(), "outside", "", "ip", "neigh", "flush", "to", address); err != nil {
			t.Fatal(err)
		}
	}
	take := func(node string) {
		t.Helper()
		on(node, "ip addr del "+address+"/32 dev eth0")
		delete(has, node)
	}
	wantAssigned := func(want string) {
		t.Helper()
		eventually(t, 10*time.Second, func() error {
			if got := condition(t, name, "IPAssigned"); got != want {
				return fmt.Errorf("condition %q, want %q", got, want)
			}
			return nil
		})
	}
	const nowhere = "False AssignmentError no node with a live agent has " + address + " on an interface"
	t.Cleanup(func() {
		for node := range has {
			take(node)
		}
	})

	n.apply(map[string]any{"kind": "Egress", "metadata": n.meta(name), "spec": map[string]any{
		"egressIP": address, "appliedTo": map[string]any{
			"namespaceSelector": map[string]any{"matchLabels": map[string]any{"kubernetes.io/metadata.name": n.name}},
			"podSelector":       map[string]any{"matchLabels": map[string]any{"app": "web"}}}}})
	wantAssigned(nowhere)
	on("node-1", "sysctl -qw net.ipv4.conf.all.arp_ignore=1", "ip link add kube-ipvs0 type bridge", "ip addr add "+address+"/32 dev kube-ipvs0")
	t.Cleanup(func() { on("node-1", "ip link del kube-ipvs0", "sysctl -qw net.ipv4.conf.all.arp_ignore=0") })
	pods := []string{n.pod("one", "node-1", "web"), n.pod("two", "node-2", "web"), n.pod("three", "node-3", "web")}
	dropped := func() {
		t.Helper()
		eventually(t, 10*time.Second, func() error { // the node has to know the pod first
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if got, err := cluster.SourceTo(ctx, pods[2], outsideOf(ip)); err == nil {
				return fmt.Errorf("no node has %s, and the outside host saw the pod come from %s", ip, got)
			}
			return nil
		})
	}
	dropped()
	wantAssigned(nowhere) // on kube-ipvs0 it does not count

	put("node-2")
	wantAssigned("True Assigned " + address + " is on node node-2")
	for _, pod := range pods {
		selected(t, pod, ip)
	}
	shareLimit(t, name, "node-2", pods)
	// Agents that are stopped, killed, and come back. One that begins when its permits have ended uses its locks seconds
	// later: it has settled when the first of the two is over.
	inService(t, "node-2", false)
	unmoved(t, ip, pods[0], 8*time.Second, func() {
		for _, node := range nodes() {
			restart(t, node)
		}
	})
	unmovedByKills(t, ip, pods[0], 4*time.Second, "node-2")
	on("node-3", "sysctl -qw net.ipv4.conf.all.arp_ignore=1", "ip addr add "+address+"/32 dev lo")
	t.Cleanup(func() { on("node-3", "sysctl -qw net.ipv4.conf.all.arp_ignore=0") })
	for _, pod := range pods {
		leavesAs(t, pod, ip)
	}
	wantAssigned("True Assigned " + address + " is on node node-2")
	take("node-2")
	wantAssigned("True Assigned " + address + " is on node node-3")
	put("node-3")
	on("node-3", "ip addr del "+address+"/32 dev lo")
	wantAssigned("True Assigned " + address + " is on node node-3")
	for _, pod := range pods {
		leavesAs(t, pod, ip)
	}
	take("node-3")
	wantAssigned(nowhere)
	dropped()

	want := []string{"IPAssigned node-2", "IPUnassigned node-2", "IPAssigned node-3", "IPUnassigned node-3"}
	eventually(t, 15*time.Second, func() error {
		var moves []string
		for line := range strings.Lines(kubectl(t, "get", "events.v1.events.k8s.io", "-n", "default", "--sort-by=.eventTime",
			`-o=jsonpath={range .items[?(@.regarding.name=="static")]}{.reason} {.note}{"\n"}{end}`)) {
			if strings.HasPrefix(line, "IP") {
				moves = append(moves, strings.Fields(line)[0]+" "+strings.Fields(line)[len(strings.Fields(line))-1])
			}
		}
		if !slices.Equal(moves, want) {
			return fmt.Errorf("Events %q, want %q", moves, want)
		}
		return nil
	})
}
