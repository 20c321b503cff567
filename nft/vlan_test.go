package nft

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// vlanSite is a node with a pod, which an egress selects, a host outside, and a host on a VLAN that the node has for
// that egress.
type vlanSite struct {
	f           sides
	tables      *Tables
	ext, p      space
	host        space
	egress, own netip.Addr // on the VLAN: of the node, and of the host
}

func newVLANSite(t *testing.T, f sides) vlanSite {
	t.Helper()
	i := f.egressIP().BitLen() / 128
	s := vlanSite{f: f, tables: open(t), ext: outside(t), p: pod(t), host: newSpace(t, "vlan"),
		egress: netip.MustParseAddr([]string{"10.20.0.8", "fd20::8"}[i]), own: netip.MustParseAddr([]string{"10.20.0.77", "fd20::77"}[i])}
	netns.RunAll(t, "", `ip link add egret.100 type veth peer name eth0 netns `+s.host.name+`
		ip link set egret.100 up
		ip addr add 10.20.0.8/24 dev egret.100
		ip addr add fd20::8/64 dev egret.100 nodad preferred_lft 0
		sysctl -qw net.ipv4.conf.egret/100.rp_filter=2`)
	s.host.run(`ip link set eth0 up
		ip addr add 10.20.0.77/24 dev eth0
		ip addr add fd20::77/64 dev eth0 nodad
		ip route add default via 10.20.0.8
		ip -6 route add default via fd20::8`)
	reach(t, s.tables, parseState(t, fmt.Sprintf("except %s\naddressguard %s\npooled %[2]s\npod %s 5\nnexthop 5 0x3fff\nhosted 5 %[2]s 0x3fff\nvlan 5 egret.100\n", f.pods, s.egress, f.pod)))
	if err := s.tables.Permit([]Permit{{s.egress, true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	return s
}

// spoof sends a datagram in the name of another from a host of the VLAN.
func (s vlanSite) spoof(from, to netip.AddrPort) func() {
	return func() {
		s.host.do(func() error { return sendRaw(datagram(from, to, []byte("forged")), to.Addr()) })
	}
}

// The link of a VLAN is made for egress IPs. A host of the VLAN gets no way by it to pods, to the node, or through the
// node, in its own name or in a pod's; the egress IP itself answers an echo request, and pods reach the host.
func TestAHostOfAVLANReachesNothingButTheEgressIP(t *testing.T) {
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			s := newVLANSite(t, f)
			tables, ext, p, host, egress, own := s.tables, s.ext, s.p, s.host, s.egress.String(), s.own.String()
			p.serve(f.pod)
			c, err := net.ListenPacket("udp", net.JoinHostPort(f.node, "7000"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			go answerAll(c)
			host.serve(own)
			nft(t, fmt.Sprintf(`table inet lb { chain pre { type nat hook prerouting priority -100;
				%s daddr %s udp dport 7009 dnat to %s; }; }`, []string{"ip", "ip6"}[i], f.node, netip.AddrPortFrom(netip.MustParseAddr(f.pod), 7000)))
			if got := p.seen(own); got != egress {
				t.Errorf("the host sees the pod as %q, want %s", got, egress)
			}
			if !host.ok("ping -c1 -W2 " + egress) {
				t.Error("the egress IP answers no echo request")
			}
			for what, to := range map[string][2]string{
				"a pod": {f.pod, "7000"}, "the node": {f.node, "7000"}, "a NodePort": {f.node, "7009"},
			} {
				if got := answer(t, ext.in(), f.node, to[1]); what != "a pod" && got == "" {
					t.Fatalf("%s answers nobody", what)
				}
				counts(t, tables, CounterSubnet, func() {
					if got := answer(t, host.in(), to[0], to[1]); got != "" {
						t.Errorf("%s answers a host of the VLAN", what)
					}
				})
			}
			counts(t, tables, CounterSubnet, func() {
				if host.ok("ping -c1 -W0.5 " + f.node) {
					t.Error("the node answers an echo request of a host of the VLAN")
				}
			})
			for who, source := range map[string]string{"a host of the VLAN": own, "a host of the VLAN, as a pod": f.pod} {
				counts(t, tables, CounterSubnet, func() {
					sneaks(t, who, ext, f, func() {
						host.do(func() error {
							return raw(netip.MustParseAddr(source), netip.MustParseAddr(f.server), 7002, []byte("forged"))
						})
					})
				})
			}
		})
	}
}

// hears fails the test if the socket gets a datagram while try tries, and a little longer.
func hears(t *testing.T, what string, c net.PacketConn, try func()) {
	t.Helper()
	try()
	if err := c.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, from, err := c.ReadFrom(b); err == nil {
		t.Errorf("%s: %q comes, as from %s", what, b[:n], from)
	}
}

// A host of the VLAN writes the addresses of an open connection of the node, or of a pod, into its packets. Or what it
// sends is excepted from conntrack by another program, as Calico does with its VXLAN and the DNS cache of a node with
// questions.
func TestAHostOfAVLANGetsIntoNoConnectionOfOthers(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			s := newVLANSite(t, f)
			lan, node, podIP := netip.MustParseAddr(f.lan), netip.MustParseAddr(f.node), netip.MustParseAddr(f.pod)
			listen := func(in func(func() error) error, at netip.AddrPort) (c net.PacketConn) {
				t.Helper()
				if err := in(func() (err error) { c, err = net.ListenPacket("udp", at.String()); return err }); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				return c
			}
			exchange := func(what string, a net.PacketConn, to netip.AddrPort, b net.PacketConn) {
				t.Helper()
				if _, err := a.WriteTo([]byte("?"), net.UDPAddrFromAddrPort(to)); err != nil {
					t.Fatal(err)
				}
				if err := b.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
					t.Fatal(err)
				}
				_, from, err := b.ReadFrom(make([]byte, 100))
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if _, err := b.WriteTo([]byte("!"), from); err != nil {
					t.Fatal(err)
				}
				if err := a.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
					t.Fatal(err)
				}
				if _, _, err := a.ReadFrom(make([]byte, 100)); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			ours, theirs := netip.AddrPortFrom(node, 7000), netip.AddrPortFrom(lan, 7001)
			a, b := listen(local, ours), listen(s.ext.in(), theirs)
			exchange("the node and its neighbour", b, ours, a)
			counts(t, s.tables, CounterSubnet, func() {
				hears(t, "what a neighbour of the node sends", a, s.spoof(theirs, ours))
			})
			atPod, toPod := netip.AddrPortFrom(podIP, 7002), netip.AddrPortFrom(lan, 7003)
			s.ext.run("ip route add " + f.pods + " via " + f.node)
			c, d := listen(s.p.in(), atPod), listen(s.ext.in(), toPod)
			exchange("a neighbour and a pod", d, atPod, c)
			counts(t, s.tables, CounterSubnet, func() {
				hears(t, "what a neighbour sends to a pod", c, s.spoof(toPod, atPod))
			})
			nft(t, "table inet raw { chain pre { type filter hook prerouting priority -300; udp dport 4789 notrack; }; }")
			e := listen(local, netip.AddrPortFrom(node, 4789))
			counts(t, s.tables, CounterSubnet, func() {
				hears(t, "what another program excepts from conntrack", e, s.spoof(netip.AddrPortFrom(lan, 4789), netip.AddrPortFrom(node, 4789)))
			})
			s.host.serve(s.own.String())
			if got := s.p.seen(s.own.String()); got != s.egress.String() {
				t.Errorf("the host of the VLAN sees the pod as %q, want %s", got, s.egress)
			}
		})
	}
}

