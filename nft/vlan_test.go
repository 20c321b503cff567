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
	reach(t, s.tables, parseState(t, fmt.Sprintf("except %s\naddressguard %s\npod %s 5\nnexthop 5 0x3fff\nhosted 5 %[2]s 0x3fff\n", f.pods, s.egress, f.pod)))
	if err := s.tables.Permit([]Permit{{s.egress, true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	return s
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
			spoof := func(from, to netip.AddrPort) func() {
				return func() {
					s.host.do(func() error { return sendRaw(datagram(from, to, []byte("forged")), to.Addr()) })
				}
			}
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
				hears(t, "what a neighbour of the node sends", a, spoof(theirs, ours))
			})
			atPod, toPod := netip.AddrPortFrom(podIP, 7002), netip.AddrPortFrom(lan, 7003)
			s.ext.run("ip route add " + f.pods + " via " + f.node)
			c, d := listen(s.p.in(), atPod), listen(s.ext.in(), toPod)
			exchange("a neighbour and a pod", d, atPod, c)
			counts(t, s.tables, CounterSubnet, func() {
				hears(t, "what a neighbour sends to a pod", c, spoof(toPod, atPod))
			})
			nft(t, "table inet raw { chain pre { type filter hook prerouting priority -300; udp dport 4789 notrack; }; }")
			e := listen(local, netip.AddrPortFrom(node, 4789))
			counts(t, s.tables, CounterSubnet, func() {
				hears(t, "what another program excepts from conntrack", e, spoof(netip.AddrPortFrom(lan, 4789), netip.AddrPortFrom(node, 4789)))
			})
			s.host.serve(s.own.String())
			if got := s.p.seen(s.own.String()); got != s.egress.String() {
				t.Errorf("the host of the VLAN sees the pod as %q, want %s", got, s.egress)
			}
		})
	}
}

// What hosts of a link say of who is there is for that link alone: a host of the VLAN sends none of it through the node,
// in its own name nor in that of an egress IP.
func TestAHostOfAVLANSendsNoNeighborDiscoveryThroughTheNode(t *testing.T) {
	f := bothSides[1]
	s := newVLANSite(t, f)
	reach(t, s.tables, parseState(t, fmt.Sprintf("except %s\naddressguard %s\npooled %[2]s\npooled %s\nhosted 5 %[2]s 0x3fff\n", f.pods, s.egress, f.egress)))
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
