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
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// node is the agent of node-1, over a real etcd and the kernel of a network namespace. Its passes are the test's to
// make, on the thread that is in the namespace. A pool has two egress IPs of other nodes; node-2 is the other node.
type node struct {
	*agent
	t *testing.T
	// others is the lease by which another node has the IPs.
	others *store.Lease
}

var pooled = []netip.Addr{netip.MustParseAddr("192.0.2.11"), netip.MustParseAddr("192.0.2.12")}

func newNode(t *testing.T) *node {
	t.Helper()
	client := newEtcd(t)
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
	var err error
	if n.others, err = client.Grant(t.Context(), time.Minute); err != nil {
		t.Fatal(err)
	}
	for _, ip := range pooled {
		if ok, err := client.Claim(t.Context(), n.others, egress.Owner{IP: ip, Node: "node-2"}, store.Former{}); err != nil || !ok {
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
		Timing: Timing{LeaseTTL: time.Minute, Permit: 300 * time.Millisecond, ClaimDelay: 100 * time.Millisecond, Linger: time.Second},
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
		next, err := n.reconcile(n.t.Context())
		if flush {
			n.flusher.flushes()
		}
		if holds() {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("not in time: %s; the last round: %v", what, err)
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
	n.until("the first round", flush, func() bool { return n.announced != nil })
	n.members("e1", "node-1", "10.244.1.100") // there is something to flush
	if err := n.others.Revoke(n.t.Context()); err != nil {
		n.t.Fatal(err)
	}
	began := time.Now()
	n.until("the take-over", flush, n.owns)
	return began
}

// A take-over is a race against everybody's patience; the table of connections may take seconds to be read, and is not
// waited for.
func TestASlowConntrackDelaysNeitherClaimNorPermitNorAnnouncement(t *testing.T) {
	n := newNode(t)
	n.members("e0", "node-1", "10.244.1.2")
	const slow = 20 * time.Second
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

// What is left of a pod that is selected no more, or by another egress, goes: the next pod of its address would have
// it. Of another node's pods the gateway knows nothing but the node: theirs end with the egress IP.
func TestThePodsThatGoLeaveNoConnectionsBehind(t *testing.T) {
	n := newNode(t)
	n.members("e0", "node-1", "10.244.1.2", "10.244.1.3", "10.244.1.4")
	n.members("e0", "node-2", "10.244.2.2")
	n.takeOver(true)
	entries := map[string]string{}
	add := func(name, source, translated string, mark egress.Mark) {
		t.Helper()
		entries[name] = fmt.Sprintf("src=%s dst=203.0.113.10 sport=%d ", source, 1000+len(entries))
		netns.Run(t, fmt.Sprintf("conntrack -I -t 600 -p udp -s %s -d 203.0.113.10 --sport %d --dport 53 -m %d --src-nat %s",
			source, 1000+len(entries)-1, mark, translated))
	}
	has := func(name string) bool {
		t.Helper()
		return strings.Contains(netns.Run(t, "conntrack -L"), entries[name])
	}
	here, other := egress.OverlaySource(1, 5, pooled[0]).String(), egress.OverlaySource(2, 5, pooled[0]).String()
	pods := func() {
		clear(entries)
		ip, five := pooled[0].String(), egress.ID(5).ConnMark()
		add("a pod that goes", "10.244.1.2", ip, five)
		add("a pod of another egress", "10.244.1.3", ip, five)
		add("a pod that stays", "10.244.1.4", ip, five)
		add("a pod that stays, when another node was the gateway", "10.244.1.4", here, five)
		add("a pod that stays, by a former version", "10.244.1.4", "10.244.1.4", five)
		add("another node", other, ip, five)
		add("another node's pod, by a former version", "10.244.2.2", ip, five)
		add("a pod that nobody knows", "10.244.1.9", ip, five)
		add("a pod of nobody", "10.244.1.8", "192.0.2.101", 0)
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
	n.members("e0", "node-1", "10.244.1.4")
	n.members("e1", "node-1", "10.244.1.3", "10.244.1.100")
	n.members("e0", "node-2", "10.244.2.3")
	n.until("the pods go", true, func() bool { return !has("a pod that goes") && !has("a pod of another egress") })
	left("the agent runs", "a pod that stays", "a pod that stays, when another node was the gateway", "a pod that stays, by a former version",
		"another node", "another node's pod, by a former version", "a pod that nobody knows", "a pod of nobody")

	// What happens while no agent runs is found by the next one.
	netns.Run(t, "conntrack -F")
	pods()
	client := n.Store
	n.start(client)
	n.until("the next agent", true, func() bool { return n.owns() && !has("another node's pod, by a former version") })
	left("the next agent runs", "a pod that stays", "another node", "a pod of nobody")
}

// A connection is translated once: what is by no block, and by another gateway from now on, begins anew.
func TestWhatIsByNoBlockGoesWithItsGateway(t *testing.T) {
	pod, ip := netip.MustParseAddr("10.244.1.100"), pooled[0]
	overlay := egress.OverlaySource(1, 5, ip)
	of := func(source, translated netip.Addr, port uint16) conntrack.Connection {
		return conntrack.Connection{Source: source, Translated: translated, Port: port, Mark: egress.ID(5).ConnMark()}
	}
	entries := map[string]conntrack.Connection{
		"by its block": of(pod, ip, 2048), "by the IP, without port": of(pod, ip, 0), "by another IP": of(pod, pooled[1], 2048),
		"by the overlay": of(pod, overlay, 2048), "of another node": of(egress.OverlaySource(2, 5, ip), ip, 2048),
	}
	var gone []string
	f := newFlusher(func() {})
	f.delete = func(match func(conntrack.Connection) bool, filters ...conntrack.Filter) error {
		for name, c := range entries {
			if match(c) {
				gone = append(gone, name)
			}
		}
		return nil
	}
	desired := func(gateway string) plan.Desired {
		d := plan.Desired{
			NFT: nft.State{Pods: map[netip.Addr]egress.ID{pod: 5}}, Blocks: map[egress.ID][]egress.Block{5: {{IP: ip, First: 2048, Size: 64}}},
		}
		switch gateway {
		case "here":
			d.NFT.Hosted = map[egress.ID]nft.Hosted{5: {IP: ip}}
		case "elsewhere":
			d.NFT.OverlaySources = map[egress.ID]netip.Addr{5: overlay}
		case "elsewhere, and here soon":
			d.NFT.Hosted, d.NFT.OverlaySources = map[egress.ID]nft.Hosted{5: {IP: ip}}, map[egress.ID]netip.Addr{5: overlay}
		}
		return d
	}
	byIP, byOverlay := []string{"by another IP", "by the IP, without port"}, []string{"by another IP", "by the overlay"}
	for _, step := range []struct {
		gateway string
		gone    []string
	}{
		// it is not known yet what of the own stays; what other nodes had here is of another time
		{"nowhere", []string{"of another node"}},
		{"elsewhere", byIP},
		{"elsewhere", nil},
		{"nowhere", nil},
		{"elsewhere", nil}, // by the same address, whoever has the egress IP
		{"elsewhere, and here soon", nil},
		{"here", byOverlay},
		{"nowhere", nil},
		{"here", nil},
		{"elsewhere", byIP},
	} {
		gone = nil
		if err := f.follow(nft.Changes{}, desired(step.gateway)); err != nil {
			t.Fatal(err)
		}
		f.flushes()
		slices.Sort(gone)
		if !slices.Equal(gone, step.gone) {
			t.Errorf("the gateway is %s: flushed %q, want %q", step.gateway, gone, step.gone)
		}
	}
	if f.follow(nft.Changes{}, desired("elsewhere")); f.flushes() {
		t.Error("the table of connections is read, and nothing has changed")
	}
}

func TestWhatCannotBeFlushedIsAFaultAndTriedAgain(t *testing.T) {
	broken, woken := errors.New("no"), 0
	var asked [][]conntrack.Filter
	f := newFlusher(func() { woken++ })
	f.delete = func(_ func(conntrack.Connection) bool, filters ...conntrack.Filter) error {
		asked = append(asked, filters)
		return broken
	}
	ip, d := pooled[0], plan.Desired{}
	if err := f.follow(nft.Changes{Unhosted: []netip.Addr{ip}}, d); err != nil {
		t.Errorf("before the first try: %v", err)
	}
	for range 2 {
		f.flush()
		if !f.toFlush.unhosted[ip] {
			t.Error("what failed counts as done")
		}
		if err := f.follow(nft.Changes{}, d); !errors.Is(err, broken) {
			t.Errorf("error %v, want that of the last try", err)
		}
	}
	select {
	case <-f.kick:
	default:
		t.Error("a round after a failure does not begin the next try")
	}
	broken = nil
	f.flush()
	if err := f.follow(nft.Changes{}, d); err != nil || !f.toFlush.empty() {
		t.Errorf("done: error %v, to flush %+v", err, f.toFlush)
	}
	if woken != 2 {
		t.Errorf("told %d times, want when it failed and when it did not any more", woken)
	}
	if f.follow(nft.Changes{Reselected: []netip.Addr{ip}}, d); !f.flushes() {
		t.Error("a pod that is selected flushes nothing")
	}
	if last := asked[len(asked)-1]; len(last) != 1 || last[0].Source != ip {
		t.Errorf("for one pod it asks for %+v, want its connections alone", last)
	}
}

// What a pod's node has translated to a port of its own block is nobody's business but the pod's: neither the coming
// and going of the egress IP nor a repair of the tables ends it. All else goes as soon as it has another source than it
// would get now.
func TestConnectionsByABlockStayAndOthersAsLongAsTheirSourceIsRight(t *testing.T) {
	pod, other, ip := netip.MustParseAddr("10.244.1.100"), netip.MustParseAddr("10.244.1.101"), pooled[0]
	known := &pods{
		local: map[netip.Addr]egress.ID{pod: 5, other: 6}, whole: true,
		blocks:  map[egress.ID][]egress.Block{5: {{IP: ip, First: 8192, Size: 64, Retired: true}, {IP: ip, First: 2048, Size: 64}}},
		sources: map[egress.ID]netip.Addr{5: egress.OverlaySource(1, 5, ip), 6: egress.OverlaySource(1, 6, ip)},
		except:  []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")},
	}
	all := newFlush()
	all.all, all.strays, all.repaired, all.stranded[5] = true, true, true, true
	all.pods[pod], all.pods[other], all.unhosted[ip] = true, true, true
	some := newFlush()
	some.pods[pod] = true
	server, service := netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("10.96.0.1")
	five, seven := egress.ID(5).ConnMark(), egress.ID(7).ConnMark()
	elsewhere, remote := egress.OverlaySource(2, 5, ip), netip.MustParseAddr("10.244.2.2")
	of := func(source, translated netip.Addr, port uint16, mark egress.Mark) conntrack.Connection {
		return conntrack.Connection{Source: source, Destination: server, Translated: translated, Port: port, Mark: mark}
	}
	for name, tt := range map[string]struct {
		c       conntrack.Connection
		all, of bool // goes when all that can be does, and when the pod has got another egress
	}{
		"by its block":                         {of(pod, ip, 2048, five), false, false},
		"by a block that retires":              {of(pod, ip, 8255, five), false, false},
		"of before it had the block":           {of(pod, ip, 1500, five), true, false},
		"of a protocol without ports":          {of(pod, ip, 0, five), true, false},
		"by the overlay":                       {of(pod, known.sources[5], 2048, five), false, false},
		"of before it had the egress":          {of(pod, pooled[1], 2048, five), true, false},
		"of a former egress":                   {of(pod, ip, 2048, seven), true, true},
		"of a former egress, by its block":     {of(pod, pooled[1], 2048, seven), true, true},
		"without its mark":                     {of(pod, ip, 0, 0), true, true},
		"to a service of the cluster":          {conntrack.Connection{Source: pod, Destination: service, Translated: pod}, false, false},
		"of a pod without block":               {of(other, ip, 2048, egress.ID(6).ConnMark()), true, false},
		"to the egress IP":                     {conntrack.Connection{Source: server, Destination: ip, Translated: server}, true, false},
		"of another node, to an IP that left":  {of(elsewhere, ip, 2048, five), true, false},
		"of another node, to one that is here": {of(elsewhere, pooled[1], 2048, five), false, false},
		"of a former version's gateway":        {of(remote, pooled[1], 2048, five), true, false},
		"of nobody":                            {of(remote, remote, 0, 0), false, false},
	} {
		if got := all.matches(tt.c, known); got != tt.all {
			t.Errorf("%s: flushed %t with all, want %t", name, got, tt.all)
		}
		if got := some.matches(tt.c, known); got != tt.of {
			t.Errorf("%s: flushed %t with the pod, want %t", name, got, tt.of)
		}
	}
}

// A block that is gone in a pass in which a record cannot be read is gone for certain with the next one that reads all.
func TestABlockThatIsLostWhileARecordCannotBeReadIsNotForgotten(t *testing.T) {
	f := newFlusher(func() {})
	block := egress.Block{IP: pooled[0], First: 2048, Size: 64}
	follow := func(keep bool, blocks ...egress.Block) bool {
		f.toFlush = newFlush()
		d := plan.Desired{NFT: nft.State{Keep: keep}}
		if len(blocks) > 0 {
			d.Blocks = map[egress.ID][]egress.Block{5: blocks}
		}
		if err := f.follow(nft.Changes{}, d); err != nil {
			t.Fatal(err)
		}
		return f.toFlush.stranded[5]
	}
	other := egress.Block{IP: pooled[0], First: 4096, Size: 64}
	for _, step := range []struct {
		name   string
		keep   bool
		blocks []egress.Block
		want   bool
	}{
		{"as it comes", false, []egress.Block{block}, false},
		{"not there, and something cannot be read", true, nil, false},
		{"another one, and something cannot be read", true, []egress.Block{other}, false},
		{"gone for certain", false, []egress.Block{other}, true},
		{"the other one stays", false, []egress.Block{other}, false},
	} {
		if got := follow(step.keep, step.blocks...); got != step.want {
			t.Errorf("%s: connections by no block are flushed: %t, want %t", step.name, got, step.want)
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
