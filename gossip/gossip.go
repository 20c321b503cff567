package gossip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log"
	"log/slog"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sync/errgroup"
)

// DefaultPort is the TCP and UDP port of the gossip.
const DefaultPort = 8480

// Config says how to gossip. Every field without a default in its comment must be set.
type Config struct {
	Node string // unique among all members
	Port int    // TCP and UDP, the same for all members
	Key  []byte // 16, 24 or 32 bytes, the same for all members
	// Keys returns the keys as they are now, which Key was the first of: what is sent is encrypted with the first, and
	// what comes with any of them is understood. It is asked every 10 s. nil: Key alone, for ever.
	Keys    func() ([][]byte, error)
	Log     *slog.Logger
	Changed func() // called when the State of a member changes; must not block
	// called for each message from a member; must not block; nil: they are dropped
	Receive func(from string, message []byte)

	keysEvery time.Duration // for tests; 0: reloadAfter
}

// State is what is known of a member.
type State int

const (
	Unknown State = iota // never heard of
	Alive
	Left // stopped in order
	Dead // stopped answering
)

// String returns the state as it is logged.
func (s State) String() string { return [...]string{"unknown", "alive", "left", "dead"}[s] }

// Gossip is a member. It is safe for concurrent use.
type Gossip struct {
	cfg      Config
	peersSet chan struct{} // capacity 1: Set changed something
	keyring

	mu    sync.Mutex // guards what follows
	self  netip.Addr
	peers map[string]netip.Addr
	nodes iter.Seq2[string, netip.Addr]
	calls int   // how often those of nodes were called
	lease int64 // for which they are
	known map[string]member
	list  *memberlist.Memberlist // nil before the first Set and after Run
	at    netip.Addr             // where list listens
}

type member struct {
	state State
	node  memberlist.Node
	left  bool // it said that it leaves
}

// New returns a member that is silent until Run.
func New(cfg Config) *Gossip {
	cfg.keysEvery = cmp.Or(cfg.keysEvery, reloadAfter)
	ring, _ := memberlist.NewKeyring(nil, nil) // fails with faulty keys alone
	return &Gossip{cfg: cfg, peersSet: make(chan struct{}, 1), keyring: keyring{ring: ring}, known: map[string]member{}}
}

// Set gives the node's own address, to which a member moves that has another one, and the addresses of the peers by
// node. Members may also run on other nodes, as when they have lost etcd and their leases: nodes has the addresses of
// all nodes, and after a start, and whenever lease is another one, some of them are joined, in its order, in ten
// attempts: who had lost its lease has left the records of the others, and they its own. Set never blocks. peers is not
// to be changed afterwards; the same map again costs nothing.
func (g *Gossip) Set(self netip.Addr, peers map[string]netip.Addr, nodes iter.Seq2[string, netip.Addr], lease int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.nodes = nodes
	again := lease != g.lease
	if again {
		g.lease, g.calls = lease, 0
	}
	if same := reflect.ValueOf(peers).UnsafePointer() == reflect.ValueOf(g.peers).UnsafePointer(); !again && g.self == self && (same || maps.Equal(peers, g.peers)) {
		return
	}
	g.self, g.peers = self, peers
	select {
	case g.peersSet <- struct{}{}:
	default:
	}
}

// State returns what is known of a member.
func (g *Gossip) State(node string) State {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.known[node].state
}

// Alive returns the other members that are.
func (g *Gossip) Alive() []string { return slices.Collect(maps.Keys(g.are(Alive))) }

// Dead returns the members that are.
func (g *Gossip) Dead() map[string]bool { return g.are(Dead) }

// are returns the other members of a state.
func (g *Gossip) are(s State) map[string]bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	out := map[string]bool{}
	for name, m := range g.known {
		if m.state == s {
			out[name] = true
		}
	}
	return out
}

// Send sends a message of 1 to 1000 bytes to a live member, once, by UDP: it may be lost.
func (g *Gossip) Send(node string, message []byte) {
	g.mu.Lock()
	m, list := g.known[node], g.list
	g.mu.Unlock()
	if list == nil || m.state != Alive {
		return
	}
	_ = list.SendBestEffort(&m.node, g.frame(message)) // as good as lost on the way
}

