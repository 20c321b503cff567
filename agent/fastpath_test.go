package agent

import (
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/routing"
)

func TestTheFastPathHasWhatLeavesByTheMainTableWithoutALimit(t *testing.T) {
	self, other := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.2")
	ip := func(last byte) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, last}) }
	six := netip.MustParseAddr("fd00::1")
	port := func(ip netip.Addr) nft.Port {
		return nft.Port{Block: egress.Block{IP: ip, First: 2048, Size: 64}, Index: 2, Node: other}
	}
	tables := nft.State{Self: self, Nodes: []netip.Addr{other}, Hosted: map[egress.ID]nft.Hosted{
		1: {IP: ip(1), Mark: egress.LocalMark}, 2: {IP: ip(2), Mark: egress.SubnetMark(0)}, 3: {IP: ip(3), Mark: egress.LocalMark, Limit: nft.Limit{Rate: 1}},
		4: {IP: six, Mark: egress.LocalMark}, 5: {IP: ip(5), Mark: egress.LocalMark}, 6: {IP: ip(5), Mark: egress.LocalMark, Limit: nft.Limit{Rate: 1}},
	}, Ports: []nft.Port{port(ip(1)), port(ip(2)), port(ip(3)), port(six), port(ip(5)), port(ip(7))}}
	links := routing.Links{{Name: "lo", Index: 1}, {Name: "eth0", Index: 2, MTU: 1500, MAC: make(net.HardwareAddr, 6), Up: true, Addrs: []netip.Prefix{netip.PrefixFrom(self, 24)}},
		{Name: egress.OverlayLink, Index: 9, MTU: 1450, Addrs: []netip.Prefix{netip.PrefixFrom(self, 32)}}}
	want := fastpath.State{Self: self, Overlay: 9, Uplink: 2, MTU: 1450, Nodes: tables.Nodes, Ports: []fastpath.Port{{Block: port(ip(1)).Block, Node: other}}}
	same := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
	if diff := cmp.Diff(want, fastState(tables, links), same); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := fastState(tables, links[:1]); got.Overlay != 0 || got.Ports != nil {
		t.Errorf("without an uplink: %+v", got)
	}
	tunnel := slices.Clone(links)
	tunnel[1].MAC = nil
	if got := fastState(tables, tunnel); got.Overlay != 0 || got.Uplink != 0 {
		t.Errorf("by a link without Ethernet: %+v", got)
	}
	if got := fastState(tables, links[:2]); got.Overlay != 0 {
		t.Errorf("without the overlay link: %+v", got)
	}
}

