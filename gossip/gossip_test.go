package gossip

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/egret-project/egret/internal/port"
)

// limit is generous: the tests share the machine. What is measured is logged.
const limit = 20 * time.Second

// members starts n members on addresses of the loopback, and returns when each sees all others.
func members(t *testing.T, n int) ([]*Gossip, []context.CancelFunc) {
	t.Helper()
	port := port.Hold(t)
	peers := map[string]netip.Addr{}
	for i := range n {
		peers[name(i)] = addr(i)
	}
	all, stops := make([]*Gossip, n), make([]context.CancelFunc, n)
	for i := range n {
		all[i], stops[i] = start(t, i, port, bytes.Repeat([]byte{7}, 32), peers)
	}
	for _, g := range all {
		for i := range n {
			if g.cfg.Node != name(i) {
				await(t, g, name(i), Alive)
			}
		}
	}
	return all, stops
}

// inbox takes the messages that members get.
var inbox = make(chan string, 100)

func name(i int) string     { return fmt.Sprintf("node-%d", i) }
func addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, byte(10 + i)}) }

func start(t *testing.T, i, port int, key []byte, peers map[string]netip.Addr) (*Gossip, context.CancelFunc) {
	t.Helper()
	g := New(Config{Node: name(i), Port: port, Key: key, Log: slog.New(slog.DiscardHandler), Changed: func() {},
		Receive: func(from string, m []byte) { inbox <- from + " to " + name(i) + ": " + string(m) }})
	g.Set(addr(i), peers, nil, 1)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); g.Run(ctx) }()
	stop := func() { cancel(); <-done }
	t.Cleanup(stop)
	return g, stop
}

func await(t *testing.T, g *Gossip, node string, want State) {
	t.Helper()
	for deadline := time.Now().Add(limit); g.State(node) != want; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s sees %s %v, want %v", g.cfg.Node, node, g.State(node), want)
		}
	}
}

// kill stops a member without a goodbye.
func kill(t *testing.T, g *Gossip) {
	t.Helper()
	g.mu.Lock()
	list := g.list
	g.list = nil
	g.self = netip.Addr{} // it must not come up again
	g.mu.Unlock()
	if err := list.Shutdown(); err != nil {
		t.Fatal(err)
	}
}

func TestDeathIsSeenByAllWithinASecondOrSo(t *testing.T) {
	for _, n := range []int{3, 10} {
		t.Run(fmt.Sprintf("%d members", n), func(t *testing.T) {
			all, _ := members(t, n)
			time.Sleep(500 * time.Millisecond) // the probes run
			began := time.Now()
			kill(t, all[0])
			var first time.Duration
			for _, g := range all[1:] {
				await(t, g, name(0), Dead)
				if first == 0 {
					first = time.Since(began)
				}
			}
			took := time.Since(began)
			t.Logf("%d members: seen by one after %v, by all after %v", n, first, took)
			if took > 10*time.Second {
				t.Errorf("all know after %v, want 1.2s, 10s on a busy machine", took)
			}
			for _, g := range all[2:] {
				// where the machine is so busy that its answers came late, it has been taken for dead, and objects
				await(t, g, name(1), Alive)
			}
		})
	}
}

func TestMemberThatStopsHasLeftAndComesBack(t *testing.T) {
	all, stops := members(t, 3)
	stops[0]()
	for _, g := range all[1:] {
		await(t, g, name(0), Left)
	}
	time.Sleep(1500 * time.Millisecond) // for the probes to find it dead
	for _, g := range all[1:] {
		if s := g.State(name(0)); s != Left {
			t.Errorf("%s sees %v, want left", g.cfg.Node, s)
		}
	}
	again, _ := start(t, 0, all[0].cfg.Port, all[0].cfg.Key, all[0].peers)
	for _, g := range all[1:] {
		await(t, g, name(0), Alive)
		await(t, again, g.cfg.Node, Alive)
	}
	kill(t, again)
	for _, g := range all[1:] {
		await(t, g, name(0), Dead)
	}
}

// A Node gets another address, and its agent goes on.
func TestAMemberMovesToTheAddressThatItsNodeHas(t *testing.T) {
	all, _ := members(t, 3)
	peers := map[string]netip.Addr{name(0): addr(9), name(1): addr(1), name(2): addr(2)}
	for i, g := range all {
		g.Set(peers[name(i)], peers, nil, 1)
	}
	for _, g := range all[1:] {
		for deadline := time.Now().Add(limit); ; time.Sleep(2 * time.Millisecond) {
			g.mu.Lock()
			m := g.known[name(0)]
			g.mu.Unlock()
			if m.state == Alive && m.node.Addr.String() == addr(9).String() {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s sees %s %v at %s", g.cfg.Node, name(0), m.state, m.node.Addr)
			}
		}
		await(t, all[0], g.cfg.Node, Alive)
	}
	time.Sleep(1500 * time.Millisecond) // for the probes to find it dead
	for _, g := range all[1:] {
		await(t, g, name(0), Alive)
	}
}

