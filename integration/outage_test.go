package integration

import (
	"context"
	"fmt"
	"testing"
	"time"
)

func TestWithoutTheAPIServerIPsMoveAndTheStatusCatchesUp(t *testing.T) {
	n := newNamespace(t)
	ip, gateway, pod := n.remote("outage", "10.10.0.98")
	assigned := func(node string) string { return fmt.Sprintf("True Assigned %s is on node %s", ip, node) }
	wantAssigned := func(node string) {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			if got := condition(t, "outage", "IPAssigned"); got != assigned(node) {
				return fmt.Errorf("condition %q, want %q", got, assigned(node))
			}
			return nil
		})
	}
	wantAssigned(gateway)
	started := false
	start := func() {
		if !started {
			if err := cluster.Start(context.Background(), "apiserver", ""); err != nil {
				t.Error(err)
			}
		}
		started = true
	}
	t.Cleanup(start)
	if err := cluster.Stop(t.Context(), "apiserver", ""); err != nil {
		t.Fatal(err)
	}
	target := otherNode(gateway, otherNode(gateway)) // not the pod's, which would go with it
	r := probe(t, pod, 3*time.Second, func() { egret(t, "move", ip.String(), "--to", target) })
	only(t, r, ip)
	lossless(t, "move", r)
	if _, owner := lookUp(t, "outage"); owner != target {
		t.Errorf("the owner is %s, want %s", owner, target)
	}
	r = probe(t, pod, 4*time.Second, func() { // and by itself
		if err := cluster.Crash(t.Context(), target); err != nil {
			t.Fatal(err)
		}
	})
	only(t, r, ip)
	t.Logf("power-off to the first packet: %v", r.LongestGap)
	if r.LongestGap > 2500*time.Millisecond {
		t.Errorf("a gap of %v, want 1.5s, 2.5s on a busy machine", r.LongestGap)
	}
	t.Cleanup(func() {
		if err := cluster.Recover(context.Background(), target); err != nil {
			t.Error(err)
		}
	})
	var heir string
	eventually(t, leaseTTL+5*time.Second, func() error {
		if _, heir = lookUp(t, "outage"); heir == target || heir == "" {
			return fmt.Errorf("the owner is %q after %s went", heir, target)
		}
		return nil
	})
	leavesAs(t, pod, ip)
	start()
	wantAssigned(heir)
	selected(t, n.pod("late", heir, "web"), ip) // at once, however long the API server was away
}