// frame puts the sender before a message. An empty message says that the sender leaves: memberlist reports a node that
// left as it does a dead one.
func (g *Gossip) frame(message []byte) []byte {
	return append(append([]byte(g.cfg.Node), 0), message...)
}

// rejoin is how often members that are not alive are joined: they may be starting, or partitioned, and no event says
// when that ends.
const rejoin = time.Second

// Run takes part until ctx ends, and then leaves: the others see Left, not Dead. A port that is taken, or an address
// that is not there yet, is tried again.
func (g *Gossip) Run(ctx context.Context) error {
	tick := time.NewTicker(rejoin)
	defer tick.Stop()
	defer g.leave()
	fault := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-g.peersSet:
		case <-tick.C:
		}
		err := g.join(ctx)
		if err == nil {
			g.rekey()
		}
		if err != nil && err.Error() != fault {
			g.cfg.Log.Warn("no gossip, will retry", "err", err)
		}
		if fault = ""; err != nil {
			fault = err.Error()
		}
	}
}

// join starts to listen, and joins each peer that is not alive.
func (g *Gossip) join(ctx context.Context) error {
	g.mu.Lock()
	self, list, at := g.self, g.list, g.at
	all := map[string]netip.Addr{}
	maps.Copy(all, g.peers)
	if self.IsValid() && g.nodes != nil && g.calls < 10 {
		g.calls++
		for name, addr := range g.nodes { // one that answers knows the others
			if len(all) == len(g.peers)+maxUnknown {
				break
			}
			if _, known := all[name]; !known {
				all[name] = addr
			}
		}
	}
	var missing []string
	for name, addr := range all {
		if g.known[name].state != Alive && name != g.cfg.Node {
			missing = append(missing, name+"/"+netip.AddrPortFrom(addr, uint16(g.cfg.Port)).String())
		}
	}
	g.mu.Unlock()
	if !self.IsValid() {
		return nil
	}
	if list != nil && at != self { // the node has another address
		g.leave()
		list = nil
	}
	if list == nil {
		at := netip.AddrPortFrom(self, uint16(g.cfg.Port))
		t, err := listen(at, g.longest, g.cfg.Log)
		if err == nil {
			if list, err = memberlist.Create(g.config(self, t)); err != nil {
				err = errors.Join(err, t.Shutdown())
			}
		}
		if err != nil {
			return fmt.Errorf("joining the gossip at %s: %w", at, err)
		}
		g.mu.Lock()
		g.list, g.at = list, self
		g.mu.Unlock()
	}
	var calls errgroup.Group
	calls.SetLimit(maxUnknown) // one that is off takes a second
	for _, peer := range missing {
		if ctx.Err() == nil {
			calls.Go(func() error {
				_, err := list.Join([]string{peer}) // not up yet, or gone: tried again
				return err
			})
		}
	}
	_ = calls.Wait()
	return nil
}

// longest is how many bytes a connection may bring: what its member knows of all members, each of them some 120 bytes
// and its name. It may know more than this one does.
func (g *Gossip) longest() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return 256<<10 + max(len(g.peers), len(g.known))<<9
}

// maxUnknown is how many nodes without a known member are joined in one attempt.
const maxUnknown = 32

// config is memberlist's for a LAN, tuned: a member that misses a probe (100 ms, asked by others too) is suspected for
// 100 ms, and then dead: a third of a second after it died; the library's own for one machine take 4 to 8 s. Short
// probes cost packets only. A busy machine is taken for dead now and then, which costs little: before anything follows
// from it, etcd is asked (egress.Suspicion). docs/failover.md has what was measured.
func (g *Gossip) config(self netip.Addr, t memberlist.Transport) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name, c.BindAddr, c.BindPort = g.cfg.Node, self.String(), g.cfg.Port
	c.AdvertiseAddr, c.AdvertisePort = self.String(), g.cfg.Port
	c.SecretKey, c.Keyring, c.Transport = g.cfg.Key, g.ring, t
	c.ProbeInterval, c.ProbeTimeout, c.SuspicionMult = 100*time.Millisecond, 40*time.Millisecond, 1
	c.SuspicionMaxTimeoutMult = 1 // as long with few confirmations as with many
	c.AwarenessMaxMultiplier = 2  // an agent that is slow itself may wait twice as long, not eight times
	c.GossipInterval = 50 * time.Millisecond
	// A probe is a packet of some 50 bytes, and 20 go out a second; the library makes a table of 70 KB for each that it
	// tries to compress. Members of former versions compress, which all understand.
	c.EnableCompression = false
	c.TCPTimeout = time.Second
	c.DisableTcpPings = true            // a death is one on UDP, which the overlay is
	c.DeadNodeReclaimTime = time.Second // a node may come back with another address
	c.Events, c.Delegate = (*events)(g), (*delegate)(g)
	c.LogOutput, c.Logger = nil, log.New(&bridge{log: g.cfg.Log}, "", 0)
	return c
}

