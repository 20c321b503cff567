package store

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// TestALockThatIsHandedToAnAgentOnItsWayOutStaysOnNoLeaseThatEnds: the owner did not see in time that the target
// restarts.
func TestALockThatIsHandedToAnAgentOnItsWayOutStaysOnNoLeaseThatEnds(t *testing.T) {
	for name, answered := range map[string]bool{"it answers for the IP": true, "it does not answer yet": false} {
		t.Run(name, func(t *testing.T) {
			h := prepare(t, dial(t, start(t)))
			next := grant(t, h.c, time.Minute)
			// The worst moment: its keys were listed already.
			listed := func() {
				if ok, err := h.c.HandOver(t.Context(), h.o, h.m, h.to); !ok || err != nil {
					t.Fatal(ok, err)
				}
			}
			a := h.to
			a.Restarting = true
			if err := h.lease.moveTo(t.Context(), next, a, func(netip.Addr) bool { return answered }, listed); err != nil {
				t.Fatal(err)
			}
			if keys, err := h.lease.keys(t.Context()); err != nil || len(keys) > 0 {
				t.Errorf("under the former lease: %v, %v", keys, err)
			}
			r, there := find(t, h.c, OwnerKey(ip1))
			if answered && (!there || r.Lease != next.ID()) {
				t.Errorf("the lock is there: %t, under lease %x, want %x", there, r.Lease, next.ID())
			}
			if !answered {
				if there {
					t.Fatalf("the lock is kept, and nobody answers for the IP: %s", r.Value)
				}
				// The next owner may not have seen that n2 had it: both changes came between two of its looks.
				claimSeen(t, h.c, grant(t, h.c, time.Minute), egress.Owner{IP: ip1, Node: "n1"}, h.o.Revision)
				if o := h.owner(t); o.From != "n2" {
					t.Errorf("the next owner has it from %q, and waits: n1 was silent when it handed it over, and n2 did not use it", o.From)
				}
			}
		})
	}
}

func find(t *testing.T, c *Client, key string) (Record, bool) {
	t.Helper()
	records, err := c.List(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	r, ok := records[key]
	return r, ok
}