// A host of the VLAN is the server of an egress connection in its packets. The egress IP is of a pool that is not on
// the VLAN.
func TestAHostOfAVLANGetsIntoNoEgressConnectionOfOtherPools(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			s := newVLANSite(t, f)
			f.addEgressIP(t)
			reach(t, s.tables, parseState(t, fmt.Sprintf("except %s\naddressguard %s\naddressguard %s\npooled %[2]s\npooled %[3]s\npod %[4]s 6\nnexthop 6 0x3fff\n"+
				"hosted 5 %[2]s 0x3fff\nvlan 5 egret.100\nhosted 6 %[3]s 0x3fff\n", f.pods, s.egress, f.egress, f.pod)))
			if err := s.tables.Permit([]Permit{{s.egress, true}, {f.egressIP(), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			c, server, seen := udpFlow(t, s.p, s.ext, netip.AddrPortFrom(netip.MustParseAddr(f.server), 7004))
			if seen.Addr() != f.egressIP() {
				t.Fatalf("the server sees %s, want %s", seen, f.egress)
			}
			counts(t, s.tables, CounterSubnet, func() { hears(t, "what is sent to a pod", c, s.spoof(server, seen)) })
		})
	}
}

func TestByABlockAHostOfAVLANGetsIntoNoEgressConnectionOfOtherPools(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			s := vlanSite{host: newSpace(t, "vlan")}
			b.nodes[3].run("ip link add egret.100 type veth peer name eth0 netns " + s.host.name + `
				ip link set egret.100 up
				ip addr add 10.20.0.8/24 dev egret.100
				ip addr add fd20::8/64 dev egret.100 nodad
				sysctl -qw net.ipv4.conf.egret/100.rp_filter=2`)
			s.host.run(`ip link set eth0 up
				ip addr add 10.20.0.77/24 dev eth0
				ip addr add fd20::77/64 dev eth0 nodad
				ip route add default via 10.20.0.8
				ip -6 route add default via fd20::8`)
			c, server, seen := udpFlow(t, b.pods["a"], b.ext, netip.AddrPortFrom(netip.MustParseAddr(f.server), 7004))
			b.inBlock("the flow", seen, 1)
			counts(t, b.nodes[3].tables, CounterSubnet, func() { hears(t, "what is sent to a pod", c, s.spoof(server, seen)) })
		})
	}
}

