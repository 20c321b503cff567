package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// A pod of another node writes VXLAN of the CNI, which asks nobody who he is, and in it a packet in the name of a pod
// that is selected here: the CNI's masquerade makes the outer one a node's. It does not leave with the egress IP,
// whatever rp_filter says; what comes so in the sender's own name goes on.
func TestNobodySendsInAPodsNameByTheOverlayOfTheCNI(t *testing.T) {
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server)
			f.addEgressIP(t)
			netns.RunAll(t, "", `ip link add flannel.1 type vxlan id 1 dstport 8472 local 10.10.0.101 nolearning
				ip link set flannel.1 address 02:00:00:00:00:99 up
				sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.flannel/1.rp_filter=0`)
			reach(t, tables, parseState(t, f.base()+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n"))
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			if got := p.seen(f.server); got != f.egress {
				t.Fatalf("the pod is seen as %q, want %s", got, f.egress)
			}
			write := func(from, to netip.AddrPort) {
				t.Helper()
				frame := append([]byte{0x08, 0, 0, 0, 0, 0, 1, 0}, 2, 0, 0, 0, 0, 0x99, 2, 0, 0, 0, 0, 0x98)
				frame = binary.BigEndian.AppendUint16(frame, []uint16{0x0800, 0x86dd}[i])
				frame = append(frame, datagram(from, to, []byte("forged"))...)
				ext.do(func() error { return udp(netip.Addr{}, netip.MustParseAddr("10.10.0.101"), 8472, frame) })
			}
			me, there := netip.AddrPortFrom(netip.MustParseAddr(f.pod), 7003), netip.AddrPortFrom(netip.MustParseAddr(f.server), 7002)
			forge := func(what string) {
				t.Helper()
				counts(t, tables, CounterForged, func() {
					sneaks(t, "a pod of another node, "+what, ext, f, func() { write(me, there) })
				})
			}
			forge("in a connection of its own")
			p.do(func() error {
				c, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(me), net.UDPAddrFromAddrPort(there))
				if err == nil {
					defer c.Close()
					_, err = c.Write([]byte("?"))
				}
				return err
			})
			forge("in one that the pod has open")
			other := netip.MustParseAddr([]string{"10.244.2.2", "fd44:2::2"}[i])
			var c net.PacketConn
			p.do(func() (err error) { c, err = net.ListenPacket("udp", net.JoinHostPort(f.pod, "7005")); return err })
			defer c.Close()
			write(netip.AddrPortFrom(other, 7003), netip.AddrPortFrom(netip.MustParseAddr(f.pod), 7005))
			if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, from, err := c.ReadFrom(make([]byte, 100)); err != nil || netip.MustParseAddrPort(from.String()).Addr() != other {
				t.Errorf("what a pod of another node sends to a pod here comes from %v, %v: want %s", from, err, other)
			}
		})
	}
}

// A neighbour of the node sends to it, as to a router, what has a selected pod's address as its source. It does not
// leave with the egress IP, where nothing else checks what comes from neighbours.
func TestANeighbourSendsNothingInAPodsName(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, p := ownGateway(t, f, "")
			netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0")
			ext.serve(f.server)
			frame := datagram(netip.AddrPortFrom(netip.MustParseAddr(f.pod), 7003), netip.AddrPortFrom(netip.MustParseAddr(f.server), 7002), []byte("forged"))
			node, err := net.InterfaceByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			for _, when := range []string{"before the pod has sent", "after"} {
				sneaks(t, "a neighbour, "+when, ext, f, func() {
					ext.do(func() error {
						ifi, err := net.InterfaceByName("eth0")
						if err != nil {
							return err
						}
						c, err := packet.Listen(ifi, packet.Datagram, map[bool]int{true: unix.ETH_P_IP, false: unix.ETH_P_IPV6}[f.egressIP().Is4()], nil)
						if err != nil {
							return err
						}
						defer c.Close()
						_, err = c.WriteTo(frame, &packet.Addr{HardwareAddr: node.HardwareAddr})
						return err
					})
				})
				if got := p.seen(f.server); got != f.egress {
					t.Errorf("the pod is seen as %q, want %s", got, f.egress)
				}
			}
		})
	}
}

// Cilium brings what a pod sends to the stack by the pod's own link, and has its route to all pods by another.
func TestAPodIsServedWhoseWayBackIsAnotherLink(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, p := ownGateway(t, f, "")
			netns.RunAll(t, "", `sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni0.rp_filter=0
				ip link add cilium_host type bridge
				ip link set cilium_host up
				ip route add `+f.pod+` dev cilium_host`)
			var server net.PacketConn
			ext.do(func() (err error) {
				server, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002"))
				return err
			})
			defer server.Close()
			p.do(func() error { return udp(netip.Addr{}, netip.MustParseAddr(f.server), 7002, []byte("?")) })
			if err := server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, from, err := server.ReadFrom(make([]byte, 100))
			if err != nil || netip.MustParseAddrPort(from.String()).Addr() != f.egressIP() {
				t.Errorf("what the pod sends comes from %v (%v), want %s", from, err, f.egress)
			}
		})
	}
}

