package store

import (
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// suspected is an etcd in which the agent of n1 holds ip1 and is suspected.
type suspected struct {
	c         *Client
	l         *Lease       // of n1's agent
	o         egress.Owner // its lock
	suspicion egress.Suspicion
	v         *View
}

func suspect(t *testing.T) *suspected {
	t.Helper()
	h := &suspected{c: dial(t, start(t))}
	h.v = h.c.NewView("n2")
	background(t, h.v.Run)
	recv(t, "the view", h.v.Ready())
	h.l = grant(t, h.c, time.Minute)
	if err := h.c.PutAgent(t.Context(), h.l, egress.Agent{Node: "n1", Revocable: true, Suspectable: true}, whatever); err != nil {
		t.Fatal(err)
	}
	claim(t, h.c, h.l, egress.Owner{IP: ip1, Node: "n1", Why: egress.ReasonClaim})
	s := h.sees(t, "the lock", func(s *egress.Snapshot) bool { return s.Owners[ip1].Node == "n1" && s.Agents["n1"].Lease != "" })
	h.o = s.Owners[ip1]
	h.suspect(t, s.Revision, true)
	return h
}

func (h *suspected) suspect(t *testing.T, seen int64, want bool) {
	t.Helper()
	s := egress.Suspicion{Node: "n1", Lease: egress.FormatLease(h.l.ID()), By: "n2", Since: time.Now().UTC()}
	if ok, err := h.c.Suspect(t.Context(), s, seen); ok != want || err != nil {
		t.Fatalf("suspecting at revision %d: %t, %v, want %t", seen, ok, err, want)
	}
	if want {
		h.suspicion = h.sees(t, "the suspicion", func(s *egress.Snapshot) bool { return s.Suspicions["n1"].By == "n2" }).Suspicions["n1"]
	}
}

func (h *suspected) sees(t *testing.T, what string, is func(*egress.Snapshot) bool) *egress.Snapshot {
	t.Helper()
	until(t, what, h.v.Changed(), func() bool { return is(h.v.Snapshot()) })
	return h.v.Snapshot()
}

func (h *suspected) stands(t *testing.T, want bool) {
	t.Helper()
	if got, err := h.c.Suspected(t.Context(), h.suspicion); got != want || err != nil {
		t.Errorf("the suspicion stands: %t, %v, want %t", got, err, want)
	}
}

func (h *suspected) former() Former { return Former{Revision: h.o.Revision, Suspicion: h.suspicion} }

// take revokes the lease and claims the IP for n3, and returns the lock.
func (h *suspected) take(t *testing.T) egress.Owner {
	t.Helper()
	if err := h.c.Revoke(t.Context(), h.l.ID()); err != nil {
		t.Fatal(err)
	}
	o := egress.Owner{IP: ip1, Node: "n3", Why: egress.ReasonClaim}
	if ok, err := h.c.Claim(t.Context(), grant(t, h.c, time.Minute), o, h.former()); !ok || err != nil {
		t.Fatalf("claiming: %t, %v", ok, err)
	}
	return h.sees(t, "the next lock", func(s *egress.Snapshot) bool { return s.Owners[ip1].Node == "n3" }).Owners[ip1]
}

func TestAnAgentThatLivesEndsASuspicionBeforeItTakesAYes(t *testing.T) {
	h := suspect(t)
	h.stands(t, true)
	before := time.Now()
	yes, err := h.l.Confirm(t.Context(), "n1")
	if err != nil || yes.Sent.Before(before) {
		t.Fatalf("confirming: %v, %v", yes, err)
	}
	h.stands(t, false)
	if yes, err := h.l.Confirm(t.Context(), "n1"); err != nil {
		t.Errorf("confirming again: %v, %v", yes, err)
	}
	if o := h.take(t); o.Suspicion != 0 {
		t.Errorf("the next lock has suspicion %d, which the owner before had ended", o.Suspicion)
	}
	if _, err := h.l.Confirm(t.Context(), "n1"); err == nil {
		t.Error("the lease is gone, and its agent got a yes")
	}
}

func TestALockThatEndsUnderASuspicionIsKnownByTheNextOne(t *testing.T) {
	h := suspect(t)
	if o := h.take(t); o.Suspicion != h.suspicion.Revision || o.From != "" {
		t.Errorf("the next lock is %+v, want suspicion %d", o, h.suspicion.Revision)
	}
	h.stands(t, true) // for others who claim
	if _, err := h.l.Confirm(t.Context(), "n1"); err == nil {
		t.Error("the lease is gone, and its agent got a yes")
	}
	h.stands(t, true)
}

// Another owner in between may have begun to answer.
func TestASuspicionAgainstTheOwnerBeforeTheLastCountsForNothing(t *testing.T) {
	h := suspect(t)
	if err := h.c.Revoke(t.Context(), h.l.ID()); err != nil {
		t.Fatal(err)
	}
	between := grant(t, h.c, time.Minute)
	claim(t, h.c, between, egress.Owner{IP: ip1, Node: "n4", Why: egress.ReasonClaim})
	if err := h.c.Revoke(t.Context(), between.ID()); err != nil {
		t.Fatal(err)
	}
	if o := h.take(t); o.Suspicion != 0 {
		t.Errorf("the next lock has suspicion %d", o.Suspicion)
	}
}

// Its permits last as long as the lease then, without any further yes.
func TestAnAgentThatStopsEndsASuspicionAndGetsNone(t *testing.T) {
	h := suspect(t)
	seen := h.v.Snapshot().Revision
	next := grant(t, h.c, time.Minute)
	if err := h.l.MoveTo(t.Context(), next, egress.Agent{Node: "n1", Restarting: true}, func(netip.Addr) bool { return true }, nil); err != nil {
		t.Fatal(err)
	}
	h.stands(t, false)
	h.suspect(t, seen, false) // the record is under another lease now
	h.l = next
	h.suspect(t, seen, false) // and was another one
}

func TestTwoDoNotSuspectOne(t *testing.T) {
	h := suspect(t)
	h.suspect(t, h.v.Snapshot().Revision, false)
	h.stands(t, true)
}