// udpFlow opens a connection of a pod to a server, and returns the pod's end, the server's address and the source that
// it saw. Both have said something.
func udpFlow(t *testing.T, p, ext space, server netip.AddrPort) (c net.PacketConn, at, seen netip.AddrPort) {
	t.Helper()
	var l net.PacketConn
	ext.do(func() (err error) { l, err = net.ListenPacket("udp", server.String()); return err })
	t.Cleanup(func() { l.Close() })
	var pod net.Conn
	p.do(func() (err error) { pod, err = net.Dial("udp", server.String()); return err })
	t.Cleanup(func() { pod.Close() })
	b := make([]byte, 100)
	for range 5 { // a link that is new loses the first packets
		_, _ = pod.Write([]byte("?"))
		_ = l.SetReadDeadline(time.Now().Add(time.Second))
		_, from, err := l.ReadFrom(b)
		if err != nil {
			continue
		}
		_, _ = l.WriteTo([]byte("!"), from)
		_ = pod.SetReadDeadline(time.Now().Add(time.Second))
		if _, err := pod.Read(b); err == nil {
			return pod.(net.PacketConn), server, netip.MustParseAddrPort(from.String())
		}
	}
	t.Fatal("the pod and the server do not hear each other")
	return nil, server, seen
}

// A node that has handed an egress IP over sends with it for a while, and no longer has it as an address.
func TestARelayHearsTheAnswersOfItsVLAN(t *testing.T) {
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			s := newVLANSite(t, f)
			s.host.serve(s.own.String())
			link, err := net.InterfaceByName("egret.100")
			if err != nil {
				t.Fatal(err)
			}
			s.host.run(fmt.Sprintf("ip neigh replace %s lladdr %s dev eth0", s.egress, link.HardwareAddr))
			bits := []int{24, 64}[i]
			netns.Run(t, fmt.Sprintf("ip addr del %s/%d dev egret.100", s.egress, bits))
			netns.Run(t, fmt.Sprintf("ip route replace %s dev egret.100", netip.PrefixFrom(s.egress, bits).Masked()))
			reach(t, s.tables, parseState(t, fmt.Sprintf("except %s\npooled %s\npod %s 5\nnexthop 5 0x3fff\nhosted 5 %[2]s 0x3fff\nvlan 5 egret.100\n", f.pods, s.egress, f.pod)))
			netns.Run(t, "ip neigh flush dev egret.100")
			if got := s.p.seen(s.own.String()); got != s.egress.String() {
				t.Errorf("the host sees the pod as %q, want %s", got, s.egress)
			}
		})
	}
}

