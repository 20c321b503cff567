package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// node is the agent of node-1, over a real etcd and the kernel of a network namespace. Its passes are the test's to make, on the thread that is
// in the namespace. A pool has two egress IPs of other nodes; node-2 is the other node.
type node struct {
	*agent
	t *testing.T
	// others is the lease by which another node has the IPs.
	others *store.Lease
}

var pooled = []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("192.0.2.12")}

func newNode(t *testing.T) *node {
	t.Helper()
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcdtest.New(t).Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	n := &node{t: t}
	n.put(client, store.PoolKey("pool"), egress.Pool{Name: "pool"})
	for i, ip := range pooled {
		name := fmt.Sprintf("e%d", i)
		n.put(client, store.EgressKey(name), egress.Policy{Name: name, Created: time.Unix(int64(i), 0),
			Addresses: []egress.Address{{IP: ip, ID: egress.ID(i + 5), Pool: "pool"}}})
	}
	for i := 1; i <= 2; i++ {
		name := fmt.Sprintf("node-%d", i)
		n.put(client, store.NodeKey(name), egress.Node{
			Name: name, Index: i, Addresses: []netip.Addr{netip.MustParseAddr(fmt.Sprintf("192.0.2.10%d", i))},
			PodCIDRs: []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i))},
		})
	}
	if n.others, err = client.Grant(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	for _, ip := range pooled {
		if ok, err := client.Claim(t.Context(), n.others, egress.Owner{IP: ip, Node: "node-2"}); err != nil || !ok {
			t.Fatal(ok, err)
		}
	}
	netns.Enter(t)
	for _, line := range []string{
		"ip link add uplink type veth peer name other", "ip link set uplink up", "ip link set other up", "ip addr add 192.0.2.101/24 dev uplink",
	} {
		netns.Run(t, line)
	}
	n.start(client)
	return n
}

// start begins an agent on the node.
func (n *node) start(client *store.Client) {
	n.t.Helper()
	var err error
	if n.agent, err = open(Config{
		Node: "node-1", NodeIP: netip.MustParseAddr("192.0.2.101"), Store: client, Log: slog.New(slog.DiscardHandler),
		LeaseTTL: time.Minute, Permit: 300 * time.Millisecond, ClaimDelay: 100 * time.Millisecond, Linger: time.Second,
	}); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { n.tables.Close() })
	if err := n.agent.start(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	ctx := n.t.Context()
	done := make(chan struct{})
	go func() { _ = n.view.Run(ctx); close(done) }() // its error is that of the context
	n.t.Cleanup(func() { <-done })
}

