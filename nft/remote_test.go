package nft

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/routing"
)

// remoteGateway makes a second node beside the test's own, here, which it has a link to and is the gateway of; and one
// to the outside, which knows the egress IPs by a route.
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

	overlayTo(t, local, here, there)
	overlayTo(t, gw.in(), there, here)
	return gw
}

// overlayTo makes the overlay of a node, with one peer.
func overlayTo(t testing.TB, in func(func() error) error, self, peer netip.Addr) {
	t.Helper()
	mtu := 1450
	if self.Is6() {
		mtu = 1430
	}
	err := in(func() error {
		r, err := routing.New(routing.Config{})
		if err != nil {
			return err
		}
		defer r.Close()
		return route(r, routing.State{Overlay: routing.Overlay{Local: self, MTU: mtu}, Peers: []routing.Peer{{Underlay: peer}}})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// atPod are the lines of a State of node 1, which has the pod, where node 2 is the gateway: there. atGateway are those
// of that one; here is node 1.
func (f sides) atPod(id int, there netip.Addr) string {
	return fmt.Sprintf("pod %s %d\nnexthop %[2]d 0x3ffe\ngateway %[2]d 2\noverlaysource %[2]d %s\npeer 2 %s\n", f.pod, id, f.overlaySource(id), there)
}

func (f sides) atGateway(id int, here netip.Addr) string {
	return fmt.Sprintf("hosted %d %s 0x3fff\nsender %s %s %[1]d\npeer 1 %[3]s\n", id, f.egress, here, f.overlaySource(id))
}

// overlaySource is that of node 1.
func (f sides) overlaySource(id int) netip.Addr {
	return egress.OverlaySource(1, egress.ID(id), f.egressIP())
}
