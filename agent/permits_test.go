package agent

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// world returns a new etcd's client and the tables of a new network namespace.
func world(t *testing.T) (*store.Client, *nft.Tables) {
	t.Helper()
	client := newEtcd(t)
	netns.Enter(t) // last: etcd and its client live outside
	tables, err := nft.New(nft.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	program(t, tables, nft.State{})
	return client, tables
}

func program(t *testing.T, tables *nft.Tables, want nft.State) {
	t.Helper()
	have, err := tables.Observe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tables.Apply(nft.Diff(have, want)); err != nil {
		t.Fatal(err)
	}
}

// permitsOf returns the permits of node a, and makes the tables renew them. cfg says how long they are, and whether
// there is gossip.
func permitsOf(t *testing.T, tables *nft.Tables, cfg ownership.Config) *permits {
	t.Helper()
	cfg.Node = "a"
	p := newPermits(tables, newMachine(cfg), cfg.Permit, time.Minute)
	program(t, tables, nft.State{Renewal: p.renewal})
	return p
}

// under grants permits of locks under a lease.
func (p *permits) under(lease *store.Lease, list []nft.Permit) error {
	p.machine.grant(lease)
	p.machine.begin(plan.New(&egress.Snapshot{
		Agents: map[string]egress.Agent{"a": {Lease: egress.FormatLease(lease.ID()), Permit: egress.Duration(p.length)}, "b": {}}, Longest: p.length,
	}))
	return p.grant(list)
}

// confirm asks etcd whether the lease is there.
func (p *permits) confirm(t *testing.T, lease *store.Lease) error {
	t.Helper()
	yes, err := lease.Confirm(t.Context(), "a")
	if err == nil {
		p.machine.step(ownership.Confirmed{Lease: lease.ID(), Sent: yes.Sent, Restores: yes.Restores})
	}
	return err
}

func (p *permits) renew() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.renewLocked()
}

func (p *permits) revocable() bool {
	return p.machine.step(ownership.Programmed{})[0].(ownership.Publish).Revocable
}

