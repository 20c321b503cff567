package agent

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/store"
)

// TestBoundedPermitsEndWithoutConfirmation: the lease is good for a minute, but nobody asks etcd whether it was revoked.
func TestBoundedPermitsEndWithoutConfirmation(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if err := client.PutAgent(t.Context(), lease, egress.Agent{Node: "a", Revocable: true}); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.0.11")
	list := []nft.Permit{{IP: ip, Answer: true}}
	var promised time.Time
	p := permitsOf(t, tables, 300*time.Millisecond)
	p.bounded, p.frozen = true, func() time.Time { return promised }
	renew := func() error {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.renewLocked()
	}
	left := func() time.Duration {
		t.Helper()
		all, err := tables.Permits()
		if err != nil {
			t.Fatal(err)
		}
		return all[ip]
	}
	if promised = time.Now(); !errors.Is(p.grant(list, lease), errUnconfirmed) {
		t.Error("a promise began what no confirmation had")
	}
	promised = time.Time{}
	if err := lease.Confirm(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if err := p.grant(list, lease); err != nil || left() == 0 || left() > p.length {
		t.Fatalf("confirmed: %v, %v left", err, left())
	}
	time.Sleep(p.length / 2)
	if err := renew(); err != nil || left() > p.length/2 {
		t.Fatalf("half the time later: %v, %v left: a renewal must not outlast the confirmation", err, left())
	}
	promised = time.Now()
	if err := renew(); err != nil || left() < p.length/2 {
		t.Fatalf("with the promise of all: %v, %v left", err, left())
	}
	time.Sleep(p.length)
	if promised = time.Now(); !errors.Is(renew(), errUnconfirmed) || left() != 0 || p.answers(ip) {
		t.Errorf("a promise revived what had ended: %v left", left())
	}
	if err := lease.Confirm(t.Context(), "a"); err != nil || renew() != nil || left() == 0 {
		t.Errorf("confirmed again: %v, %v left", err, left())
	}
	if err := client.Revoke(t.Context(), lease.ID()); err != nil {
		t.Fatal(err)
	}
	if err := lease.Confirm(t.Context(), "a"); err == nil {
		t.Error("a revoked lease is confirmed")
	}
}

// wire connects freezes with each other; each has lost etcd when its confirmation is old.
type wire struct {
	mu        sync.Mutex // guards what follows
	confirmed map[string]time.Time
	cut       map[string]bool
	silent    bool // who asks has no permits
	blind     bool // nobody has seen etcd yet
	all       map[string]*freeze
}

func newWire(length time.Duration, names ...string) *wire {
	w := &wire{confirmed: map[string]time.Time{}, cut: map[string]bool{}, all: map[string]*freeze{}}
	for _, me := range names {
		w.all[me] = newFreeze(&freeze{
			length: length, keep: true, renew: func() {}, wake: func() {},
			peers: func() ([]string, bool) {
				return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == me }), !w.blind
			},
			send: func(to string, b []byte) {
				w.mu.Lock()
				cut := w.cut[me] || w.cut[to]
				w.mu.Unlock()
				if !cut {
					w.all[to].receive(me, b)
				}
			},
			confirmed: func() time.Time {
				w.mu.Lock()
				defer w.mu.Unlock()
				return w.confirmed[me]
			},
		})
	}
	return w
}

// ask lets an agent ask all others, and returns whether all promised.
func (w *wire) ask(who string) bool {
	f, now := w.all[who], time.Now()
	peers, _ := f.peers()
	for _, peer := range peers {
		f.say(peer, message{Process: f.process, Sent: time.Since(f.start), Silent: w.silent})
	}
	return !f.frozen().Before(now)
}

func (w *wire) etcd(names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for n := range w.all {
		w.confirmed[n] = time.Now().Add(-time.Hour)
	}
	for _, n := range names {
		w.confirmed[n] = time.Now()
	}
}

func TestIPsAreKeptOnlyWhileAllHaveLostEtcd(t *testing.T) {
	const length = time.Minute
	tests := []struct {
		name string
		have []string // etcd
		cut  string   // off from its peers
		want bool
	}{
		{"nobody has etcd", nil, "", true},
		{"one peer has it", []string{"c"}, "", false},
		{"one peer does not answer", nil, "c", false},
		{"both peers have it", []string{"b", "c"}, "", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			w := newWire(length, "a", "b", "c")
			w.etcd(tt.have...)
			w.cut[tt.cut] = true
			if got := w.ask("a"); got != tt.want {
				t.Errorf("a keeps its IPs: %t, want %t", got, tt.want)
			}
		})
	}
}