// A pod sends with the address of another one of its node, where each has a link of its own and the CNI looks at no
// source. Over IPv6 no right is needed for that (IPV6_FREEBIND). It does not leave with the egress IP of the other one.
func TestAPodSendsNothingInTheNameOfAnotherOne(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server)
			f.addEgressIP(t)
			other := newSpace(t, "other")
			netns.RunAll(t, "", `ip link add cni1 type veth peer name eth0 netns `+other.name+`
				ip link set cni1 up
				ip addr add 10.244.3.1/24 dev cni1
				ip addr add fd44:3::1/64 dev cni1 nodad
				sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni1.rp_filter=0`)
			other.run(`ip link set eth0 up
				ip addr add 10.244.3.2/24 dev eth0
				ip addr add fd44:3::2/64 dev eth0 nodad
				ip route add default via 10.244.3.1
				ip -6 route add default via fd44:3::1`)
			reach(t, tables, parseState(t, f.base()+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n"))
			if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			if !other.ok("ping -c1 -w5 " + []string{"10.244.3.1", "fd44:3::1"}[f.egressIP().BitLen()/128]) {
				t.Fatal("the other pod does not reach its node")
			}
			me, server := netip.MustParseAddr(f.pod), netip.MustParseAddr(f.server)
			for _, when := range []string{"before that one has sent", "after"} {
				counts(t, tables, CounterForged, func() {
					sneaks(t, "a pod in the name of another one, "+when, ext, f, func() {
						err := other.in()(func() error {
							if me.Is6() {
								return udp(me, server, 7002, []byte("forged"))
							}
							return raw(me, server, 7002, []byte("forged"))
						})
						if err != nil {
							t.Error(err)
						}
					})
				})
				if got := p.seen(f.server); got != f.egress {
					t.Errorf("the pod is seen as %q, want %s", got, f.egress)
				}
			}
		})
	}
}

// A selected pod writes packets that open a connection to itself in the name of a host outside. What it sends there
// would be an answer, which no egress translates: it would leave with the pod's own address, or the node's.
func TestAPodOpensNoConnectionToItselfInTheNameOfAHostOutside(t *testing.T) {
	for _, f := range bothSides {
		for name, others := range map[string]string{
			"directly":      "",
			"by a NodePort": `table inet lb { chain pre { type nat hook prerouting priority -100; udp dport 7001 fib daddr type local dnat %s to %s; }; }`,
			"by a NodePort with masquerade": `table inet lb { chain pre { type nat hook prerouting priority -100; udp dport 7001 fib daddr type local dnat %s to %s; };
				chain post { type nat hook postrouting priority 100; ct status dnat masquerade; }; }`,
		} {
			if testing.Short() && name != "by a NodePort" { // emulated machines take seconds for each
				continue
			}
			t.Run(f.pod+"/"+name, func(t *testing.T) { testOwnAnswers(t, f, others) })
		}
	}
}

func testOwnAnswers(t *testing.T, f sides, others string) {
	ext, p := ownGateway(t, f, "")
	netns.Run(t, "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.cni0.rp_filter=0")
	server, me := netip.MustParseAddr(f.server), netip.MustParseAddr(f.pod)
	at := netip.AddrPortFrom(me, 7002) // where the pod is opened a connection to
	if others != "" {
		at = netip.AddrPortFrom(netip.MustParseAddr(f.node), 7001)
		nft(t, fmt.Sprintf(others, map[bool]string{true: "ip", false: "ip6"}[me.Is4()], netip.AddrPortFrom(me, 7002)))
	}
	var witness, answerer net.PacketConn
	ext.do(func() (err error) {
		ext.run("ip route add " + f.pods + " via " + f.node)
		witness, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7003"))
		return err
	})
	defer witness.Close()
	p.do(func() (err error) {
		answerer, err = net.ListenPacket("udp", net.JoinHostPort(f.pod, "7002"))
		return err
	})
	defer answerer.Close()
	go answerAll(answerer)

	node, err := net.InterfaceByName("cni0")
	if err != nil {
		t.Fatal(err)
	}
	p.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		c, err := packet.Listen(ifi, packet.Datagram, map[bool]int{true: unix.ETH_P_IP, false: unix.ETH_P_IPV6}[me.Is4()], nil)
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.WriteTo(datagram(netip.AddrPortFrom(server, 7003), at, []byte("open")), &packet.Addr{HardwareAddr: node.HardwareAddr})
		return err
	})
	b := make([]byte, 100)
	witness.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	if _, from, err := witness.ReadFrom(b); err == nil {
		t.Errorf("the host outside sees an answer of %s", from)
	}
	// Who is outside is answered.
	witness.SetReadDeadline(time.Now().Add(5 * time.Second))
	ext.do(func() error { _, err := witness.WriteTo([]byte("open"), net.UDPAddrFromAddrPort(at)); return err })
	if _, from, err := witness.ReadFrom(b); err != nil || netip.MustParseAddrPort(from.String()) != at {
		t.Errorf("the host outside has an answer of %v (%v), want %s", from, err, at)
	}
}
