package store

import (
	"errors"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/egret-project/egret/egress"
)

func TestOfManyClaimersOneWins(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	var wg sync.WaitGroup
	var winner atomic.Pointer[Lease]
	for range 10 {
		l := grant(t, c, time.Minute)
		wg.Go(func() {
			ok, err := c.Claim(t.Context(), l, owner, Former{})
			if err != nil {
				t.Error(err)
			}
			if ok && !winner.CompareAndSwap(nil, l) {
				t.Error("a second winner")
			}
		})
	}
	wg.Wait()
	l := winner.Load()
	if l == nil || get(t, s.Client(), OwnerKey(ip1)).Lease != l.ID() {
		t.Fatalf("winner %v, record %+v", l, get(t, s.Client(), OwnerKey(ip1)))
	}
	if ok, err := c.Claim(t.Context(), l, owner, Former{}); !ok || err != nil {
		t.Errorf("claiming what is one's own: %t, %v", ok, err)
	}
}

func TestACordonedNodeClaimsNothingButWhatIsStatic(t *testing.T) {
	c := dial(t, start(t))
	l := grant(t, c, time.Minute)
	if err := c.Cordon(t.Context(), egress.Cordon{Node: owner.Node}); err != nil {
		t.Fatal(err)
	}
	if ok, err := c.Claim(t.Context(), l, owner, Former{}); ok || err != nil {
		t.Errorf("claimed: %t, %v", ok, err)
	}
	static := owner
	static.Why = egress.ReasonStatic
	claim(t, c, l, static)
}

func TestReleaseIsFenced(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Minute)
	claim(t, c, l, owner)
	r := get(t, s.Client(), OwnerKey(ip1))
	o, err := DecodeOwner(r)
	if err != nil || o.Lease != l.ID() || o.Revision != r.Revision {
		t.Fatal(o, err)
	}
	for name, revision := range map[string]int64{"older": o.Revision - 1, "newer": o.Revision + 1} {
		stale := o
		stale.Revision = revision
		if ok, err := c.Release(t.Context(), stale); ok || err != nil {
			t.Errorf("%s revision: %t, %v", name, ok, err)
		}
	}
	if ok, err := c.Release(t.Context(), owner); ok || err == nil {
		t.Errorf("no revision: %t, %v", ok, err)
	}
	for _, want := range []bool{true, false} {
		if ok, err := c.Release(t.Context(), o); ok != want || err != nil {
			t.Errorf("release: %t, %v, want %t", ok, err, want)
		}
	}
}