// What hosts of a link say of who is there is for that link alone: a host of the VLAN sends none of it through the
// node, in its own name nor in that of an egress IP.
func TestAHostOfAVLANSendsNoNeighborDiscoveryThroughTheNode(t *testing.T) {
	f := bothSides[1]
	s := newVLANSite(t, f)
	reach(t, s.tables, parseState(t, fmt.Sprintf("except %s\naddressguard %s\npooled %[2]s\npooled %s\nhosted 5 %[2]s 0x3fff\nvlan 5 egret.100\n", f.pods, s.egress, f.egress)))
	on, _, header := f.listenIP(t, s.ext)
	server := netip.MustParseAddr(f.server)
	for _, kind := range []byte{130, 135, 136} {
		for _, source := range []netip.Addr{s.own, f.egressIP()} {
			icmp := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, server.AsSlice()...)
			binary.BigEndian.PutUint16(icmp[2:], checksum(source.AsSlice(), server.AsSlice(), []byte{0, 0, 0, byte(len(icmp)), 0, 0, 0, unix.IPPROTO_ICMPV6}, icmp))
			counts(t, s.tables, CounterSubnet, func() {
				s.host.do(func() error { return sendRaw(packetOf(source, server, unix.IPPROTO_ICMPV6, icmp), server) })
				_ = on.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				for b := make([]byte, 2000); ; {
					n, _, err := on.ReadFrom(b)
					if err != nil {
						break
					}
					if n > header && bytes.Equal(b[header:n], icmp) {
						t.Errorf("ICMPv6 of type %d from %s leaves the node", kind, source)
					}
				}
			})
		}
	}
}

// A host of the VLAN says that it is a router. The link's own setting may have been made before, or by others.
func TestAHostOfAVLANTellsTheNodeNoRoute(t *testing.T) {
	s := newVLANSite(t, bothSides[1])
	netns.Run(t, "sysctl -qw net.ipv6.conf.egret/100.accept_ra=2")
	router, all := netip.MustParseAddr("fe80::77"), netip.MustParseAddr("ff02::1")
	s.host.run("ip addr add fe80::77/64 dev eth0 nodad")
	ra := []byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0} // RFC 4861, section 4.2: a router for half an hour
	binary.BigEndian.PutUint16(ra[2:], checksum(router.AsSlice(), all.AsSlice(), []byte{0, 0, 0, byte(len(ra)), 0, 0, 0, unix.IPPROTO_ICMPV6}, ra))
	advert := packetOf(router, all, unix.IPPROTO_ICMPV6, ra)
	advert[7] = 255
	counts(t, s.tables, CounterSubnet, func() {
		s.host.do(func() error {
			ifi, err := net.InterfaceByName("eth0")
			if err != nil {
				return err
			}
			return sendRaw(advert, all.WithZone(fmt.Sprint(ifi.Index)))
		})
		routes, err := exec.Command("ip", "-6", "route", "show", "dev", "egret.100", "proto", "ra").CombinedOutput()
		if err != nil || len(routes) > 0 {
			t.Errorf("the node has routes by the VLAN: %s, %v", routes, err)
		}
	})
}
