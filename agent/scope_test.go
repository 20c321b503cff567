package agent

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// A node that no pool selects was given a lock by a claim that came late, which its view does not show: it finds that,
// and sees the owners of all IPs.
func TestALockOutOfSightIsFound(t *testing.T) {
	client, _ := world(t)
	lease, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	a, now, ip := &agent{}, time.Now(), netip.MustParseAddr("10.10.1.1")
	narrow := func(all bool, owners ...netip.Addr) bool {
		t.Helper()
		s, _ := a.scopeOf(t.Context(), round{lease: lease, now: now, all: all}, nil, owners)
		return s.Narrow
	}
	if narrow(true, ip) || narrow(false, make([]netip.Addr, maxOwners+1)...) {
		t.Error("an agent that needs all owners sees a part of them")
	}
	if !narrow(false, ip) {
		t.Error("an agent that holds nothing, and can get nothing, sees all owners")
	}
	if ok, err := client.Claim(t.Context(), lease, egress.Owner{IP: ip, Node: "node-1", Since: now, Why: egress.ReasonClaim}, store.Former{}); !ok || err != nil {
		t.Fatal(ok, err)
	}
	now = now.Add(ownedInterval)
	if narrow(false, ip) {
		t.Error("an agent that holds an IP does not see all owners")
	}
	if err := lease.Revoke(t.Context()); err != nil { // with its locks
		t.Fatal(err)
	}
	now = now.Add(ownedInterval)
	if !narrow(false, ip) {
		t.Error("an agent that holds nothing any more sees all owners")
	}
}
