package store

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// A record that comes after the snapshot may say a longer one.
func TestTheLongestPermitIsLoweredOnlyWhileNoAgentChanges(t *testing.T) {
	c := dial(t, start(t))
	v := c.NewView("n1")
	background(t, v.Run)
	recv(t, "the view", v.Ready())
	longest := func(want time.Duration) *egress.Snapshot {
		t.Helper()
		until(t, "the longest permit", v.Changed(), func() bool { return v.Snapshot().Longest == want })
		return v.Snapshot()
	}
	did := func(what string, want bool) func(bool, error) {
		return func(ok bool, err error) {
			t.Helper()
			if ok != want || err != nil {
				t.Errorf("%s: %t, %v, want %t", what, ok, err, want)
			}
		}
	}
	before := v.Snapshot()
	did("raising", true)(c.RaisePermit(t.Context(), 2*time.Second, before.Revision))
	did("raising, of who has not seen that another did", false)(c.RaisePermit(t.Context(), time.Second, before.Revision))
	now := longest(2 * time.Second)
	if err := c.PutAgent(t.Context(), grant(t, c, time.Minute), egress.Agent{Node: "n2", Permit: egress.Duration(2 * time.Second)}, whatever); err != nil {
		t.Fatal(err)
	}
	did("lowering, of who has not seen an agent come", false)(c.LowerPermit(t.Context(), time.Second, now.Revision))
	until(t, "the agent", v.Changed(), func() bool { return v.Snapshot().Agents["n2"].Permit.Is(2 * time.Second) })
	did("lowering", true)(c.LowerPermit(t.Context(), time.Second, v.Snapshot().Revision))
	longest(time.Second)
}

func TestAHandOverOfAFormerProcessDoesNothingToLocksThatAreRenumbered(t *testing.T) {
	h := prepare(t, dial(t, start(t)))
	was := h.o.Revision
	l, err := h.c.Adopt(t.Context(), h.o.Lease)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.c.PutAgent(t.Context(), l, egress.Agent{Node: h.o.Node, Lease: egress.FormatLease(h.o.Lease)}, whatever); err != nil {
		t.Fatal(err)
	}
	if err := l.Renumber(t.Context(), h.o.Node, []netip.Addr{ip1}); err != nil {
		t.Fatal(err)
	}
	if o := h.owner(t); o.Revision <= was || o.Node != h.o.Node || o.Lease != h.o.Lease {
		t.Errorf("owner %+v, want %+v of a new revision", o, h.o)
	}
	if ok, err := h.c.HandOver(t.Context(), h.o, h.m, h.to); ok || err != nil {
		t.Errorf("handing over by the former revision: %t, %v", ok, err)
	}
	if ok, err := h.c.Release(t.Context(), h.o); ok || err != nil {
		t.Errorf("releasing by the former revision: %t, %v", ok, err)
	}
	if err := l.Renumber(t.Context(), h.o.Node, []netip.Addr{ip2}); err == nil {
		t.Error("a lock that is not there was renumbered")
	}
}

// The lock may be another's in it, and the view does not show that yet.
func TestARestoredEtcdConfirmsNothing(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Minute)
	if err := c.PutAgent(t.Context(), l, egress.Agent{Node: "n1"}, whatever); err != nil {
		t.Fatal(err)
	}
	restore := s.Backup()
	v := c.NewView("n1")
	background(t, v.Run)
	recv(t, "the view", v.Ready())
	put(t, c, OwnerKey(ip1), "{}")
	if yes, err := l.Confirm(t.Context(), "n1"); err != nil || yes.Restores != v.Snapshot().Restores {
		t.Fatalf("confirmed by %+v, %v", yes, err)
	}
	restore()
	for end := time.Now().Add(10 * time.Second); ; {
		yes, err := l.Confirm(t.Context(), "n1")
		if err == nil && yes.Restores == 0 {
			t.Fatal("confirmed as before")
		}
		if err == nil || time.Now().After(end) {
			if err != nil {
				t.Errorf("not confirmed again: %v", err)
			}
			break
		}
	}
	until(t, "what it holds", v.Changed(), func() bool { return v.Snapshot().Restores > 0 })
}