// Who follows an owner that gave the IP up has nothing to wait for; who follows one that died, or of which it does not
// know, has.
func TestClaimSaysWhoGaveTheIPUp(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	held := func() egress.Owner {
		t.Helper()
		o, err := DecodeOwner(get(t, s.Client(), OwnerKey(ip1)))
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	next := func(node string, seen int64) egress.Owner {
		t.Helper()
		o := owner
		o.Node, o.From = node, "n9" // which says nothing
		claimSeen(t, c, grant(t, c, time.Minute), o, seen)
		return held()
	}
	release := func() (was int64) {
		t.Helper()
		o := held()
		if ok, err := c.Release(t.Context(), o); !ok || err != nil {
			t.Fatal(ok, err)
		}
		return o.Revision
	}
	if o := next("n1", 1); o.From != "" {
		t.Errorf("the first owner has it from %q", o.From)
	}
	first := release()
	if o := next("n2", first); o.From != "n1" {
		t.Errorf("n1 gave it up, the next owner has it from %q", o.From)
	}
	release()
	if o := next("n3", first); o.From != "n2" {
		t.Errorf("n1 gave it up, and n2, which the claimer did not see; the next owner has it from %q", o.From)
	}
	release()
	if o := next("n2", 1<<40); o.From != "" {
		t.Errorf("etcd was restored, and the claimer saw an owner of whom it does not know: from %q", o.From)
	}
	release()
	if o := next("n2", 0); o.From != "" {
		t.Errorf("no owner was seen: from %q", o.From)
	}
	dead := held()
	if _, err := s.Client().Revoke(t.Context(), clientv3.LeaseID(dead.Lease)); err != nil {
		t.Fatal(err)
	}
	for _, seen := range []int64{first, dead.Revision} {
		o := next("n2", seen)
		if o.From != "" {
			t.Errorf("n2 died, the next owner has it from %q", o.From)
		}
		del(t, c, OwnerKey(ip1))
	}
}

func TestAgentIsWrittenWhereItIsAsItWasSeen(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	if a, err := c.Agent(t.Context(), "n1"); err != nil || a.Node != "" {
		t.Errorf("no agent: %v, %v", a, err)
	}
	l := grant(t, c, time.Minute)
	write := func(l *Lease, a egress.Agent, seen int64) int64 {
		t.Helper()
		if err := c.PutAgent(t.Context(), l, a, seen); err != nil {
			t.Fatal(err)
		}
		return get(t, s.Client(), AgentKey("n1")).Revision
	}
	first := write(l, agent, 0)
	if again := write(l, agent, 0); again != first {
		t.Errorf("the same once more: revision %d, then %d", first, again)
	}
	restarting := agent
	restarting.Restarting = true
	if changed := write(l, restarting, first); changed == first {
		t.Error("a change was not written")
	}
	if err := c.PutAgent(t.Context(), l, agent, first); !errors.Is(err, ErrChanged) {
		t.Errorf("seen before it changed: %v, want %v", err, ErrChanged)
	}
	next := grant(t, c, time.Minute)
	write(next, restarting, whatever)
	if err := c.PutAgent(t.Context(), l, restarting, first); !errors.Is(err, ErrChanged) {
		t.Errorf("moved to another lease meanwhile: %v, want %v", err, ErrChanged)
	}
	if r := get(t, s.Client(), AgentKey("n1")); r.Lease != next.ID() {
		t.Errorf("lease %x, want %x", r.Lease, next.ID())
	}
	got, err := c.Agent(t.Context(), "n1")
	want := restarting
	want.Lease = egress.FormatLease(next.ID())
	if diff := cmp.Diff(want, got, compare); diff != "" || err != nil {
		t.Errorf("read again: %v (-want +got):\n%s", err, diff)
	}
	put(t, c, AgentKey("n1"), "{")
	if a, err := c.Agent(t.Context(), "n1"); err != nil || a.Node != "" {
		t.Errorf("an agent that cannot be read: %v, %v", a, err)
	}
}

// handover is a move of ip1 from n1 to n2 that is ready.
type handover struct {
	c       *Client
	lease   *Lease // of n2
	o       egress.Owner
	m       egress.Move
	to      egress.Agent
	request *Lease // of the move
}

func prepare(t *testing.T, c *Client) handover {
	t.Helper()
	h := handover{c: c, lease: grant(t, c, time.Minute)}
	claim(t, c, grant(t, c, time.Minute), owner)
	h.to = egress.Agent{Node: "n2", Lease: egress.FormatLease(h.lease.ID())}
	if err := c.PutAgent(t.Context(), h.lease, h.to, whatever); err != nil {
		t.Fatal(err)
	}
	var err error
	if h.request, err = c.RequestMoves(t.Context(), time.Minute, move); err != nil {
		t.Fatal(err)
	}
	h.m = h.move(t)
	if ok, err := c.Ready(t.Context(), h.m, h.lease); !ok || err != nil {
		t.Fatal(ok, err)
	}
	h.m, h.o = h.move(t), h.owner(t)
	return h
}

func (h handover) move(t *testing.T) egress.Move {
	t.Helper()
	m, err := Decode[egress.Move](get(t, h.c.etcd, MoveKey(ip1)))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (h handover) owner(t *testing.T) egress.Owner {
	t.Helper()
	o, err := DecodeOwner(get(t, h.c.etcd, OwnerKey(ip1)))
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestHandOverChangesTheOwnerAndEndsTheMoveInOneTransaction(t *testing.T) {
	h := prepare(t, dial(t, start(t)))
	if !h.m.Ready || h.m.Lease == 0 {
		t.Errorf("ready to move: %+v", h.m)
	}
	k := tracked(t, h.c, OwnerPrefix, MovePrefix)
	took(k)
	if ok, err := h.c.HandOver(t.Context(), h.o, h.m, h.to); !ok || err != nil {
		t.Fatal(ok, err)
	}
	until(t, "the hand-over", k.Changed(), func() bool { _, ok := k.Get(MoveKey(ip1)); return !ok })
	r, _ := k.Get(OwnerKey(ip1))
	got, err := DecodeOwner(r)
	if err != nil {
		t.Fatal(err)
	}
	want := egress.Owner{IP: ip1, Node: "n2", Since: got.Since, Why: egress.ReasonMove, From: "n1", Lease: h.lease.ID(), Revision: r.Revision}
	if diff := cmp.Diff(want, got, compare); diff != "" || time.Since(got.Since) > deadline {
		t.Errorf("owner (-want +got):\n%s", diff)
	}
	if r.Revision != h.m.Revision+1 {
		t.Errorf("the owner is of revision %d, the move was of %d", r.Revision, h.m.Revision)
	}
	if ok, err := h.c.HandOver(t.Context(), h.o, h.m, h.to); ok || err != nil {
		t.Errorf("once more: %t, %v", ok, err)
	}
}

func TestHandOverIsFenced(t *testing.T) {
	ctx := t.Context()
	c := dial(t, start(t))
	for name, spoil := range map[string]func(*handover) error{
		"the owner changed":      func(h *handover) error { h.o.Revision--; return nil },
		"the move changed":       func(h *handover) error { _, err := c.Ready(ctx, h.m, h.lease); return err },
		"the move was cancelled": func(h *handover) error { return h.request.Revoke(ctx) },
		"the target is dead":     func(h *handover) error { return h.lease.Revoke(ctx) },
		"the target is told to stop": func(h *handover) error {
			return h.lease.MoveTo(ctx, grant(t, c, time.Minute), h.to, func(netip.Addr) bool { return true }, nil)
		},
		"the target was cordoned": func(h *handover) error { return c.Cordon(ctx, egress.Cordon{Node: "n2"}) },
		"the target has restarted": func(h *handover) error {
			return c.PutAgent(ctx, grant(t, c, time.Minute), h.to, whatever)
		},
	} {
		h := prepare(t, c)
		if err := spoil(&h); err != nil {
			t.Fatal(err)
		}
		before := h.owner(t)
		if ok, err := c.HandOver(ctx, h.o, h.m, h.to); ok || err != nil {
			t.Errorf("%s: handed over: %t, %v", name, ok, err)
		}
		if diff := cmp.Diff(before, h.owner(t), compare); diff != "" {
			t.Errorf("%s (-before +after):\n%s", name, diff)
		}
		for _, key := range []string{OwnerKey(ip1), MoveKey(ip1), AgentKey("n2"), CordonKey("n2")} {
			del(t, c, key)
		}
	}
	h := prepare(t, c)
	for name, wrong := range map[string]func(h *handover){
		"another IP":       func(h *handover) { h.m.IP = ip2 },
		"another target":   func(h *handover) { h.to.Node = "n3" },
		"no owner":         func(h *handover) { h.o.Revision = 0 },
		"agent with lease": func(h *handover) { h.to.Lease = "0" },
	} {
		w := h
		wrong(&w)
		if ok, err := c.HandOver(ctx, w.o, w.m, w.to); ok || err == nil || !strings.HasPrefix(err.Error(), "handing 10.0.0.1 over to ") {
			t.Errorf("%s: %t, %v, want an error", name, ok, err)
		}
	}
}

func TestASecondRequestNamesTheTargetOfTheFirst(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	first, err := c.RequestMoves(t.Context(), time.Minute, move)
	if err != nil {
		t.Fatal(err)
	}
	other := move
	other.To = "n3"
	second := egress.Move{IP: ip2, To: "n3"}
	_, err = c.RequestMoves(t.Context(), time.Minute, second, other)
	if err == nil || err.Error() != "requesting a move: a move of 10.0.0.1 to n2 is under way" {
		t.Errorf("got %v", err)
	}
	if resp, err := s.Client().Get(t.Context(), "/egret/"+MoveKey(ip2)); err != nil || resp.Count != 0 {
		t.Errorf("half of the request was written: %v, %v", resp, err)
	}
	if resp, err := s.Client().Leases(t.Context()); err != nil || len(resp.Leases) != 1 {
		t.Errorf("leases: %v, %v, want that of the first request", resp, err)
	}
	if err := first.Revoke(t.Context()); err != nil {
		t.Error(err)
	}
	if _, err := c.RequestMoves(t.Context(), time.Minute, other); err != nil {
		t.Error(err)
	}
}

func TestARequestOutlivesItsReadinessNotItsPatience(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	end, l := gone(t, s.Client(), MoveKey(ip1)), grant(t, c, time.Minute)
	if _, err := c.RequestMoves(t.Context(), 6*time.Second, move); err != nil {
		t.Fatal(err)
	}
	m, err := Decode[egress.Move](get(t, s.Client(), MoveKey(ip1)))
	if err != nil {
		t.Fatal(err)
	}
	stale := m
	stale.Revision--
	if ok, err := c.Ready(t.Context(), stale, l); ok || err != nil {
		t.Errorf("ready for a move of another revision: %t, %v", ok, err)
	}
	if ok, err := c.Ready(t.Context(), m, l); !ok || err != nil {
		t.Errorf("ready: %t, %v", ok, err)
	}
	if r := get(t, s.Client(), MoveKey(ip1)); r.Lease != m.Lease {
		t.Errorf("lease %x, want %x", r.Lease, m.Lease)
	}
	recv(t, "the end of the request", end)
}

// historyOf returns the history of ip1, as "node why from".
func historyOf(t *testing.T, c *Client) []string {
	t.Helper()
	tenures, err := c.History(t.Context(), ip1)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, h := range tenures {
		out = append(out, strings.TrimSpace(strings.Join([]string{h.Node, string(h.Why), h.From}, " ")))
		if h.IP != ip1 || time.Since(h.Since) > deadline {
			t.Errorf("%+v: want ip and time", h)
		}
	}
	return out
}

func TestEveryChangeOfOwnerIsInTheHistoryAndNothingElse(t *testing.T) {
	c := dial(t, start(t))
	h := prepare(t, c) // n1 claims
	if ok, err := c.Claim(t.Context(), h.lease, egress.Owner{IP: ip1, Node: "n3"}, Former{}); ok || err != nil {
		t.Fatal("claiming what n1 has:", ok, err)
	}
	stale := h.o
	stale.Revision--
	if ok, err := c.Release(t.Context(), stale); ok || err != nil {
		t.Fatal("releasing another tenure:", ok, err)
	}
	h.m.Why = egress.ReasonDrain
	if ok, err := c.HandOver(t.Context(), h.o, h.m, h.to); !ok || err != nil {
		t.Fatal(ok, err)
	}
	if o := h.owner(t); o.Why != egress.ReasonDrain {
		t.Errorf("owner %+v, want one that says why", o)
	}
	if ok, err := c.Release(t.Context(), h.owner(t)); !ok || err != nil {
		t.Fatal(ok, err)
	}
	want := []string{"n1 claim", "n2 drain n1", "release n2"}
	if diff := cmp.Diff(want, historyOf(t, c)); diff != "" {
		t.Errorf("history (-want +got):\n%s", diff)
	}
}

// n1 holds ip1, and its kernel answers although the agent is frozen. n2 gets the lock, and gives it back before it has
// waited for n1.
func TestALockThatWasNotUsedIsNotTakenOverAtOnce(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	held := func() egress.Owner {
		t.Helper()
		o, err := DecodeOwner(get(t, s.Client(), OwnerKey(ip1)))
		if err != nil {
			t.Fatal(err)
		}
		return o
	}
	for name, giveBack := range map[string]func(*Lease) error{
		"it may not hold the IP any more": func(*Lease) error {
			_, err := c.ReleaseUnused(t.Context(), held())
			return err
		},
		"it is told to stop": func(l *Lease) error {
			return l.MoveTo(t.Context(), grant(t, c, time.Minute), egress.Agent{Node: "n2"}, func(netip.Addr) bool { return false }, nil)
		},
	} {
		second := owner
		second.Node = "n2"
		l := grant(t, c, time.Minute)
		if err := c.PutAgent(t.Context(), l, egress.Agent{Node: "n2"}, whatever); err != nil {
			t.Fatal(err)
		}
		claim(t, c, l, second)
		got := held().Revision
		if err := giveBack(l); err != nil {
			t.Fatal(err)
		}
		third := owner
		third.Node = "n3"
		claimSeen(t, c, grant(t, c, time.Minute), third, got)
		if o := held(); o.Node != "n3" || o.From != "" {
			t.Errorf("%s: the owner is %s from %q: it would use the IP at once", name, o.Node, o.From)
		}
		del(t, c, OwnerKey(ip1))
		del(t, c, AgentKey("n2"))
	}
}

func TestAnIPIsUnusedFromItsAllocationToItsFirstOwner(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Minute)
	want := func(want bool, when string) {
		t.Helper()
		if got, err := c.Unused(t.Context(), ip1); err != nil || got != want {
			t.Errorf("%s: unused %t, %v", when, got, err)
		}
	}
	allocate := func() {
		t.Helper()
		put(t, c, AllocationKey(ip1), egress.Allocation{IP: ip1, ID: 1})
	}
	want(false, "not allocated")
	allocate()
	want(true, "allocated")
	allocate() // its record changes
	want(true, "still allocated")
	claim(t, c, l, owner)
	want(false, "claimed")
	o, err := DecodeOwner(get(t, s.Client(), OwnerKey(ip1)))
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := c.Release(t.Context(), o); !ok || err != nil {
		t.Fatal(ok, err)
	}
	allocate()
	want(false, "given back")
	del(t, c, AllocationKey(ip1))
	allocate()
	want(true, "allocated anew")
}

func TestHistoryIsBounded(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Minute)
	for range 20 {
		claim(t, c, l, owner)
		o, err := DecodeOwner(get(t, s.Client(), OwnerKey(ip1)))
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := c.Release(t.Context(), o); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	other := owner
	other.IP = addr("10.0.0.10") // whose key begins like ip1's
	claim(t, c, l, other)
	revision := func() int64 { return get(t, s.Client(), OwnerKey(other.IP)).Revision }
	before := historyOf(t, c)
	for range 2 {
		if err := c.TrimHistory(t.Context(), ip1); err != nil {
			t.Fatal(err)
		}
		resp, err := s.Client().Get(t.Context(), c.key(HistoryPrefix+ip1.String()+"/"), clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil || resp.Count != maxHistory {
			t.Fatalf("%d records, %v, want %d", resp.Count, err, maxHistory)
		}
		if resp.Header.Revision != revision()+1 {
			t.Errorf("revision %d, want one write after %d", resp.Header.Revision, revision())
		}
	}
	if diff := cmp.Diff(before, historyOf(t, c)); diff != "" || len(before) != maxHistory {
		t.Errorf("%d tenures; (-before +after trimming):\n%s", len(before), diff)
	}
	if rest, err := c.History(t.Context(), other.IP); err != nil || len(rest) != 1 {
		t.Errorf("history of another IP: %v, %v", rest, err)
	}
}

func TestAnOwnerAsksForOneMoveOfWhatIsItsOwn(t *testing.T) {
	s := start(t)
	c := dial(t, s)
	l := grant(t, c, time.Minute)
	claim(t, c, l, owner)
	o, err := DecodeOwner(get(t, s.Client(), OwnerKey(ip1)))
	if err != nil {
		t.Fatal(err)
	}
	stale := o
	stale.Revision--
	if ok, err := c.AskMove(t.Context(), l, stale, move); ok || err != nil {
		t.Errorf("of another tenure: %t, %v", ok, err)
	}
	for _, want := range []bool{true, false} {
		if ok, err := c.AskMove(t.Context(), l, o, move); ok != want || err != nil {
			t.Errorf("asking: %t, %v, want %t", ok, err, want)
		}
	}
	m, err := Decode[egress.Move](get(t, s.Client(), MoveKey(ip1)))
	if err != nil || m.Lease != l.ID() {
		t.Fatalf("move %+v, %v, want one under the owner's lease", m, err)
	}
	old := m
	old.Revision--
	if ok, err := c.WithdrawMove(t.Context(), old); ok || err != nil {
		t.Errorf("withdrawing another request: %t, %v", ok, err)
	}
	if ok, err := c.WithdrawMove(t.Context(), m); !ok || err != nil {
		t.Errorf("withdrawing: %t, %v", ok, err)
	}
}

func TestPinsAndCordonsComeAndGo(t *testing.T) {
	ctx := t.Context()
	c := dial(t, start(t))
	if err := c.Pin(ctx, pin); err != nil {
		t.Fatal(err)
	}
	other := pin
	other.Node = "n9"
	if err := c.Pin(ctx, other); err != nil {
		t.Fatal(err)
	}
	later := cordon
	later.Since = noon.Add(time.Hour)
	for _, r := range []egress.Cordon{cordon, later} {
		if err := c.Cordon(ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	all, err := c.ReadAll(ctx)
	if err != nil || all.Pins[pin.IP].Node != "n9" || !all.Cordons[cordon.Node].Since.Equal(noon) {
		t.Errorf("pins %v, cordons %v, %v: want the later pin, the earlier cordon", all.Pins, all.Cordons, err)
	}
	for _, want := range []bool{true, false} {
		if ok, err := c.Unpin(ctx, pin.IP); ok != want || err != nil {
			t.Errorf("unpin: %t, %v, want %t", ok, err, want)
		}
		if ok, err := c.Uncordon(ctx, cordon.Node); ok != want || err != nil {
			t.Errorf("uncordon: %t, %v, want %t", ok, err, want)
		}
	}
}
