package agent

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// giver is the part of node-1's agent that gives IPs away, over a real etcd. It holds two IPs of a pool; there are
// three nodes.
type giver struct {
	*agent
	t *testing.T
}

var given = []netip.Addr{netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.12")}

func newGiver(t *testing.T) *giver {
	t.Helper()
	c := newEtcd(t)
	cfg := Config{Node: "node-1", Store: c, Log: slog.New(slog.DiscardHandler)}
	g := &giver{&agent{Config: cfg, driver: driver{machine: newMachine(ownership.Config{})}, loopState: loopState{moves: newMoves(cfg)}}, t}
	lease, err := c.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	g.machine.grant(lease)
	g.put(store.PoolKey("pool"), egress.Pool{Name: "pool"})
	for i, ip := range given {
		name := fmt.Sprintf("e%d", i)
		g.put(store.EgressKey(name), egress.Policy{Name: name, Created: time.Unix(int64(i), 0), Addresses: []egress.Address{{IP: ip, ID: egress.ID(i + 1), Pool: "pool"}}})
		if ok, err := c.Claim(t.Context(), lease, egress.Owner{IP: ip, Node: g.Node}, store.Former{}); !ok || err != nil {
			t.Fatal(ok, err)
		}
	}
	for i := 1; i <= 3; i++ {
		name := fmt.Sprintf("node-%d", i)
		g.put(store.NodeKey(name), egress.Node{Name: name, Index: i})
		g.put(store.AgentKey(name), egress.Agent{Node: name})
	}
	return g
}

func (g *giver) put(key string, record any) {
	g.t.Helper()
	v, err := store.Encode(record)
	if err == nil {
		_, err = g.Store.Etcd().Put(g.t.Context(), g.Store.Prefix()+key, string(v))
	}
	if err != nil {
		g.t.Fatal(err)
	}
}

// at gives away at that time, and returns the moves that are asked for afterwards, and when there is more to do.
func (g *giver) at(now time.Time) (moves map[netip.Addr]egress.Move, next time.Time) {
	g.t.Helper()
	next, err := g.moves.request(g.t.Context(), round{Cluster: plan.New(g.snapshot()), facts: plan.Facts{Node: g.Node}, lease: g.machine.current(), now: now})
	if err != nil {
		g.t.Fatal(err)
	}
	return g.snapshot().Moves, next
}

func (g *giver) snapshot() *egress.Snapshot {
	g.t.Helper()
	all, err := g.Store.ReadAll(g.t.Context())
	if err != nil {
		g.t.Fatal(err)
	}
	return &all.Snapshot
}

func TestATargetThatDoesNotGetReadyIsReplaced(t *testing.T) {
	g, now := newGiver(t), time.Now()
	if moves, next := g.at(now); len(moves) > 0 || !next.IsZero() {
		t.Fatalf("not cordoned: moves %v, next %v", moves, next)
	}
	if err := g.Store.Cordon(t.Context(), egress.Cordon{Node: "node-1"}); err != nil {
		t.Fatal(err)
	}
	moves, _ := g.at(now)
	first := moves[given[0]]
	if len(moves) != 1 || first.Why != egress.ReasonDrain || first.Lease != g.machine.current().ID() || first.To == "node-1" {
		t.Fatalf("moves %+v, want one of %s, under the agent's lease", moves, given[0])
	}
	if moves, next := g.at(now); moves[given[0]].Revision != first.Revision || !next.Equal(now.Add(readyTimeout)) {
		t.Errorf("while it waits: moves %+v, next %v, want the same, and %v", moves, next, now.Add(readyTimeout))
	}
	now = now.Add(readyTimeout)
	if moves, _ := g.at(now); len(moves) != 0 {
		t.Errorf("after %v: %+v, want it withdrawn", readyTimeout, moves)
	}
	moves, _ = g.at(now)
	second := moves[given[0]]
	if len(moves) != 1 || second.To == first.To || second.To == "node-1" {
		t.Errorf("then %+v, want the third node", moves)
	}
	g.at(now)
	now = now.Add(readyTimeout)
	g.at(now)
	if moves, next := g.at(now); len(moves) != 0 || next.IsZero() || !next.Before(now.Add(avoidTime)) {
		t.Errorf("nobody gets ready: moves %+v, next %v, want none until the first is asked again", moves, next)
	}
	if moves, _ := g.at(now.Add(avoidTime - readyTimeout)); moves[given[0]].To != first.To {
		t.Errorf("later %+v, want %s once more", moves, first.To)
	}
}

// Who drains a node is in the history of its IPs, as who moves one is.
func TestADrainSaysWhoCordonedTheNode(t *testing.T) {
	g, now := newGiver(t), time.Now()
	g.put(store.CordonKey("node-1"), egress.Cordon{Node: "node-1", By: "alice@laptop"})
	moves, _ := g.at(now)
	if m := moves[given[0]]; m.Why != egress.ReasonDrain || m.By != "alice@laptop" {
		t.Errorf("asked for by %q, why %q; want who cordoned the node", m.By, m.Why)
	}
}

func TestATargetThatBeginsToRestartIsReplacedAtOnce(t *testing.T) {
	g, now := newGiver(t), time.Now()
	if err := g.Store.Cordon(t.Context(), egress.Cordon{Node: "node-1"}); err != nil {
		t.Fatal(err)
	}
	moves, _ := g.at(now)
	first := moves[given[0]]
	if ok, err := g.Store.Ready(t.Context(), first, g.machine.current()); !ok || err != nil { // by whatever lease
		t.Fatal(ok, err)
	}
	g.put(store.AgentKey(first.To), egress.Agent{Node: first.To, Restarting: true})
	g.at(now)
	moves, _ = g.at(now)
	if second := moves[given[0]]; len(moves) != 1 || second.To == first.To || second.To == "node-1" {
		t.Errorf("moves %+v, want the third node asked at once", moves)
	}
	g.put(store.AgentKey(first.To), egress.Agent{Node: first.To})
	if until, avoided := g.moves.avoid[first.To]; avoided {
		t.Errorf("%s is avoided until %v, and has only restarted", first.To, until)
	}
}

func TestMovesOfOthersAreWaitedForAndLeftAlone(t *testing.T) {
	g, now := newGiver(t), time.Now()
	if err := g.Store.Cordon(t.Context(), egress.Cordon{Node: "node-1"}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Store.RequestMoves(t.Context(), time.Minute, egress.Move{IP: given[1], To: "node-3"}); err != nil {
		t.Fatal(err)
	}
	for _, when := range []time.Time{now, now.Add(readyTimeout)} {
		if moves, _ := g.at(when); len(moves) != 1 || moves[given[1]].To != "node-3" {
			t.Errorf("moves %+v, want the operator's alone", moves)
		}
	}
}

func TestAnIPGoesWhereItBelongsAfterTheHoldDownOnly(t *testing.T) {
	g, now := newGiver(t), time.Now()
	if err := g.Store.Pin(t.Context(), egress.Pin{IP: given[1], Node: "node-2"}); err != nil {
		t.Fatal(err)
	}
	g.put(store.NodeKey("node-3"), egress.Node{Name: "node-3", Index: 3, Cordoned: true})
	g.put(store.EgressKey("e0"), egress.Policy{Name: "e0"}) // so that the pin alone counts
	if moves, next := g.at(now); len(moves) > 0 || !next.IsZero() {
		t.Errorf("without rebalancing: moves %v, next %v", moves, next)
	}
	g.moves.after = time.Minute
	for _, when := range []time.Duration{0, 59 * time.Second} {
		if moves, next := g.at(now.Add(when)); len(moves) > 0 || !next.Equal(now.Add(time.Minute)) {
			t.Errorf("after %v: moves %v, next %v, want none for a minute", when, moves, next)
		}
	}
	// What interrupts the time begins it anew.
	g.put(store.NodeKey("node-2"), egress.Node{Name: "node-2", Index: 2, Cordoned: true})
	g.at(now.Add(59 * time.Second))
	g.put(store.NodeKey("node-2"), egress.Node{Name: "node-2", Index: 2})
	now = now.Add(time.Minute)
	if moves, next := g.at(now); len(moves) > 0 || !next.Equal(now.Add(time.Minute)) {
		t.Errorf("after an interruption: moves %v, next %v, want none for a minute", moves, next)
	}
	moves, _ := g.at(now.Add(time.Minute))
	if m := moves[given[1]]; len(moves) != 1 || m.To != "node-2" || m.Why != egress.ReasonRebalance {
		t.Errorf("after a minute: moves %+v, want %s to node-2", moves, given[1])
	}
}
