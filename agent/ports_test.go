package agent

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/store"
)

// table is what a test has in the kernel.
type table struct {
	*ports
	t      *testing.T
	now    time.Time
	opened uint64
	list   []conntrack.Connection
	lists  int // how often it was listed
}

var portsIP = netip.MustParseAddr("192.0.2.11")

func newTable(t *testing.T, reuses bool, blocks ...egress.Block) *table {
	k := &table{t: t, now: time.Unix(1000, 0)}
	k.ports = newPorts(&ports{
		log: slog.New(slog.DiscardHandler), reuses: reuses,
		opened: func() (map[egress.ID]uint64, error) { return map[egress.ID]uint64{5: k.opened}, nil },
		list: func(m, mask egress.Mark) (all []conntrack.Flow, err error) {
			k.lists++
			for _, c := range k.list {
				if c.Mark&mask == m {
					all = append(all, conntrack.Flow{Connection: c})
				}
			}
			return all, nil
		},
	})
	k.has(blocks...)
	return k
}

func portsBlock(first uint16, size int) egress.Block {
	return egress.Block{IP: portsIP, First: first, Size: size}
}

func retired(b egress.Block) egress.Block { b.Retired = true; return b }

func (k *table) has(blocks ...egress.Block) {
	k.follow(map[egress.ID][]egress.Block{5: blocks})
}

// open opens n connections to a destination from ports from first on.
func (k *table) open(first uint16, n, destination int, ended bool) {
	for i := range n {
		k.list = append(k.list, conntrack.Connection{Destination: netip.AddrFrom4([4]byte{203, 0, 113, byte(destination)}), DestinationPort: 443,
			Protocol: unix.IPPROTO_TCP, Translated: portsIP, Port: first + uint16(i), Ended: ended, Mark: egress.ID(5).ConnMark()})
	}
	k.opened += uint64(n)
}

// says looks after some time, and compares what is said then.
func (k *table) says(after time.Duration, want int, drained ...uint16) {
	k.t.Helper()
	for end := k.now.Add(after); k.now.Before(end); {
		k.now = k.now.Add(time.Second)
		k.listAfter = time.Time{} // the clock is not that of the listings
		if _, err := k.look(k.now); err != nil {
			k.t.Fatal(err)
		}
	}
	got := k.use()[portsIP]
	if got.Want != want || !slices.Equal(got.Drained, drained) {
		k.t.Errorf("after %v: wants %d and says that %v are empty, want %d and %v", after, got.Want, got.Drained, want, drained)
	}
}

func TestANodeAsksForPortsByTheBusiestDestination(t *testing.T) {
	const soon = 4 * time.Second
	for name, story := range map[string]func(*testing.T){
		"three quarters of the ports to one destination are enough": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 1024))
			k.open(2048, 768, 1, false)
			k.says(soon, 0)
		},
		"with one more it asks for twice as many, and no more when it has them": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 1024))
			k.open(2048, 769, 1, false)
			k.says(soon, 2048)
			k.has(retired(portsBlock(2048, 1024)), portsBlock(4096, 2048))
			k.says(soon, 0)
			k.says(30*time.Minute, 0) // those in the retired block would not fit into a smaller one
		},
		"as many to each of many destinations are no reason": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 1024))
			for to := range 20 {
				k.open(2048, 600, to, false)
			}
			k.says(soon, 0)
		},
		"those that have ended do not count where the kernel takes their ports": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 1024))
			k.open(2048, 1000, 1, true)
			k.says(soon, 0)
		},
		"and count where it does not": func(t *testing.T) {
			k := newTable(t, false, portsBlock(2048, 1024))
			k.open(2048, 1000, 1, true)
			k.says(soon, 2048)
		},
		"it goes on asking until half of the ports are free": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 64))
			k.open(2048, 60, 1, false)
			k.says(soon, 128)
			k.list = k.list[:40]
			k.says(time.Minute, 128)
			k.list = k.list[:32]
			k.says(time.Minute, 0)
		},
		"the second step is by all that it has": func(t *testing.T) {
			k := newTable(t, true, retired(portsBlock(2048, 64)), portsBlock(2176, 128))
			k.open(2048, 64, 1, false)
			k.open(2176, 100, 1, false)
			k.says(soon, 512)
		},
		"the largest block is all there is": func(t *testing.T) {
			k := newTable(t, true, portsBlock(32768, 32768))
			k.open(32768, 30000, 1, false)
			k.says(soon, 0)
		},
		"after ten minutes of little use it asks for a quarter": func(t *testing.T) {
			k := newTable(t, true, portsBlock(4096, 2048))
			k.open(4096, 257, 1, false)
			k.says(30*time.Minute, 0)
			k.list = k.list[:256]
			k.says(9*time.Minute, 0)
			k.says(4*time.Minute, 512)
			k.open(4096, 2000, 2, false)
			k.says(soon, 4096)
		},
		"the smallest block is kept": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 64))
			k.says(30*time.Minute, 0)
		},
		"a retired block is empty when it has no connection, not even one that has ended": func(t *testing.T) {
			k := newTable(t, true, portsBlock(2048, 64))
			k.open(2048, 2, 1, true)
			k.says(soon, 0)
			k.has(retired(portsBlock(2048, 64)), portsBlock(2176, 128))
			k.says(time.Minute, 0)
			k.list = nil
			k.says(11*time.Second, 0, 2048)
			k.has(portsBlock(2176, 128))
			k.says(soon, 0)
			k.has(retired(portsBlock(2176, 128)), portsBlock(2048, 64)) // anew
			k.open(2176, 1, 1, false)
			k.says(time.Minute, 0)
		},
	} {
		t.Run(name, story)
	}
}

