package nft

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// remoteGateway makes a second node beside the test's own, here, which it has a link to and is the gateway of, by the
// mark 0x2002; and one to the outside, which knows the egress IPs by a route.
func remoteGateway(t testing.TB, ext space, here, there netip.Addr) space {
	t.Helper()
	gw := newSpace(t, "gw")
	onLAN := func(ip netip.Addr) string {
		if ip.Is4() {
			return netip.PrefixFrom(ip, 24).String()
		}
		return netip.PrefixFrom(ip, 64).String() + " nodad"
	}
	netns.Run(t, "ip link add eth1 type veth peer name eth0 netns "+gw.name)
	netns.Run(t, "ip link set eth1 up")
	netns.Run(t, "ip addr add dev eth1 "+onLAN(here))
	gw.run(`ip link set eth0 up
		ip addr add dev eth0 ` + onLAN(there) + `
		sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
		ip link add eth1 type veth peer name eth1 netns ` + ext.name + `
		ip link set eth1 up
		ip addr add 10.12.0.102/24 dev eth1
		ip addr add fd12::102/64 dev eth1 nodad
		ip route add default via 10.12.0.200
		ip -6 route add default via fd12::200`)
	ext.run(`ip link set eth1 up
		ip addr add 10.12.0.200/24 dev eth1
		ip addr add fd12::200/64 dev eth1 nodad
		ip route add 10.10.0.8/32 via 10.12.0.102
		ip route add fd10::8/128 via fd12::102`)

	overlayTo(func(l string) { netns.Run(t, l) }, here, there)
	overlayTo(gw.run, there, here)
	mac := egress.OverlayMAC(here)
	if here.Is4() {
		gw.run("ip route add 10.244.1.2/32 via " + here.String() + " dev egret.vx onlink table 7000")
	} else {
		gw.run("ip route add 10.244.1.2/32 via inet6 " + egress.OverlayLinkLocal(here).String() + " dev egret.vx table 7000")
	}
	gw.run("ip -6 route add fd44:1::2/128 dev egret.vx table 7000")
	gw.run("ip neigh add fd44:1::2 lladdr " + mac.String() + " dev egret.vx nud permanent")
	return gw
}

// overlayTo makes the overlay of a node, with one peer.
func overlayTo(run func(string), self, peer netip.Addr) {
	mac, local := egress.OverlayMAC(peer), egress.OverlayLinkLocal(peer)
	mtu := 1450
	if self.Is6() {
		mtu = 1430
	}
	lines := fmt.Sprintf(`ip link add egret.vx address %s mtu %[8]d type vxlan id %[2]d dstport %[3]d local %[4]s nolearning gbp
		sysctl -qw net/ipv4/conf/egret.vx/rp_filter=0 net/ipv4/conf/all/rp_filter=0
		ip link set egret.vx up
		ip neigh add %[5]s lladdr %[6]s dev egret.vx nud permanent
		bridge fdb append %[6]s dev egret.vx dst %[7]s
		ip -4 rule add pref 1000 fwmark 0/0x2000 goto 32766
		ip -4 rule add pref 1100 fwmark 0x2000/0x3fff lookup 7000
		ip -4 rule add pref 1200 fwmark 0x2002/0x3fff lookup 7002
		ip -6 rule add pref 1000 fwmark 0/0x2000 goto 32766
		ip -6 rule add pref 1100 fwmark 0x2000/0x3fff lookup 7000
		ip -6 rule add pref 1200 fwmark 0x2002/0x3fff lookup 7002
		ip -6 route add default via %[5]s dev egret.vx table 7002
		`, egress.OverlayMAC(self), egress.OverlayVNI, egress.OverlayPort, self, local, mac, peer, mtu)
	if self.Is4() {
		lines += fmt.Sprintf(`ip addr add %s/32 dev egret.vx scope link noprefixroute
			ip neigh add %s lladdr %s dev egret.vx nud permanent
			ip -4 route add default via %[2]s dev egret.vx onlink table 7002`, self, peer, mac)
	} else {
		lines += fmt.Sprintf(`ip addr add 192.0.0.8/32 dev egret.vx scope link noprefixroute
			ip -4 route add default via inet6 %s dev egret.vx table 7002`, local)
	}
	for line := range strings.Lines(lines) {
		run(strings.TrimSpace(line))
	}
}
