package integration

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// TestAnIPWithoutCapacityIsClaimedWhenThereIsSome gives the nodes room for one egress IP each, by the annotation, and
// has one IP more than that.
func TestAnIPWithoutCapacityIsClaimedWhenThereIsSome(t *testing.T) {
	const annotation = "node.antrea.io/max-egress-ips"
	n := newNamespace(t)
	room := func(ctx context.Context, node, value string) {
		t.Helper()
		if out, err := cluster.Kubectl(ctx, "annotate", "--overwrite", "node", node, annotation+value); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
	t.Cleanup(func() {
		for _, node := range nodes() {
			room(context.Background(), node, "-")
		}
	})
	for _, node := range nodes() {
		room(t.Context(), node, "=1")
	}
	eventually(t, 5*time.Second, func() error {
		for _, node := range records[egress.Node](t, "nodes") {
			if node.Capacity != 1 {
				return fmt.Errorf("%s has room for %d", node.Name, node.Capacity)
			}
		}
		return nil
	})
	n.pool("room", "10.10.0.75", "10.10.0.78")
	for i := range nodes() {
		name := fmt.Sprintf("room-%d", i)
		n.egress(name, "room", name)
		held(t, name)
	}
	n.egress("room-late", "room", "late")
	var waits netip.Addr
	eventually(t, 5*time.Second, func() error {
		if waits, _ = lookUp(t, "room-late"); !waits.IsValid() {
			return fmt.Errorf("the last egress has no IP")
		}
		return nil
	})
	pod := n.pod("late", "node-1", "late")
	time.Sleep(time.Second) // for somebody to take it who must not
	if _, owner := lookUp(t, "room-late"); owner != "" {
		t.Fatalf("%s has %s, which nobody has room for", owner, waits)
	}

	// An operator may not put a second one on a node, unless he insists.
	first, at := held(t, "room-0")
	to := otherNode(at)
	out, err := cluster.Egret(t.Context(), "move", first.String(), "--to", to)
	if text := fmt.Sprint(err, string(out)); err == nil || !strings.Contains(text, "holds 1 egress IPs and may hold 1; --force") {
		t.Errorf("a move to a node without room: %s\nwant an error that says so, and what to do", text)
	}
	began := time.Now()
	egret(t, "move", first.String(), "--to", to, "--force")
	if _, owner := held(t, "room-0"); owner != to {
		t.Errorf("%s is on %s, want %s", first, owner, to)
	}
	// Which makes room on the node that it left.
	_, owner := held(t, "room-late")
	t.Logf("%s took %s %v after the move began", owner, waits, time.Since(began).Round(time.Millisecond))
	if owner != at || time.Since(began) > 10*time.Second {
		t.Errorf("%s has %s after %v, want %s soon", owner, waits, time.Since(began), at)
	}
	selected(t, pod, waits)

	// What makes no sense is ignored, and reported.
	room(t.Context(), "node-1", "=plenty")
	eventually(t, 5*time.Second, func() error {
		log, err := os.ReadFile(cluster.LogFile("crdsync"))
		if err != nil || !strings.Contains(string(log), `max-egress-ips \"plenty\": want 0 to 255`) {
			return fmt.Errorf("crdsync has not said that the annotation makes no sense: %w", err)
		}
		return nil
	})
}