func TestMemberWithAnotherKeyIsNoMember(t *testing.T) {
	all, _ := members(t, 2)
	stranger, _ := start(t, 5, all[0].cfg.Port, bytes.Repeat([]byte{8}, 32), all[0].peers)
	time.Sleep(time.Second)
	for _, g := range all {
		if s := g.State(name(5)); s != Unknown {
			t.Errorf("%s sees the stranger %v", g.cfg.Node, s)
		}
		if s := stranger.State(g.cfg.Node); s != Unknown {
			t.Errorf("the stranger sees %s %v", g.cfg.Node, s)
		}
	}
}

func TestMessagesComeFromTheirSender(t *testing.T) {
	all, _ := members(t, 2)
	for range 10 { // any may be lost
		all[0].Send(name(1), []byte("hello"))
		select {
		case m := <-inbox:
			if m != "node-0 to node-1: hello" {
				t.Errorf("got %q", m)
			}
			return
		case <-time.After(500 * time.Millisecond):
		}
	}
	t.Error("no message came")
}

// A member of a former version compresses what it sends, one of this version does not, which would cost more than all
// else of its packets.
func TestAMemberThatCompressesIsUnderstoodAndUnderstands(t *testing.T) {
	port := port.Hold(t)
	key := bytes.Repeat([]byte{7}, 32)
	g, _ := start(t, 0, port, key, nil)
	former := New(Config{Node: name(1), Port: port, Key: key, Log: slog.New(slog.DiscardHandler), Changed: func() {}})
	c := former.config(addr(1), nil)
	if c.EnableCompression {
		t.Error("members compress their packets")
	}
	c.EnableCompression = true
	list, err := memberlist.Create(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = list.Shutdown() }) // nothing is left of it but sockets that are closed
	for deadline := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		if _, err = list.Join([]string{netip.AddrPortFrom(addr(0), uint16(port)).String()}); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	await(t, g, name(1), Alive)
	await(t, former, name(0), Alive)
	if err := list.Shutdown(); err != nil {
		t.Fatal(err)
	}
	await(t, g, name(1), Dead) // by its probes
}

func TestNewPeersAreJoined(t *testing.T) {
	port := port.Hold(t)
	key := bytes.Repeat([]byte{7}, 16)
	a, _ := start(t, 0, port, key, nil)
	b, _ := start(t, 1, port, key, nil)
	a.Set(addr(0), map[string]netip.Addr{name(1): addr(1)}, nil, 1)
	await(t, a, name(1), Alive)
	await(t, b, name(0), Alive)
	if a.State(name(9)) != Unknown {
		t.Error("somebody unknown is known")
	}
}

// Those who have lost etcd are not in its records any more, and who begins is not in theirs.
func TestWhoBeginsFindsMembersOfWhomNobodyKnows(t *testing.T) {
	all, _ := members(t, 2)
	nodes := map[string]netip.Addr{"off": netip.MustParseAddr("127.0.0.99")}
	for i := range 3 {
		nodes[name(i)] = addr(i)
	}
	began := time.Now()
	g := New(Config{Node: name(2), Port: all[0].cfg.Port, Key: all[0].cfg.Key, Log: slog.New(slog.DiscardHandler), Changed: func() {}})
	g.Set(addr(2), nil, maps.All(nodes), 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); g.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	for _, other := range all {
		await(t, other, name(2), Alive)
	}
	t.Logf("found after %v", time.Since(began))
}

// Who was away for so long that it lost its lease is dead for the others, which call those of their records alone, and
// may have lost etcd themselves meanwhile.
func TestWithAnotherLeaseMembersOfWhomNobodyKnowsAreFoundAgain(t *testing.T) {
	port, key := port.Hold(t), bytes.Repeat([]byte{7}, 16)
	a, _ := start(t, 0, port, key, nil)
	b, _ := start(t, 1, port, key, nil)
	nodes := maps.All(map[string]netip.Addr{name(0): addr(0), name(1): addr(1)})
	b.mu.Lock()
	b.calls = 10 // as when nobody answered
	b.mu.Unlock()
	b.Set(addr(1), nil, nodes, 1)
	time.Sleep(2 * rejoin)
	if s := b.State(name(0)); s != Unknown {
		t.Fatalf("under the same lease: %v, want that it calls nobody any more", s)
	}
	b.Set(addr(1), nil, nodes, 2)
	await(t, a, name(1), Alive)
	await(t, b, name(0), Alive)
}