// TestPermitsLiveByTheLeaseTheyWereGrantedUnder: an agent that lost its lease and has a new one must not renew what it
// held by the old.
func TestPermitsLiveByTheLeaseTheyWereGrantedUnder(t *testing.T) {
	client, tables := world(t)
	first, err := client.Grant(t.Context(), 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.0.11")
	p := permitsOf(t, tables, ownership.Config{Permit: 300 * time.Millisecond})
	held := func() bool {
		t.Helper()
		left, err := tables.Permits()
		if err != nil {
			t.Fatal(err)
		}
		return left[ip] > 0
	}
	if err := p.under(first, []nft.Permit{{IP: ip, Answer: true}}); err != nil || !held() || !p.machine.answers(ip) {
		t.Fatalf("with a lease: %v, permit %t, answers %t", err, held(), p.machine.answers(ip))
	}
	if err := first.Revoke(t.Context()); err != nil {
		t.Fatal(err)
	}
	second, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	p.machine.grant(second)
	if err := p.renew(); !errors.Is(err, ownership.ErrUnconfirmed) {
		t.Errorf("renewing without the lease: %v, want %v", err, ownership.ErrUnconfirmed)
	}
	// In the kernel it lasts as long as it was to: the lease did not end by itself.
	for deadline := time.Now().Add(4 * time.Second); held() || p.machine.answers(ip); {
		if time.Now().After(deadline) {
			t.Fatalf("the permit does not end by itself: in the kernel %t, answers %t", held(), p.machine.answers(ip))
		}
	}
}

func TestWithdrawnPermitsAreGoneAtOnceAndOthersStay(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	a, b := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.12")
	p := permitsOf(t, tables, ownership.Config{Permit: time.Minute})
	if err := p.under(lease, []nft.Permit{{IP: a, Answer: true}, {IP: b, Answer: true}}); err != nil {
		t.Fatal(err)
	}
	if err := p.withdraw([]nft.Permit{{IP: b}}); err != nil {
		t.Fatal(err)
	}
	left, err := tables.Permits()
	if err != nil || left[a] != 0 || left[b] == 0 {
		t.Errorf("permits %v, %v: want only %s", left, err, b)
	}
	if p.machine.answers(a) || p.machine.answers(b) {
		t.Error("a permit that was narrowed to sending still answers")
	}
}

// A former agent left permits that are longer than P: of a lease without gossip, or one that was to outlive a restart.
func TestPeersMayRevokeOnlyWhatTheKernelHasBounded(t *testing.T) {
	client, tables := world(t)
	ip := netip.MustParseAddr("10.10.0.11")
	former := []nft.Permit{{IP: ip, Answer: true}}
	lease, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.PutAgent(t.Context(), lease, egress.Agent{Node: "a"}, 0); err != nil {
		t.Fatal(err)
	}
	for name, list := range map[string][]nft.Permit{"it holds the IP": former, "its lease is another": nil} {
		if err := tables.Permit(former, 10*time.Second); err != nil {
			t.Fatal(err)
		}
		p := permitsOf(t, tables, ownership.Config{Permit: 300 * time.Millisecond, Gossip: true})
		// The lease is not confirmed yet, so nothing is written.
		if err := p.under(lease, list); list != nil && (!errors.Is(err, ownership.ErrUnconfirmed) || p.revocable()) {
			t.Errorf("%s, not confirmed: %v, revocable %t, while the kernel goes on for seconds", name, err, p.revocable())
		}
		if err := p.confirm(t, lease); err != nil {
			t.Fatal(err)
		}
		if err := p.grant(list); err != nil || !p.revocable() {
			t.Errorf("%s: %v, revocable %t", name, err, p.revocable())
		}
		left, err := tables.Permits()
		if err != nil || left[ip] > p.length || list == nil && left[ip] > 0 {
			t.Errorf("%s: %v left, %v", name, left[ip], err)
		}
		if lease, err = client.Grant(t.Context(), time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := client.PutAgent(t.Context(), lease, egress.Agent{Node: "a"}, 1<<62); err != nil {
			t.Fatal(err)
		}
	}
}

// An agent that is told to stop keeps the lock of an IP that its kernel still answers for, whatever it was asked for.
func TestALockIsKeptUntilTheKernelIsSilent(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.0.11")
	p := permitsOf(t, tables, ownership.Config{Permit: time.Minute})
	if err := p.under(lease, []nft.Permit{{IP: ip, Answer: true}}); err != nil || !p.machine.keeps(ip) {
		t.Fatalf("answering: %v, keeps %t", err, p.machine.keeps(ip))
	}
	// as for a withdrawal that the kernel refused
	p.machine.Narrow(func(netip.Addr) (send, answer bool) { return true, false })
	if !p.machine.keeps(ip) {
		t.Error("the lock of an IP that the kernel answers for is given back")
	}
	if err := p.withdraw([]nft.Permit{{IP: ip}}); err != nil || p.machine.keeps(ip) {
		t.Errorf("silent: %v, keeps %t", err, p.machine.keeps(ip))
	}
}

// A permit that has ended by itself comes back with etcd's next answer. Not so once its lock is given back.
func TestALateAnswerRenewsNoPermitOfALockThatIsGivenBack(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), time.Minute)
	if err == nil {
		err = client.PutAgent(t.Context(), lease, egress.Agent{Node: "a", Revocable: true}, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := permitsOf(t, tables, ownership.Config{Permit: 300 * time.Millisecond, Gossip: true})
	p.machine.grant(lease)
	if err := p.confirm(t, lease); err != nil {
		t.Fatal(err)
	}
	gone, other := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.12")
	if err := p.under(lease, []nft.Permit{{IP: gone, Answer: true}, {IP: other, Answer: true}}); err != nil && !errors.Is(err, ownership.ErrUnconfirmed) {
		t.Fatal(err)
	}
	renew := func() {
		t.Helper()
		var err error
		for range 50 { // a busy machine may take longer for it than a permit lasts
			if err = errors.Join(p.confirm(t, lease), p.renew()); !errors.Is(err, ownership.ErrUnconfirmed) {
				break
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	renew()
	if kept, err := p.keeps(gone); err != nil || !kept {
		t.Fatalf("answering: keeps %t, %v", kept, err)
	}
	time.Sleep(p.length)
	if kept, err := p.keeps(gone); err != nil || kept {
		t.Fatalf("silent: keeps %t, %v", kept, err)
	}
	renew()
	left, err := tables.Permits()
	if err != nil || left[gone] > 0 || left[other] <= 0 || p.machine.answers(gone) {
		t.Errorf("given back: %v left, its neighbour: %v, %v", left[gone], left[other], err)
	}
}

func TestPermitsWithoutGossipEndWithTheLease(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.0.11")
	p := permitsOf(t, tables, ownership.Config{Permit: 300 * time.Millisecond})
	if err := p.under(lease, []nft.Permit{{IP: ip, Answer: true}}); err != nil {
		t.Fatal(err)
	}
	left, err := tables.Permits()
	if ends := time.Now().Add(left[ip]); err != nil || ends.After(lease.Valid().Add(p.length/2)) || ends.Before(lease.Valid().Add(-10*time.Second)) {
		t.Errorf("the permit ends %v after the lease, %v; want with it", ends.Sub(lease.Valid()), err)
	}
}

// TestPermitsOfAFormerAgentAreCutToTheNextLease: the former one has extended them to a lease that outlives a restart.
func TestPermitsOfAFormerAgentAreCutToTheNextLease(t *testing.T) {
	client, tables := world(t)
	long, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	former := egress.Agent{Node: "a", Restarting: true}
	if err := client.PutAgent(t.Context(), long, former, 0); err != nil {
		t.Fatal(err)
	}
	mine, relayed := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.13")
	if ok, err := client.Claim(t.Context(), long, egress.Owner{IP: mine, Node: "a", Why: egress.ReasonClaim}, store.Former{}); err != nil || !ok {
		t.Fatal(ok, err)
	}
	permitted := func() map[netip.Addr]time.Duration {
		t.Helper()
		left, err := tables.Permits()
		if err != nil {
			t.Fatal(err)
		}
		return left
	}
	a := &agent{Config: Config{Node: "a", Store: client, Timing: Timing{LeaseTTL: 3 * time.Second}}, kernel: &kernel{handles: handles{tables: tables}}}
	for _, lasts := range []time.Duration{time.Minute, time.Second} {
		if err := tables.Permit([]nft.Permit{{IP: mine}, {IP: relayed}}, lasts); err != nil {
			t.Fatal(err)
		}
		next, err := a.toShortLease(t.Context(), long, former, []nft.Permit{{IP: mine}}, permitted())
		if err != nil {
			t.Fatal(err)
		}
		if next.TTL() != 3*time.Second {
			t.Errorf("the next lease is of %v", next.TTL())
		}
		if ips, err := next.Owned(t.Context()); err != nil || len(ips) != 1 {
			t.Errorf("the next lease has %v, %v; want the one that the node held", ips, err)
		}
		if left, want := permitted()[mine], min(lasts, 3*time.Second); left > want || left < want-time.Second {
			t.Errorf("the permit of %v lasts %v, want %v", lasts, left, want)
		}
		long = next
	}
}
