package agent

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
)

// A node whose uplink has one other node on it that answers, and a VLAN that ends before the gateway of its subnet.
func TestNextHopsOnTheWayAreAsked(t *testing.T) {
	netns.Enter(t)
	peer := fmt.Sprintf("egpath-%d", os.Getpid())
	netns.Run(t, "ip netns add "+peer)
	t.Cleanup(func() { netns.Run(t, "ip netns del "+peer) })
	for _, line := range []string{
		"ip link add eth0 type veth peer name eth0 netns " + peer, "ip link set eth0 up", "ip addr add 10.10.0.101/24 dev eth0",
		"ip -n " + peer + " link set eth0 up", "ip -n " + peer + " addr add 10.10.0.102/24 dev eth0", "ip route add 203.0.113.7 via 10.10.0.102",
		"ip link add egret.vx mtu 1450 type veth peer name vx0", "ip link set egret.vx up", "ip link set vx0 up",
		"ip route add default dev egret.vx table 15190", "ip rule add fwmark 0x3ffe/0x3fff table 15190", "ip link add pod0 mtu 1400 type veth peer name pod1", "ip link set pod1 up", "ip link set pod0 up",
		"ip route add 10.244.0.5/32 dev pod0",
		"ip link add egret.100 type veth peer name switch", "ip link set egret.100 up", "ip link set switch up", "ip addr add 10.20.0.11/24 dev egret.100",
		"ip route add default via 10.20.0.1 dev egret.100 table 11097", "ip route add 10.20.0.0/24 dev egret.100 table 11097", "ip rule add fwmark 0x3001/0x3fff table 11097",
	} {
		netns.Run(t, line)
	}
	cfg := Config{Node: "a", Log: slog.New(slog.DiscardHandler), Timing: Timing{Permit: time.Second, LeaseTTL: time.Minute}, Network: Network{ShareTables: true}}
	k, err := openKernel(cfg, newMachine(ownership.Config{Node: "a", Permit: time.Second}), nil, func() {})
	if err != nil {
		t.Fatal(err)
	}
	defer k.tables.Close()
	addr := netip.MustParseAddr
	pod, node, router, subnet := addr("10.244.0.5"), addr("10.10.0.102"), addr("10.20.0.1"), egress.SubnetMark(1)
	d := plan.Desired{
		NFT: nft.State{Peers: map[int]netip.Addr{2: node, 3: addr("10.10.0.103")},
			NextHops: map[egress.ID]egress.Mark{1: egress.ToGatewayMark, 2: egress.LocalMark},
			Hosted:   map[egress.ID]nft.Hosted{3: {Mark: subnet}, 4: {Mark: egress.LocalMark}}},
		Routing: routing.State{Subnets: []routing.Subnet{{Mark: subnet, Link: "egret.100", Prefix: netip.MustParsePrefix("10.20.0.0/24"), Gateway: router}}},
	}
	for end := time.Now().Add(10 * time.Second); ; { // until the links are up
		p, err := k.pathOf(t.Context(), d, egress.KernelQuestion{IP: node, ID: 9, Peer: 2})
		if err == nil && p.Overlay.Down == "" && !p.Overlay.Silent {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the peer does not answer: %+v, %v", p.Overlay, err)
		}
	}
	hop := func(to netip.Addr, link string, silent bool) *egress.Hop {
		return &egress.Hop{To: to, Via: to, Link: link, MTU: 1500, Silent: silent}
	}
	outside := hop(addr("203.0.113.7"), "eth0", false)
	outside.Via = node
	for name, tt := range map[string]struct {
		id   egress.ID
		peer int
		to   string
		want egress.Path
	}{
		"a gateway that answers":              {1, 2, "", egress.Path{Overlay: hop(node, "eth0", false)}},
		"one that is silent":                  {1, 3, "", egress.Path{Overlay: hop(addr("10.10.0.103"), "eth0", true)}},
		"one that is not known":               {1, 7, "", egress.Path{Overlay: &egress.Hop{Fault: "the node is not known here"}}},
		"to outside, which another node does": {1, 2, "203.0.113.7", egress.Path{Overlay: hop(node, "eth0", false)}},
		"out by its own routes":               {2, 0, "203.0.113.7", egress.Path{Exit: outside}},
		"out, without a default route":        {2, 0, "", egress.Path{}},
		"to where no route leads":             {4, 0, "203.0.113.9", egress.Path{Exit: &egress.Hop{To: addr("203.0.113.9"), Fault: "network is unreachable"}}},
		"by a VLAN":                           {3, 2, "", egress.Path{Overlay: hop(node, "eth0", false), Exit: hop(router, "egret.100", true)}},
		// which is not asked
		"by a VLAN, to a host of it": {3, 2, "10.20.0.9", egress.Path{Overlay: hop(node, "eth0", false), Exit: hop(addr("10.20.0.9"), "egret.100", false)}},
		"nothing of this node":       {5, 0, "203.0.113.7", egress.Path{}},
	} {
		q := egress.KernelQuestion{Pod: pod, IP: addr("10.10.0.11"), ID: tt.id, Peer: tt.peer}
		if tt.to != "" {
			q.To = addr(tt.to)
		}
		tt.want.OverlayMTU, tt.want.PodMTU = 1450, 1400
		got, err := k.pathOf(t.Context(), d, q)
		ignore := cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".Neighbour" }, cmp.Ignore())
		if diff := cmp.Diff(tt.want, got, cmpopts.EquateComparable(netip.Addr{}), ignore); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
	for _, tt := range []struct {
		line, want string
		id         egress.ID
	}{
		{"ip rule add pref 100 fwmark 0x3ffe/0x3fff table 100", "", 1}, // of a table that is empty
		{"ip route add default via 10.10.0.102 table 100", "out by link eth0 in place of egret.vx", 1},
		{"ip route replace unreachable default table 100", "nowhere (no route to host) in place of link egret.vx", 1},
		{"ip link del egret.100", "nowhere (network is unreachable) in place of link egret.100", 3},
	} {
		netns.Run(t, tt.line)
		if p, err := k.pathOf(t.Context(), d, egress.KernelQuestion{Pod: pod, IP: addr("10.10.0.11"), ID: tt.id}); err != nil || p.Diverted != tt.want {
			t.Errorf("after %s: %q, want %q (%v)", tt.line, p.Diverted, tt.want, err)
		}
	}
}