func (n *node) put(client *store.Client, key string, record any) {
	n.t.Helper()
	v, err := store.Encode(record)
	if err == nil {
		_, err = client.Etcd().Put(n.t.Context(), client.Prefix()+key, string(v))
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// members makes the pods the only ones of the egress on a node.
func (n *node) members(name, node string, pods ...string) {
	n.t.Helper()
	m := egress.Members{Egress: name, Node: node}
	for _, ip := range pods {
		m.Pods = append(m.Pods, egress.Member{Pod: "default/pod-" + ip, IPs: []netip.Addr{netip.MustParseAddr(ip)}})
	}
	n.put(n.Store, store.MembersByNodeKey(node, name), m)
	n.put(n.Store, store.MembersByEgressKey(name, node), m)
}

// until makes passes, and flushes when it is asked to, until what holds.
func (n *node) until(what string, flush bool, holds func() bool) {
	n.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; {
		next, err := n.pass(n.t.Context())
		if flush {
			n.flusher.flushes()
		}
		if holds() {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("not in time: %s; the last pass: %v", what, err)
		}
		wait := 20 * time.Millisecond
		if left := time.Until(next); !next.IsZero() {
			wait = min(wait, max(left, 0))
		}
		select {
		case <-n.view.Changed():
		case <-n.dirty:
		case <-time.After(wait):
		}
	}
}

// owns reports whether the node has the IPs, is permitted to use them, and announces them.
func (n *node) owns() bool {
	left, err := n.tables.Permits()
	if err != nil {
		n.t.Fatal(err)
	}
	return !slices.ContainsFunc(pooled, func(ip netip.Addr) bool { return left[ip] <= 0 || n.announced[ip] == "" })
}

// takeOver takes the IPs over from the other node, which was seen to have them, and returns when that one let go.
func (n *node) takeOver(flush bool) time.Time {
	n.t.Helper()
	n.until("the first pass", flush, func() bool { return n.announced != nil })
	n.members("e1", "node-1", "10.244.1.100") // there is something to flush
	if err := n.others.Revoke(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	began := time.Now()
	n.until("the take-over", flush, n.owns)
	return began
}

// A take-over is a race against everybody's patience; the table of connections may take seconds to be read, and is not waited for.
func TestASlowConntrackDelaysNeitherClaimNorPermitNorAnnouncement(t *testing.T) {
	n := newNode(t)
	n.members("e0", "node-1", "10.244.1.2")
	const slow = 3 * time.Second
	n.flusher.delete = func(func(conntrack.Connection) bool, ...conntrack.Filter) error {
		select {
		case <-time.After(slow):
		case <-t.Context().Done():
		}
		return nil
	}
	done := make(chan struct{})
	go func() { _ = n.flusher.run(t.Context()); close(done) }()
	t.Cleanup(func() { <-done })
	began := n.takeOver(false)
	if took := time.Since(began); took > slow/2 {
		t.Errorf("the take-over took %v", took)
	}
}

// What is left of a pod that is selected no more, or by another egress, goes on its node and at the gateway: the next pod of its address
// would have it.
func TestThePodsThatGoLeaveNoConnectionsBehind(t *testing.T) {
	n := newNode(t)
	n.members("e0", "node-1", "10.244.1.2", "10.244.1.3", "10.244.1.4")
	n.members("e0", "node-2", "10.244.2.2", "10.244.2.3", "10.244.2.4")
	n.takeOver(true)
	const mark5 = 0x0e9e0005
	entries := map[string]string{}
	add := func(name, source string, mark int, more string) {
		t.Helper()
		entries[name] = source
		netns.Run(t, fmt.Sprintf("conntrack -I -t 600 -p udp -s %s -d 203.0.113.10 --sport %d --dport 53 -m %d %s", source, 1000+len(entries), mark, more))
	}
	has := func(name string) bool {
		t.Helper()
		return strings.Contains(netns.Run(t, "conntrack -L"), "src="+entries[name]+" ")
	}
	const translated = "--src-nat 192.0.2.11"
	pods := func() {
		add("a pod that goes", "10.244.1.2", mark5, "")
		add("a pod of another egress", "10.244.1.3", mark5, "")
		add("a pod that stays", "10.244.1.4", mark5, "")
		add("a pod elsewhere that goes", "10.244.2.2", mark5, translated)
		add("a pod elsewhere of another egress", "10.244.2.3", mark5, translated)
		add("a pod elsewhere that stays", "10.244.2.4", mark5, translated)
		add("a pod that nobody knows", "10.244.1.9", mark5, "")
		add("a pod elsewhere that nobody knows", "10.244.2.9", mark5, translated)
		add("a pod of nobody", "10.244.1.8", 0, "")
	}
	left := func(when string, want ...string) {
		t.Helper()
		for name := range entries {
			if got := has(name); got != slices.Contains(want, name) {
				t.Errorf("%s: an entry of %s: %t", when, name, got)
			}
		}
	}
	pods()
	netns.Run(t, "conntrack -I -t 600 -p udp -s 10.244.1.2 -d 203.0.113.10 --sport 1001 --dport 53 -m 0x0e9e0005 --orig-zone 3742 "+translated)
	n.members("e0", "node-1", "10.244.1.4")
	n.members("e1", "node-1", "10.244.1.3", "10.244.1.100")
	n.members("e0", "node-2", "10.244.2.4")
	n.members("e1", "node-2", "10.244.2.3")
	n.until("the pods go", true, func() bool {
		return !has("a pod that goes") && !has("a pod of another egress") && !has("a pod elsewhere that goes") && !has("a pod elsewhere of another egress")
	})
	stay := []string{"a pod that stays", "a pod elsewhere that stays", "a pod that nobody knows", "a pod elsewhere that nobody knows", "a pod of nobody"}
	left("the agent runs", stay...)

	// What happens while no agent runs is found by the next one; it knows who is a member at the gateway in its second pass.
	netns.Run(t, "conntrack -F")
	pods()
	client := n.Store
	n.start(client)
	n.until("the next agent", true, func() bool { return n.owns() && !has("a pod elsewhere that nobody knows") })
	left("the next agent runs", "a pod that stays", "a pod elsewhere that stays", "a pod of nobody")
}

func TestWhatCannotBeFlushedIsAFaultAndTriedAgain(t *testing.T) {
	broken, woken := errors.New("no"), 0
	var asked [][]conntrack.Filter
	f := newFlusher(func() { woken++ })
	f.delete = func(_ func(conntrack.Connection) bool, filters ...conntrack.Filter) error {
		asked = append(asked, filters)
		return broken
	}
	ip := pooled[0]
	f.returns(ip)
	d := plan.Desired{Members: map[egress.ID]map[netip.Addr]bool{}}
	if err := f.follow(nft.Changes{}, d); err != nil {
		t.Errorf("before the first try: %v", err)
	}
	for range 2 {
		f.flush()
		if !f.owes(ip) {
			t.Error("what failed counts as done")
		}
		if err := f.follow(nft.Changes{}, d); !errors.Is(err, broken) {
			t.Errorf("error %v, want that of the last try", err)
		}
	}
	select {
	case <-f.kick:
	default:
		t.Error("a pass after a failure does not begin the next try")
	}
	broken = nil
	f.flush()
	if err := f.follow(nft.Changes{}, d); err != nil || f.owes(ip) {
		t.Errorf("done: error %v, owes %t", err, f.owes(ip))
	}
	if woken == 0 {
		t.Error("who waits for it is not woken")
	}
	if f.follow(nft.Changes{Reselected: []netip.Addr{ip}}, d); !f.flushes() {
		t.Error("a pod that is selected flushes nothing")
	}
	if last := asked[len(asked)-1]; len(last) != 1 || last[0].Source != ip {
		t.Errorf("for one pod it asks for %+v, want its connections alone", last)
	}
}

// What a pod's node has translated to a port of its own block is nobody's business but the pod's: neither the coming and going of the egress IP
// nor a repair of the tables ends it.
func TestConnectionsByABlockStayWhateverTheGateway(t *testing.T) {
	pod, other, ip := netip.MustParseAddr("10.244.1.100"), netip.MustParseAddr("10.244.1.101"), pooled[0]
	known := &pods{local: map[netip.Addr]egress.ID{pod: 5, other: 6}, blocks: map[egress.ID]netip.Addr{5: ip}, whole: true}
	all := newFlush()
	all.all, all.strays, all.repaired, all.stranded[5] = true, true, true, true
	all.pods[pod], all.pods[other], all.unhosted[ip] = true, true, true
	server := netip.MustParseAddr("203.0.113.10")
	for name, tt := range map[string]struct {
		c    conntrack.Connection
		goes bool
	}{
		"by its block":                {conntrack.Connection{Source: pod, Destination: server, Translated: ip, Port: 2048, Mark: egress.ID(5).ConnMark()}, false},
		"of a protocol without ports": {conntrack.Connection{Source: pod, Destination: server, Translated: ip, Mark: egress.ID(5).ConnMark()}, true},
		"of before it had the egress": {conntrack.Connection{Source: pod, Destination: server, Translated: pooled[1], Mark: egress.ID(5).ConnMark()}, true},
		"of a former egress":          {conntrack.Connection{Source: pod, Destination: server, Translated: ip, Mark: egress.ID(7).ConnMark()}, true},
		"without its mark":            {conntrack.Connection{Source: pod, Destination: server, Translated: ip}, true},
		"of a pod without block":      {conntrack.Connection{Source: other, Destination: server, Translated: ip, Mark: egress.ID(6).ConnMark()}, true},
		"to the egress IP":            {conntrack.Connection{Source: server, Destination: ip, Translated: server}, true},
	} {
		if got := all.matches(tt.c, known); got != tt.goes {
			t.Errorf("%s: flushed %t, want %t", name, got, tt.goes)
		}
	}
}

// flushes flushes if it is asked to.
func (f *flusher) flushes() bool {
	select {
	case <-f.kick:
		f.flush()
		return true
	default:
		return false
	}
}
