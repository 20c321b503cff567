package integration

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A pod that no egress selects gets the address of a selected one that has just ended. Its node knows in time, as the
// former pod is gone from the API then. Without crdsync nobody tells the node: the new pod is taken for the former one,
// until crdsync is back (docs/security.md).
func TestAPodIsNotTakenForTheFormerOneOfItsAddress(t *testing.T) {
	n := newNamespace(t)
	n.pool("reuse", "10.10.0.61", "10.10.0.61")
	n.egress("reuse", "reuse", "web")
	ip, _ := held(t, "reuse")
	const node = "node-1"
	after := func(former, name string) (pod string, sources []netip.Addr) {
		t.Helper()
		n.remove(former)
		seen, _, stop := n.asksFromItsFirstMoment(n.name + "/" + name)
		pod = n.pod(name, node, "other")
		eventually(t, 20*time.Second, func() error {
			if got := seen(outsideOf(ip)); len(got) < 20 {
				return fmt.Errorf("pod %s was seen as %v: the test proves nothing", pod, got)
			}
			return nil
		})
		stop()
		return pod, seen(outsideOf(ip))
	}
	web := n.pod("web-1", node, "web")
	selected(t, web, ip)
	other, sources := after(web, "other-1")
	if slices.Contains(sources, ip) {
		t.Errorf("the next pod of the address was seen as %v", sources)
	}

	n.remove(other)
	web = n.pod("web-2", node, "web")
	selected(t, web, ip)
	if err := cluster.Stop(t.Context(), "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	other, sources = after(web, "other-2")
	t.Logf("without crdsync the next pod of the address is seen as %v", slices.Compact(sources))
	began := time.Now()
	if err := cluster.Start(context.WithoutCancel(t.Context()), "crdsync", ""); err != nil {
		t.Fatal(err)
	}
	leavesWithin(t, 30*time.Second, other, nodeIP(t, node))
	t.Logf("it leaves as itself %v after crdsync was started", time.Since(began))
}