// leave sends each member that this one leaves, and stops.
func (g *Gossip) leave() {
	g.mu.Lock()
	list := g.list
	g.list = nil
	var alive []memberlist.Node // memberlist's own change under its hands
	for _, m := range g.known {
		if m.state == Alive {
			alive = append(alive, m.node)
		}
	}
	g.mu.Unlock()
	if list == nil {
		return
	}
	var said sync.WaitGroup
	for _, n := range alive {
		said.Go(func() { _ = list.SendReliable(&n, g.frame(nil)) }) // one that does not hear it takes us for dead
	}
	said.Wait()
	if err := list.Leave(500 * time.Millisecond); err != nil {
		g.cfg.Log.Warn("gossip left without goodbye", "err", err)
	}
	if err := list.Shutdown(); err != nil {
		g.cfg.Log.Warn("stopping the gossip", "err", err)
	}
}

// set notes the state of a member.
func (g *Gossip) set(n *memberlist.Node, s State) {
	if n.Name == g.cfg.Node {
		return
	}
	g.mu.Lock()
	was := g.known[n.Name].state
	if s == Dead && g.known[n.Name].left {
		s = Left
	}
	g.known[n.Name] = member{state: s, node: *n}
	g.mu.Unlock()
	if was == s {
		return
	}
	level := slog.LevelInfo
	if s == Dead {
		level = slog.LevelWarn
	}
	g.cfg.Log.Log(context.Background(), level, "member "+s.String(), "node", n.Name)
	g.cfg.Changed()
}

type events Gossip

func (e *events) NotifyJoin(n *memberlist.Node)   { (*Gossip)(e).set(n, Alive) }
func (e *events) NotifyUpdate(n *memberlist.Node) { (*Gossip)(e).set(n, Alive) }
func (e *events) NotifyLeave(n *memberlist.Node)  { (*Gossip)(e).set(n, Dead) }

type delegate Gossip

func (d *delegate) NodeMeta(int) []byte             { return nil }
func (d *delegate) GetBroadcasts(int, int) [][]byte { return nil }
func (d *delegate) LocalState(bool) []byte          { return nil }
func (d *delegate) MergeRemoteState([]byte, bool)   {}
func (d *delegate) NotifyMsg(b []byte) {
	from, message, ok := strings.Cut(string(b), "\x00")
	switch {
	case ok && message == "":
		d.mu.Lock()
		m := d.known[from]
		m.left = true
		d.known[from] = m
		d.mu.Unlock()
	case ok && d.cfg.Receive != nil:
		d.cfg.Receive(from, []byte(message))
	}
}

// bridge passes memberlist's log lines on. It warns of each ping that fails: that is for debugging, since set logs what
// comes of it.
type bridge struct {
	log *slog.Logger

	mu   sync.Mutex // guards what follows
	last time.Time
}

// quiet is how long after a warning the next ones are for debugging only: a wrong key makes one a packet.
const quiet = 10 * time.Second

func (b *bridge) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	level := slog.LevelDebug
	b.mu.Lock()
	if strings.Contains(text, "rypt") && time.Since(b.last) > quiet { // a peer with another key, or none
		level, b.last = slog.LevelWarn, time.Now()
	}
	b.mu.Unlock()
	b.log.Log(context.Background(), level, "memberlist", "err", text)
	return len(line), nil
}