func TestConnectionsAreListedOnlyWhereThereMayBeTooMany(t *testing.T) {
	k := newTable(t, true, portsBlock(2048, 1024))
	k.open(2048, 100, 1, false)
	k.says(10*time.Second, 0)
	if k.lists != 1 {
		t.Errorf("%d listings at the start, want 1", k.lists)
	}
	k.opened += 768 - 100
	k.says(10*time.Second, 0)
	if k.lists != 1 {
		t.Errorf("%d listings while it cannot be more than three quarters, want none but the first", k.lists)
	}
	k.opened++
	k.says(10*time.Second, 0)
	if k.lists != 2 {
		t.Errorf("%d listings, want a second one when there may be more", k.lists)
	}
	k.opened = 3 // of new tables
	k.says(10*time.Second, 0)
	if k.lists != 3 {
		t.Errorf("%d listings, want a third one when the count begins anew", k.lists)
	}
}

func TestManyEgressIPsShareAListing(t *testing.T) {
	k := newTable(t, true)
	blocks := map[egress.ID][]egress.Block{}
	for id := egress.ID(1); id <= 100; id++ {
		blocks[id] = []egress.Block{{IP: netip.AddrFrom4([4]byte{198, 51, 100, byte(id)}), First: 2048, Size: 1024}}
	}
	blocks[5] = []egress.Block{portsBlock(2048, 1024)}
	k.follow(blocks)
	k.open(2048, 700, 1, false)
	k.says(4*time.Second, 0)
	if k.lists != 1 {
		t.Errorf("%d listings of the table of connections for 100 egress IPs, want 1", k.lists)
	}
	if got := k.counts()[portsIP].most; got != 700 {
		t.Errorf("%d ports are in use, want 700", got)
	}
	k.says(lowEvery, 0)
	if k.lists != 2 {
		t.Errorf("%d listings after two minutes, want 2", k.lists)
	}
}

// The record of the agent says what the kernel's table of connections makes it ask for, and which retired blocks are
// empty.
func TestTheAgentAsksForPortsWhenItsConnectionsNeedThem(t *testing.T) {
	n := newNode(t)
	pod := egress.Member{Pod: "default/pod", IPs: []netip.Addr{netip.MustParseAddr("10.244.1.2")}}
	members := func(blocks ...egress.Block) {
		t.Helper()
		m := egress.Members{Egress: "e0", Node: "node-1", Pods: []egress.Member{pod}, Blocks: blocks}
		n.put(n.Store, store.MembersByNodeKey("node-1", "e0"), m)
		n.put(n.Store, store.MembersByEgressKey("e0", "node-1"), m)
	}
	first, second := portsBlock(2048, 64), portsBlock(2176, 128)
	first.Node, second.Node = "node-1", "node-1"
	members(first)
	now := time.Now()
	says := func(what string, want int, drained ...uint16) {
		t.Helper()
		n.until(what, false, func() bool {
			now = now.Add(drainEvery)
			if _, err := n.ports.look(now); err != nil {
				t.Fatal(err)
			}
			got := n.view.Snapshot().Agents["node-1"].Ports[first.IP]
			return got.Want == want && slices.Equal(got.Drained, drained)
		})
	}
	n.until("the agent has the block", false, func() bool { n.ports.mu.Lock(); defer n.ports.mu.Unlock(); return len(n.ports.blocks[5]) == 1 })
	for i := range 50 {
		netns.Run(t, fmt.Sprintf("conntrack -I -t 600 -p udp -s 10.244.1.2 -d 203.0.113.10 --sport %d --dport 53 -m 0x0e9e0005 --src-nat 192.0.2.11:%d",
			10000+i, 2048+i))
	}
	says("it asks for twice as many ports", 128)
	if got := n.view.Snapshot().Agents["node-1"].Ports[first.IP].Used; got != 50 {
		t.Errorf("it says that %d ports are in use, want 50", got)
	}
	first.Retired = true
	members(first, second)
	says("it has them", 0)
	netns.Run(t, "conntrack -F")
	says("the former block is empty", 0, 2048)
	members(second)
	says("the former block is gone", 0)
}