// TestWhoDoesNotKnowTheOthersHasNoPromiseOfAll: an agent that adopted permits, and lost etcd before it had seen it, kept them for as long as
// that took.
func TestWhoDoesNotKnowTheOthersHasNoPromiseOfAll(t *testing.T) {
	for _, names := range [][]string{{"a"}, {"a", "b"}} {
		w := newWire(time.Minute, names...)
		w.etcd()
		if w.blind = true; w.ask("a") {
			t.Errorf("one of %v keeps its IPs, and does not know who the others are", names)
		}
	}
}

func TestPromiseBindsAndOutlastsTheReturnOfEtcd(t *testing.T) {
	w := newWire(time.Minute, "a", "b")
	w.etcd()
	before := time.Now()
	if !w.ask("a") {
		t.Fatal("b has lost etcd and does not promise")
	}
	if bound := w.all["b"].bound(); bound.Before(before.Add(time.Minute)) {
		t.Errorf("b is bound until %v, want a permit's length", bound)
	}
	w.etcd("b")
	if !w.ask("a") {
		t.Error("b has got etcd back just now, a has not, and b promises no more")
	}
	w.all["b"].lost = time.Now().Add(-returning)
	if w.ask("a") {
		t.Error("b has had etcd for long and still promises")
	}
}

// TestWhoAsksInVainIsAstray: it is cut off from an etcd that others have. While nobody has it, or for a moment, it is not.
func TestWhoAsksInVainIsAstray(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const length = time.Second
		w := newWire(length, "a", "b")
		w.silent = true
		woken := 0
		w.all["b"].wake = func() { woken++ }
		b := w.all["b"]
		b.lost = time.Now().Add(-returning)
		ask := func(d time.Duration, etcd ...string) {
			for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(length / 10) {
				w.etcd(etcd...)
				w.ask("a")
			}
		}
		for _, step := range []struct {
			name string
			do   func()
			want bool
		}{
			{"a asks for a moment", func() { ask(length, "b") }, false},
			{"a goes on asking", func() { ask(length, "b") }, true},
			{"a asks no more", func() { time.Sleep(length) }, false},
			{"a asks anew", func() { ask(length, "b") }, false},
			{"a has permits: its etcd is slow", func() { w.silent = false; ask(5*length, "b"); w.silent = true }, false},
			{"nobody has etcd", func() { ask(5 * length) }, false},
			{"b has it again", func() { ask(returning+length/2, "b") }, false},
			{"and a has not", func() { ask(length, "b") }, true},
		} {
			if step.do(); b.astray("a") != step.want {
				t.Errorf("%s: astray is %t", step.name, !step.want)
			}
		}
		if woken != 2 {
			t.Errorf("b was woken %d times, want 2", woken)
		}
	})
}

func TestAnswersToAFormerProcessCountForNothing(t *testing.T) {
	w := newWire(time.Minute, "a", "b")
	w.etcd()
	f := w.all["a"]
	f.say("b", message{Process: f.process + 1, Sent: time.Since(f.start)})
	if !f.frozen().IsZero() {
		t.Error("the answer to another process was taken for a promise")
	}
}

func TestMovedLocksSurviveTheRevocationOfTheOldLease(t *testing.T) {
	client, _ := world(t)
	old, err := client.Grant(t.Context(), 60*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	const locks = 130 // more than one transaction takes
	if err := client.PutAgent(t.Context(), old, egress.Agent{Node: "a", Revocable: true}); err != nil {
		t.Fatal(err)
	}
	ip := netip.MustParseAddr("10.10.1.0")
	for range locks {
		if ok, err := client.Claim(t.Context(), old, egress.Owner{IP: ip, Node: "a", Why: egress.ReasonClaim}); err != nil || !ok {
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
	if err := old.MoveTo(t.Context(), next, egress.Agent{Node: "a", Restarting: true}, all); err != nil {
		t.Fatal(err)
	}
	if err := client.Revoke(t.Context(), old.ID()); err != nil {
		t.Fatal(err)
	}
	a, err := client.Agent(t.Context(), "a")
	if err != nil || !a.Restarting || a.Revocable || a.Lease != store.FormatLease(next.ID()) {
		t.Errorf("the record is %+v, %v", a, err)
	}
	if ok, err := client.Claim(t.Context(), next, egress.Owner{IP: netip.MustParseAddr("10.10.1.7")}); err != nil || !ok {
		t.Errorf("a lock is not under the new lease: %t, %v", ok, err)
	}
	if err := old.MoveTo(t.Context(), next, egress.Agent{Node: "a"}, all); err == nil {
		t.Error("what is under another lease was moved")
	}
}
