package integration

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
)

// A pod whose first act is to connect out is never seen outside with another source than its egress IP: it waits until
// its node knows it. One that no egress selects waits, too, and then leaves as the CNI has it.
func TestTheFirstConnectionsOfANewPodLeaveWithItsEgressIP(t *testing.T) {
	n := newNamespace(t)
	n.dual("first", "10.10.0.60", "fd10::60")
	ips := bothIPs(t, "first")
	for i, app := range []string{"web", "web", "web", "other"} {
		node := nodes()[i%len(nodes())]
		name := n.name + "/" + app + string(rune('a'+i))
		seen, began, stop := n.asksFromItsFirstMoment(name)
		if pod := n.pod(name[len(n.name)+1:], node, app); pod != name {
			t.Fatalf("the pod is %s, want %s", pod, name)
		}
		for _, ip := range ips {
			eventually(t, 5*time.Second, func() error {
				if len(seen(outsideOf(ip))) == 0 {
					return fmt.Errorf("nothing of %s was seen at %s: the test proves nothing", name, outsideOf(ip))
				}
				return nil
			})
		}
		stop()
		for _, ip := range ips {
			for _, source := range seen(outsideOf(ip)) {
				if (source == ip) != (app == "web") {
					t.Errorf("%s was seen as %s; its egress has %s", name, source, ip)
				}
			}
		}
		t.Logf("%s: first answers after %v", name, time.Since(began()))
	}
}

// asksFromItsFirstMoment makes a pod, as soon as it is there, open a connection to the outside every 10 ms in either
// family.
func (n *namespace) asksFromItsFirstMoment(pod string) (seen func(to netip.Addr) []netip.Addr, began func() time.Time, stop func()) {
	var mu sync.Mutex
	var first time.Time
	sources := map[netip.Addr][]netip.Addr{}
	ctx, cancel := context.WithCancel(n.t.Context())
	var all sync.WaitGroup
	for _, to := range []netip.Addr{lab.OutsideIP, lab.OutsideIP6} {
		all.Go(func() {
			for ; ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
				if cluster.In("pod", pod, func() error { return nil }) != nil {
					continue // not there yet
				}
				mu.Lock()
				if first.IsZero() {
					first = time.Now()
				}
				mu.Unlock()
				all.Go(func() {
					if source, err := cluster.SourceTo(ctx, pod, to); err == nil {
						mu.Lock()
						sources[to] = append(sources[to], source)
						mu.Unlock()
					}
				})
			}
		})
	}
	stop = func() { cancel(); all.Wait() }
	n.t.Cleanup(stop)
	seen = func(to netip.Addr) []netip.Addr {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(sources[to])
	}
	return seen, func() time.Time { return first }, stop
}
