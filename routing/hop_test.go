package routing

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

func TestTheNextHopIsWhatTheKernelWouldTake(t *testing.T) {
	r := open(t)
	for _, line := range []string{
		"ip link add eth0 type veth peer name peer0", "ip link set eth0 up", "ip link set peer0 up",
		"ip addr add 10.10.0.101/24 dev eth0", "ip addr add fd10::101/64 dev eth0 nodad",
		"ip route add 10.20.0.0/24 via 10.10.0.1", "ip route add 10.30.0.0/24 via 10.10.0.1 mtu lock 1300",
		"ip route add 10.40.0.0/24 via inet6 fd10::1 dev eth0",
		"ip route add blackhole 10.50.0.0/24", "ip route add prohibit 10.51.0.0/24", "ip -6 route add unreachable fd50::/64",
		// peer1 is down
		"ip link add eth1 type veth peer name peer1", "ip link set eth1 up", "ip addr add 10.60.0.101/24 dev eth1",
		"ip link add eth2 type bridge", "ip addr add 10.70.0.101/24 dev eth2", "ip route add 10.71.0.0/24 via 10.10.0.1 table 8100", "ip rule add fwmark 0x244c table 8100",
		"ip neigh add 10.10.0.3 lladdr 02:00:00:00:00:03 dev eth0 nud permanent", "ip neigh add 10.10.0.4 dev eth0 nud failed",
		"ip neigh add fd10::3 lladdr 02:00:00:00:00:03 dev eth0 nud stale",
	} {
		netns.Run(t, line)
	}
	awaitUplink(t, netip.MustParseAddr("10.10.0.101"), func(l Link) bool { return l.Up })
	addr := netip.MustParseAddr
	eth0 := func(to, via, neighbour string) egress.Hop {
		return egress.Hop{To: addr(to), Via: addr(via), Link: "eth0", MTU: 1500, Neighbour: neighbour}
	}
	learnt := eth0("10.30.0.9", "10.10.0.1", egress.NoNeighbour)
	learnt.MTU = 1300
	for name, tt := range map[string]struct {
		want egress.Hop
		mark egress.Mark
	}{
		"a neighbour that nobody asked for": {want: eth0("10.10.0.2", "10.10.0.2", egress.NoNeighbour)},
		"one that is set":                   {want: eth0("10.10.0.3", "10.10.0.3", "PERMANENT")},
		"one that is silent":                {want: eth0("10.10.0.4", "10.10.0.4", "FAILED")},
		"one of IPv6":                       {want: eth0("fd10::3", "fd10::3", "STALE")},
		"behind a router":                   {want: eth0("10.20.0.9", "10.10.0.1", egress.NoNeighbour)},
		"behind a router of IPv6":           {want: eth0("10.40.0.9", "fd10::1", egress.NoNeighbour)},
		"of a route with an MTU":            {want: learnt},
		"a blackhole":                       {want: egress.Hop{To: addr("10.50.0.1"), Fault: "invalid argument"}},
		"a prohibition":                     {want: egress.Hop{To: addr("10.51.0.1"), Fault: "permission denied"}},
		"unreachable":                       {want: egress.Hop{To: addr("fd50::1"), Fault: "no route to host"}},
		"nothing":                           {want: egress.Hop{To: addr("10.99.0.1"), Fault: "network is unreachable"}},
		"of a mark":                         {want: eth0("10.71.0.1", "10.10.0.1", egress.NoNeighbour), mark: 0x244c},
		"of another mark":                   {want: egress.Hop{To: addr("10.71.0.1"), Fault: "network is unreachable"}, mark: 0x244d},
		"without a carrier": {want: egress.Hop{To: addr("10.60.0.1"), Via: addr("10.60.0.1"), Link: "eth1", MTU: 1500,
			Down: "without a carrier", Neighbour: egress.NoNeighbour}},
		"an address of this node": {want: egress.Hop{To: addr("10.10.0.101"), Via: addr("10.10.0.101"), Link: "lo", MTU: 65536}},
	} {
		got, err := r.NextHop(tt.want.To, tt.mark)
		if diff := cmp.Diff(tt.want, got.Hop, cmpopts.EquateComparable(netip.Addr{})); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
		if tt.want.Link == "eth0" && tt.want.Via.Is4() && got.Source != addr("10.10.0.101") {
			t.Errorf("%s: source %s", name, got.Source)
		}
	}
	for link, want := range map[string]int{"eth0": 1500, "none": 0} {
		if got, err := r.LinkMTU(link); got != want || err != nil {
			t.Errorf("MTU of %s: %d, %v", link, got, err)
		}
	}
}
