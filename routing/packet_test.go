package routing

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// marks does what package nft does about marks: toward the overlay they become an id, and replies get the return mark.
const marks = `table inet test {
 chain post { type filter hook postrouting priority 0; oifname "egret.vx" meta mark set 5; }
 chain out { type route hook output priority 0; ip saddr 203.0.113.10 meta mark set 0x2000; ip6 saddr 2001:db8::10 meta mark set 0x2000; }
}`

// TestPacketsGoThereAndBack pings, over the overlay between two namespaces, an address on the gateway from an address of a pod, with
// strict rp_filter everywhere but where we say otherwise.
func TestPacketsGoThereAndBack(t *testing.T) {
	for _, under := range [][2]string{{"10.10.0.101", "10.10.0.102"}, {"fd10::101", "fd10::102"}} {
		t.Run("underlay "+under[0], func(t *testing.T) {
			a, b := netip.MustParseAddr(under[0]), netip.MustParseAddr(under[1])
			mtu := 1450
			if a.Is6() {
				mtu = 1430
			}
			node := open(t)
			first := netns.Current(t)
			netns.Run(t, "ip link add eth0 type veth peer name peer")
			gateway := open(t)
			second := netns.Current(t)

			netns.Switch(t, first)
			move(t, "peer", second)
			prepare(t, "eth0", a, []string{"10.244.1.2/32", "fd44:1::2/128"})
			reach(t, node, State{Overlay: Overlay{Local: a, MTU: mtu}, Peers: []Peer{{"b", b}}, NextHops: []NextHop{{egress.NodeMark(2), b}}})
			netns.Switch(t, second)
			prepare(t, "peer", b, []string{"203.0.113.10/32", "2001:db8::10/128"})
			reach(t, gateway, State{Overlay: Overlay{Local: b, MTU: mtu}, Peers: []Peer{{"a", a}}, Returns: map[netip.Addr]netip.Addr{
				netip.MustParseAddr("10.244.1.2"): a, netip.MustParseAddr("fd44:1::2"): a,
			}})
			netns.Switch(t, first)
			for _, ping := range [][2]string{{"10.244.1.2", "203.0.113.10"}, {"fd44:1::2", "2001:db8::10"}} {
				// As large as fits, not to be fragmented.
				size := mtu - 28
				if netip.MustParseAddr(ping[0]).Is6() {
					size = mtu - 48
				}
				netns.Run(t, fmt.Sprintf("ping -q -c 2 -w 10 -i 0.1 -M do -s %d -m %d -I %s %s", size, egress.NodeMark(2), ping[0], ping[1]))
			}
		})
	}
}

func move(t *testing.T, link string, ns int) {
	t.Helper()
	l, err := netlink.LinkByName(link)
	if err == nil {
		err = netlink.LinkSetNsFd(l, ns)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// prepare makes a node of the namespace: an uplink with a default route, and addresses that stand for a pod or for the outside.
func prepare(t *testing.T, uplink string, ip netip.Addr, addrs []string) {
	t.Helper()
	netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.default.rp_filter=1")
	netns.Run(t, "ip link set "+uplink+" up")
	bits := 24
	if ip.Is6() {
		bits = 64
	}
	for _, f := range families {
		netns.Run(t, "ip "+f.option+" route add default dev "+uplink)
	}
	netns.Run(t, fmt.Sprintf("ip addr add %s/%d dev %s nodad", ip, bits, uplink))
	for _, a := range addrs {
		netns.Run(t, "ip addr add "+a+" dev lo nodad")
	}
	file := t.TempDir() + "/marks.nft"
	if err := os.WriteFile(file, []byte(marks), 0o600); err != nil {
		t.Fatal(err)
	}
	netns.Run(t, "nft -f "+file)
}
