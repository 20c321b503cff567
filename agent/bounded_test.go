package agent

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/store"
)

// TestBoundedPermitsEndWithoutConfirmation: the lease is good for a minute, but nobody asks etcd whether it was
// revoked.
func TestBoundedPermitsEndWithoutConfirmation(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.PutAgent(t.Context(), lease, egress.Agent{Node: "a", Revocable: true}, 0); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.0.11")
	list := []nft.Permit{{IP: ip, Answer: true}}
	p := permitsOf(t, tables, ownership.Config{Permit: 1500 * time.Millisecond, Gossip: true, Freeze: true})
	// promise lets the only peer promise, if it is asked.
	promise := func() {
		for _, effect := range p.machine.step(ownership.Question{Peers: []string{"b"}}) {
			said := effect.(ownership.Say)
			said.Message.Promise = true
			p.machine.step(ownership.Heard{From: said.To, Message: said.Message})
		}
	}
	left := func() time.Duration {
		t.Helper()
		all, err := tables.Permits()
		if err != nil {
			t.Fatal(err)
		}
		return all[ip]
	}
	if promise(); !errors.Is(p.under(lease, list), ownership.ErrUnconfirmed) {
		t.Error("a promise began what no confirmation had")
	}
	if err := p.confirm(t, lease); err != nil {
		t.Fatal(err)
	}
	if err := p.grant(list); err != nil || left() == 0 || left() > p.length {
		t.Fatalf("confirmed: %v, %v left", err, left())
	}
	time.Sleep(p.length / 2)
	if err := p.renew(); err != nil || left() > p.length/2 {
		t.Fatalf("half the time later: %v, %v left: a renewal must not outlast the confirmation", err, left())
	}
	promise()
	if err := p.renew(); err != nil || left() < p.length/2 {
		t.Fatalf("with the promise of all: %v, %v left", err, left())
	}
	time.Sleep(p.length)
	if promise(); !errors.Is(p.renew(), ownership.ErrUnconfirmed) || left() != 0 || p.machine.answers(ip) {
		t.Errorf("a promise revived what had ended: %v left", left())
	}
	if err := p.confirm(t, lease); err != nil || p.renew() != nil || left() == 0 {
		t.Errorf("confirmed again: %v, %v left", err, left())
	}
	if err := client.Revoke(t.Context(), lease.ID()); err != nil {
		t.Fatal(err)
	}
	if err := p.confirm(t, lease); err == nil {
		t.Error("a revoked lease is confirmed")
	}
}

// As where etcd answers slowly: the locks are under the lease that is to outlive the restart, and the kernel has fallen
// silent meanwhile. Nobody may take them from that lease before it ends.
func TestLocksThatMovedTooLateAreGivenBack(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.PutAgent(t.Context(), lease, egress.Agent{Node: "a", Revocable: true}, 0); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.0.11")
	if ok, err := client.Claim(t.Context(), lease, egress.Owner{IP: ip, Node: "a", Why: egress.ReasonClaim}, store.Former{}); err != nil || !ok {
		t.Fatal(ok, err)
	}
	p := permitsOf(t, tables, ownership.Config{Permit: 1500 * time.Millisecond, Gossip: true, Freeze: true})
	// One of another IP, whose packets it only passes on, has nothing to do with it.
	list := []nft.Permit{{IP: ip, Answer: true}, {IP: ip.Next()}}
	if err := p.under(lease, list); !errors.Is(err, ownership.ErrUnconfirmed) {
		t.Fatal(err)
	}
	if err := errors.Join(p.confirm(t, lease), p.grant(list)); err != nil || !p.machine.answers(ip) {
		t.Fatalf("%v, answers %t", err, p.machine.answers(ip))
	}
	a := &agent{Config: Config{Node: "a", Store: client}, kernel: &kernel{permits: p}}
	next, err := client.Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	all := func(netip.Addr) bool { return true }
	err = lease.MoveTo(t.Context(), next, egress.Agent{Node: "a", Restarting: true}, all, func() error {
		time.Sleep(p.length)
		_, err := p.extend(next, []netip.Addr{ip})
		return err
	})
	if left, leftErr := tables.Permits(); err == nil || leftErr != nil || left[ip] > 0 {
		t.Errorf("a permit that had ended was lengthened: %v, %v, %v", left, err, leftErr)
	}
	if err := a.giveBack(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	if ok, err := client.Claim(t.Context(), lease, egress.Owner{IP: ip, Node: "b", Why: egress.ReasonClaim}, store.Former{}); err != nil || !ok {
		t.Errorf("the lock cannot be claimed: %t, %v", ok, err)
	}
	if r, err := client.Agent(t.Context(), "a"); err != nil || r.Node != "" {
		t.Errorf("the record is there still: %+v, %v", r, err)
	}
}

func TestMovedLocksSurviveTheRevocationOfTheOldLease(t *testing.T) {
	client, _ := world(t)
	old, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	const locks = 130 // more than one transaction takes
	if err := client.PutAgent(t.Context(), old, egress.Agent{Node: "a", Revocable: true}, 0); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.1.0")
	for range locks {
		if ok, err := client.Claim(t.Context(), old, egress.Owner{IP: ip, Node: "a", Why: egress.ReasonClaim}, store.Former{}); err != nil || !ok {
			t.Fatal(ok, err)
		}
		ip = ip.Next()
	}
	if ips, err := old.Owned(t.Context()); err != nil || len(ips) != locks {
		t.Fatalf("%d locks are under the lease, %v: want %d", len(ips), err, locks)
	}
	next, err := client.Grant(t.Context(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	all := func(netip.Addr) bool { return true }
	if err := old.MoveTo(t.Context(), next, egress.Agent{Node: "a", Restarting: true}, all, nil); err != nil {
		t.Fatal(err)
	}
	if err := client.Revoke(t.Context(), old.ID()); err != nil {
		t.Fatal(err)
	}
	a, err := client.Agent(t.Context(), "a")
	if err != nil || !a.Restarting || a.Revocable || a.Lease != egress.FormatLease(next.ID()) {
		t.Errorf("the record is %+v, %v", a, err)
	}
	if ok, err := client.Claim(t.Context(), next, egress.Owner{IP: netip.MustParseAddr("10.10.1.7")}, store.Former{}); err != nil || !ok {
		t.Errorf("a lock is not under the new lease: %t, %v", ok, err)
	}
	if err := old.MoveTo(t.Context(), next, egress.Agent{Node: "a"}, all, nil); err == nil {
		t.Error("what is under another lease was moved")
	}
}