// The permits of the fast path are some of the tables', and end no later, whatever becomes of them.
func TestTheFastPathsPermitsEndWithTheTables(t *testing.T) {
	need.TCX(t)
	client, tables := world(t)
	p := permitsOf(t, tables, ownership.Config{Permit: time.Second})
	fast, err := fastpath.New()
	if err != nil {
		t.Fatal(err)
	}
	defer fast.Close()
	p.fast = fast
	lease, err := client.Grant(t.Context(), 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	one, two, six := netip.MustParseAddr("10.10.0.11"), netip.MustParseAddr("10.10.0.12"), netip.MustParseAddr("fd10::11")
	check := func(when string, want ...netip.Addr) {
		t.Helper()
		before := time.Now()
		mine, err := fast.Permits()
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := tables.Permits()
		if err != nil {
			t.Fatal(err)
		}
		after := time.Now()
		var alive []netip.Addr
		for ip, left := range mine {
			if left > 0 {
				alive = append(alive, ip)
			}
			if end, most := before.Add(left), after.Add(theirs[ip]); end.After(most) {
				t.Errorf("%s: %s: the fast path's permit ends %v after the tables'", when, ip, end.Sub(most))
			}
		}
		slices.SortFunc(alive, netip.Addr.Compare)
		if !slices.Equal(alive, want) {
			t.Errorf("%s: permits of %v, want %v", when, alive, want)
		}
	}
	list := func(ips ...netip.Addr) (l []nft.Permit) {
		for _, ip := range ips {
			l = append(l, nft.Permit{IP: ip, Answer: true})
		}
		return l
	}
	if err := p.under(lease, list(one, two, six)); err != nil {
		t.Fatal(err)
	}
	check("granted", one, two)
	for range 3 {
		if err := p.renew(); err != nil {
			t.Fatal(err)
		}
		check("renewed", one, two)
	}
	if err := p.withdraw(list(two)); err != nil {
		t.Fatal(err)
	}
	check("one is withdrawn", two)
	if err := p.renew(); err != nil {
		t.Fatal(err)
	}
	check("the other is renewed", two)
	if err := tables.Permit(nil, 0); err != nil { // as where somebody flushed them
		t.Fatal(err)
	}
	if err := p.withdraw(nil); err != nil {
		t.Fatal(err)
	}
	check("all are withdrawn")
}

// Between the two halves of a pass the tables change, and the agent may stand still, or end, for as long as it likes:
// the programs have nothing then that they are not to have after it, nor what they are to get.
func TestTheFastPathLosesBeforeTheTablesChangeAndGetsAfter(t *testing.T) {
	need.TCX(t)
	netns.Enter(t)
	netns.RunAll(t, "", `ip link add eth0 type veth peer name lan
		ip addr add 10.1.0.1/24 dev eth0
		ip link set lan up
		ip link set eth0 up
		ip link add `+egress.OverlayLink+` type veth peer name overlay
		ip addr add 10.1.0.1/32 dev `+egress.OverlayLink+`
		ip link set `+egress.OverlayLink+` up`)
	fast, err := fastpath.New()
	if err != nil {
		t.Fatal(err)
	}
	defer fast.Close()
	k := &kernel{handles: handles{fast: fast}, log: slog.New(slog.DiscardHandler)}
	// lacks is what there is left to do.
	lacks := func(tables nft.State) string {
		t.Helper()
		c, err := k.diffFast(tables)
		if err != nil {
			t.Fatal(err)
		}
		return c.String()
	}
	self, one, two, three := netip.MustParseAddr("10.1.0.1"), netip.MustParseAddr("10.1.0.2"), netip.MustParseAddr("10.1.0.3"), netip.MustParseAddr("10.1.0.4")
	ip := netip.MustParseAddr("10.0.0.9")
	tables := func(nodes []netip.Addr, ports map[uint16]netip.Addr) nft.State {
		s := nft.State{Self: self, Nodes: nodes, Hosted: map[egress.ID]nft.Hosted{1: {IP: ip, Mark: egress.LocalMark}}}
		for first, node := range ports {
			s.Ports = append(s.Ports, nft.Port{Block: egress.Block{IP: ip, First: first, Size: 64}, Index: 2, Node: node})
		}
		return s
	}
	before := tables([]netip.Addr{one, two}, map[uint16]netip.Addr{2048: one, 3072: two, 4096: two})
	adds, err := k.narrowFast(before)
	if err != nil {
		t.Fatal(err)
	}
	if got := lacks(before); !strings.Contains(got, "attach from_uplink") || !strings.Contains(got, "10.0.0.9:2048") {
		t.Errorf("the programs have something before the tables do; left to do:\n%s", got)
	}
	if err := k.applyFast(adds); err != nil {
		t.Fatal(err)
	}
	if got := lacks(before); got != "" {
		t.Errorf("left to do:\n%s", got)
	}
	// A node goes, another comes, and a block is another's.
	after := tables([]netip.Addr{one, three}, map[uint16]netip.Addr{2048: one, 3072: three, 5120: three})
	if adds, err = k.narrowFast(after); err != nil {
		t.Fatal(err)
	}
	want := "fast path units add 10.0.0.9:3072\nfast path units add 10.0.0.9:5120\nfast path peers add " + egress.OverlayMAC(three).String() + "\n"
	if got := lacks(after); got != want {
		t.Errorf("before the tables change, left to do:\n%swant\n%s", got, want)
	}
	if err := k.applyFast(adds); err != nil {
		t.Fatal(err)
	}
	if got := lacks(after); got != "" {
		t.Errorf("left to do:\n%s", got)
	}
	// The tables could not be changed: the next pass begins with what there is.
	if _, err = k.narrowFast(before); err != nil {
		t.Fatal(err)
	}
	if adds, err = k.narrowFast(after); err != nil {
		t.Fatal(err)
	}
	if err := k.applyFast(adds); err != nil {
		t.Fatal(err)
	}
	if got := lacks(after); got != "" {
		t.Errorf("after a pass that ended halfway, left to do:\n%s", got)
	}
	// There is no uplink any more.
	netns.Run(t, "ip link del eth0")
	k.read.invalidate()
	if _, err = k.narrowFast(after); err != nil {
		t.Fatal(err)
	}
	if got := lacks(after); got != "" {
		t.Errorf("without an uplink, left to do:\n%s", got)
	}
}
