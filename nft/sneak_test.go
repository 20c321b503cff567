package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
)

// sniff returns what tells the IP packets of a protocol from other than the host itself that came to ext's link since
// it was last asked.
func sniff(t *testing.T, ext space, f sides, protocol byte) func() []string {
	t.Helper()
	kind := unix.ETH_P_IP
	if f.egressIP().Is6() {
		kind = unix.ETH_P_IPV6
	}
	var on *packet.Conn
	ext.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			on, err = packet.Listen(ifi, packet.Datagram, kind, nil)
		}
		return err
	})
	t.Cleanup(func() { on.Close() })
	return func() (seen []string) {
		b := make([]byte, 2000)
		for {
			on.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			n, _, err := on.ReadFrom(b)
			if err != nil {
				return seen
			}
			p := b[:n]
			src, dst, proto, l4 := netip.Addr{}, netip.Addr{}, byte(0), 0
			if f.egressIP().Is6() {
				src, dst, proto, l4 = netip.AddrFrom16([16]byte(p[8:24])), netip.AddrFrom16([16]byte(p[24:40])), p[6], 40
			} else {
				src, dst, proto, l4 = netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20])), p[9], 20
			}
			if proto == protocol && dst == netip.MustParseAddr(f.server) {
				if proto == unix.IPPROTO_ICMPV6 && p[l4] > 127 {
					continue
				}
				seen = append(seen, fmt.Sprintf("%s -> %s, %x", src, dst, p[l4:l4+4]))
			}
		}
	}
}

// ownGateway returns the host outside, and a pod that an egress selects, of which this node is the gateway. more is
// what else there is to the State.
func ownGateway(t *testing.T, f sides, more string) (ext, p space) {
	t.Helper()
	tables := open(t)
	ext, p = outside(t), pod(t)
	f.addEgressIP(t)
	reach(t, tables, parseState(t, f.base()+more+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n"))
	if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	return ext, p
}

// icmp is the protocol number of ICMP.
func (f sides) icmp() byte {
	if f.egressIP().Is6() {
		return unix.IPPROTO_ICMPV6
	}
	return unix.IPPROTO_ICMP
}

// unreachable is an ICMP error about a datagram.
func unreachable(from, to netip.Addr, quote []byte) []byte {
	if from.Is4() {
		icmp := append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, quote...)
		binary.BigEndian.PutUint16(icmp[2:], checksum(icmp))
		return packetOf(from, to, unix.IPPROTO_ICMP, icmp)
	}
	icmp := append([]byte{1, 4, 0, 0, 0, 0, 0, 0}, quote...)
	sum := checksum(from.AsSlice(), to.AsSlice(), []byte{0, 0, byte(len(icmp) >> 8), byte(len(icmp)), 0, 0, 0, unix.IPPROTO_ICMPV6}, icmp)
	binary.BigEndian.PutUint16(icmp[2:], sum)
	return packetOf(from, to, unix.IPPROTO_ICMPV6, icmp)
}

// segment is a TCP segment that begins no connection.
func segment(from, to netip.AddrPort, flags byte) []byte {
	tcp := binary.BigEndian.AppendUint16(nil, from.Port())
	tcp = binary.BigEndian.AppendUint16(tcp, to.Port())
	tcp = append(tcp, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, flags, 1, 0, 0, 0, 0, 0)
	tcp = append(tcp, "data"...)
	sum := checksum(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, 0, 0, unix.IPPROTO_TCP}, []byte{0, byte(len(tcp))}, tcp)
	binary.BigEndian.PutUint16(tcp[16:], sum)
	return packetOf(from.Addr(), to.Addr(), unix.IPPROTO_TCP, tcp)
}

// A selected pod says, by ICMP, something about a connection of somebody else whom no egress selects.
func TestWhatAPodSaysOfConnectionsOfOthersDoesNotLeave(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, p := ownGateway(t, f, "")
			second := []string{"10.244.1.3", "fd44:1::3"}[f.egressIP().BitLen()/128]
			p.run("ip addr add " + second + "/32 dev lo")
			netns.Run(t, fmt.Sprintf("ip route add %s via %s", second, f.pod))
			ext.serve(f.server)
			if got := p.seen(f.server); got != f.egress {
				t.Fatalf("the pod leaves as %q", got)
			}
			icmp := sniff(t, ext, f, f.icmp())
			server, me := netip.MustParseAddr(f.server), netip.MustParseAddr(f.pod)
			for _, o := range []struct {
				who  string
				in   func(func() error) error
				addr string
			}{{"the node", local, f.node}, {"a pod that no egress selects", p.in(), second}} {
				from := netip.MustParseAddr(o.addr)
				o.in(func() error {
					c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: from.AsSlice(), Port: 5000}}).Dial("udp", net.JoinHostPort(f.server, "7000"))
					if err != nil {
						t.Fatal(err)
					}
					defer c.Close()
					c.SetDeadline(time.Now().Add(time.Second))
					c.Write([]byte("?"))
					b := make([]byte, 100)
					n, err := c.Read(b)
					t.Logf("%s is seen as %s (%v)", o.who, b[:n], err)
					return nil
				})
				icmp()
				quote := datagram(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(from, 5000), []byte("secret"))
				if err := p.in()(func() error { return sendRaw(unreachable(me, server, quote), server) }); err != nil {
					t.Fatal(err)
				}
				for _, got := range icmp() {
					t.Errorf("about a connection of %s: %s", o.who, got)
				}
			}
		})
	}
}

// IPVS, with net.ipv4.vs.conntrack=1, or a stateless DNAT, chooses the endpoint of a packet that conntrack cannot
// place.
func TestInvalidPacketsToALateEndpointDoNotLeave(t *testing.T) {
	for _, f := range bothSides {
		for _, how := range []string{"as IPVS sends it", "by a stateless DNAT"} {
			t.Run(f.pod+"/"+how, func(t *testing.T) {
				ext, p := ownGateway(t, f, "")
				tcp := sniff(t, ext, f, unix.IPPROTO_TCP)
				server, me, vip := netip.MustParseAddr(f.server), netip.MustParseAddr(f.pod), netip.MustParseAddr(f.gateway)
				const rst = 4
				if how == "as IPVS sends it" {
					if err := sendRaw(segment(netip.AddrPortFrom(me, 5001), netip.AddrPortFrom(server, 7000), rst), server); err != nil && err != unix.EPERM {
						t.Fatal(err)
					}
				} else {
					nft(t, fmt.Sprintf("table inet lb { chain pre { type filter hook prerouting priority -50; %[1]s daddr %[2]s tcp dport 7000 %[1]s daddr set %[3]s counter; }; }",
						map[bool]string{true: "ip", false: "ip6"}[vip.Is4()], vip, server))
					if err := p.in()(func() error {
						return sendRaw(segment(netip.AddrPortFrom(me, 5001), netip.AddrPortFrom(vip, 7000), rst), vip)
					}); err != nil {
						t.Fatal(err)
					}
				}
				for _, got := range tcp() {
					t.Errorf("a segment that is invalid: %s", got)
				}
			})
		}
	}
}

// What comes for a pod is to fit its link: the node's end of it may carry less than the pod's.
func TestTheMSSOfThePodsLinkIsThatOfTheAnswers(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, p := ownGateway(t, f, "mtu 1450\n")
			netns.Run(t, "ip link set cni0 mtu 1300")
			var l net.Listener
			ext.do(func() (err error) { l, err = net.Listen("tcp", net.JoinHostPort(f.server, "7010")); return err })
			defer l.Close()
			var c net.Conn
			p.do(func() (err error) {
				c, err = net.DialTimeout("tcp", net.JoinHostPort(f.server, "7010"), 2*time.Second)
				return err
			})
			defer c.Close()
			a, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			size, err := segmentSize(a)
			if most := 1300 - 40; err != nil || size > most {
				t.Errorf("the server sends segments of %d bytes (%v), the pod's link takes %d", size, err, most)
			}
		})
	}
}

// Another program writes the whole mark of what comes in, at the gateway.
func TestMarksOfOthersAtTheGatewayStopNoBlock(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			b.nodes[3].run("nft add table inet other")
			b.nodes[3].run("nft add chain inet other c { type filter hook prerouting priority -150; }")
			for _, rule := range []string{"iifname egret.vx meta mark set 0x10000", "iifname != eth0 meta mark set meta mark | 0x10000", "iifname != eth0 meta mark set meta mark & 0xffff"} {
				b.nodes[3].run("nft flush chain inet other c")
				b.nodes[3].run("nft add rule inet other c " + rule)
				for _, pod := range []string{"a", "c"} {
					if got := b.pods[pod].seen(f.server); got != f.egress {
						t.Errorf("%s: %q of pod %s; %v", rule, got, pod, fmt.Sprint(b.nodes[3].tables.Counters()))
					}
				}
			}
		})
	}
}

// Another program sets the bit of an id beside a routing mark, at the gateway. `egret check` names it.
func TestTheBitOfAnIDByOthersAtTheGatewayStopsBlocks(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			gateway, heard, flow := b.nodes[3], b.wire(7004), b.flow("a", 30000, 7004)
			gateway.run("nft add table inet other")
			gateway.run("nft add chain inet other c { type filter hook prerouting priority -150; }")
			for way, rule := range map[string]string{"out": "iifname egret.vx meta mark set meta mark | 0x80000", "back": "iifname eth0 meta mark set meta mark | 0x80000"} {
				if got := b.pods["a"].seen(f.server); got != f.egress {
					t.Errorf("%q of the pod, want %s", got, f.egress)
				}
				gateway.run("nft add rule inet other c " + rule)
				if got := b.pods["a"].seenAtOnce(f.server); got != "" {
					t.Errorf("%s: %q of the pod, want that it goes nowhere", way, got)
				}
				if got := heard(flow, way == "back"); got.IsValid() != (way == "back") || got.IsValid() && got != f.egressIP() {
					t.Errorf("%s: source %v outside", way, got)
				}
				gateway.run("nft flush chain inet other c")
			}
		})
	}
}

// An egress IP that the node has not as an address yet: what comes for it by mistake does not go on.
func TestWhatComesForAnEgressIPThatIsNotThereYetDoesNotGoOn(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			reach(t, tables, parseState(t, f.base()))
			netns.Run(t, fmt.Sprintf("ip route add %s via %s", f.egress, f.lan))
			ext.run(fmt.Sprintf("ip addr add %s dev lo", f.egress))
			for _, others := range []string{"", "kindnet"} {
				if others != "" {
					nft(t, kindnet)
				}
				counts(t, tables, CounterService, func() {
					if p.ok("ping -c1 -W0.5 " + f.egress) {
						t.Errorf("%s: an echo request to an egress IP is forwarded", others)
					}
				})
				if p.seenAtOnce(f.egress) != "" {
					t.Errorf("%s: a datagram to an egress IP is forwarded", others)
				}
			}
		})
	}
}

// A program of the node answers with a reset what conntrack cannot place, in the name of a selected pod.
func TestAResetInThePodsNameDoesNotLeave(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, _ := ownGateway(t, f, "")
			ext.run("ip route add " + f.pod + " via " + f.node)
			nft(t, "table inet fw { chain x { type filter hook forward priority 0; iifname eth0 ct state invalid meta l4proto tcp reject with tcp reset; }; }")
			tcp := sniff(t, ext, f, unix.IPPROTO_TCP)
			server, to := netip.MustParseAddr(f.server), netip.MustParseAddr(f.pod)
			if err := ext.in()(func() error {
				return sendRaw(segment(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(to, 5001), 0x29), to)
			}); err != nil {
				t.Fatal(err)
			}
			for _, got := range tcp() {
				t.Errorf("a reset: %s", got)
			}
		})
	}
}

// As TestWhatAPodSaysOfConnectionsOfOthersDoesNotLeave, about a connection that was opened from outside.
func TestWhatAPodSaysOfConnectionsFromOutsideDoesNotLeave(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, p := ownGateway(t, f, "")
			server, me, node := netip.MustParseAddr(f.server), netip.MustParseAddr(f.pod), netip.MustParseAddr(f.node)
			s, err := net.ListenUDP("udp", &net.UDPAddr{IP: node.AsSlice(), Port: 5000})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			ext.do(func() error {
				c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: server.AsSlice(), Port: 7000}}).Dial("udp", netip.AddrPortFrom(node, 5000).String())
				if err == nil {
					c.Write([]byte("?"))
					c.Close()
				}
				return err
			})
			if _, _, err := s.ReadFrom(make([]byte, 10)); err != nil {
				t.Fatal(err)
			}
			icmp := sniff(t, ext, f, f.icmp())
			quote := datagram(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(node, 5000), []byte("secret"))
			if err := p.in()(func() error { return sendRaw(unreachable(me, server, quote), server) }); err != nil {
				t.Fatal(err)
			}
			for _, got := range icmp() {
				t.Errorf("about a connection from outside: %s", got)
			}
		})
	}
}

// Another program tells conntrack to leave alone what comes out of the overlay, and marks it with the bit 0x2000.
func TestWhatOthersUntrackAndMarkAtTheGatewayDoesNotLeave(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.without(1)
			b.reach()
			heard := b.wire(7003)
			if got := heard(b.flow("a", 30000, 7003), true); got != f.egressIP() {
				t.Fatalf("before: source %v", got)
			}
			b.nodes[3].run("nft add table inet other")
			b.nodes[3].run("nft add chain inet other c { type filter hook prerouting priority -300; }")
			b.nodes[3].run("nft add rule inet other c iifname != eth0 notrack meta mark set 0x2000")
			if got := heard(b.flow("a", 30001, 7003), false); got.IsValid() {
				t.Errorf("source %v", got)
			}
		})
	}
}

// IPVS without conntrack, and a stateless source NAT of others after it.
func TestAStatelessSourceNATOfOthersHidesNoPod(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, _ := ownGateway(t, f, "")
			family := map[bool]string{true: "ip", false: "ip6"}[f.egressIP().Is4()]
			nft(t, fmt.Sprintf(`table inet vs { chain out { type filter hook output priority -300; udp dport 7002 notrack; };
				chain post { type filter hook postrouting priority 100; ct state untracked %[1]s saddr %[2]s %[1]s saddr set %[3]s; }; }`, family, f.pod, f.node))
			sneaks(t, "a Service's", ext, f, func() {
				_ = raw(netip.MustParseAddr(f.pod), netip.MustParseAddr(f.server), 7002, []byte("late"))
			})
		})
	}
}

// The same by a block.
func TestTheMSSOfThePodsLinkIsThatOfTheAnswersByABlock(t *testing.T) {
	for _, f := range blockSides() {
		for name, gateway := range gateways() {
			t.Run(f.pod+"/"+name, func(t *testing.T) {
				b := newBlockSite(t, f)
				b.moveTo(gateway)
				b.nodes[2].run("ip link set podc mtu 1300")
				conns := b.listenTCP(7010)
				b.dial("c", 0, 7010)
				a := <-conns
				defer a.Close()
				if n, err := segmentSize(a); err != nil || n > 1260 {
					t.Errorf("the server sends segments of %d (%v)", n, err)
				}
			})
		}
	}
}

// A selected pod says something about a connection of its node's, by a block and with another node as gateway.
func TestWhatAPodSaysOfConnectionsOfOthersDoesNotLeaveByABlock(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			node := b.underlay(1)
			if f.egressIP().Is6() {
				node = netip.MustParseAddr("fd10::101")
			}
			b.nodes[1].do(func() error {
				c, err := (&net.Dialer{LocalAddr: &net.UDPAddr{IP: node.AsSlice(), Port: 5000}}).Dial("udp", net.JoinHostPort(f.server, "7000"))
				if err == nil {
					c.SetDeadline(time.Now().Add(time.Second))
					c.Write([]byte("?"))
					c.Read(make([]byte, 100))
					c.Close()
				}
				return err
			})
			icmp := sniff(t, b.ext, f, f.icmp())
			server := netip.MustParseAddr(f.server)
			b.pods["a"].do(func() error {
				return sendRaw(unreachable(b.podAddress("a"), server, datagram(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(node, 5000), []byte("secret"))), server)
			})
			for _, got := range icmp() {
				t.Error(got)
			}
		})
	}
}

// Source NAT of others at -199, hooked after ours: the kernel runs the latest of equal priority first.
func TestWhatComesForAnEgressIPDoesNotGoOnByAnotherNAT(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			reach(t, tables, parseState(t, f.base()))
			netns.Run(t, fmt.Sprintf("ip route add %s via %s", f.egress, f.lan))
			ext.run(fmt.Sprintf("ip addr add %s dev lo", f.egress))
			nft(t, `table inet other { chain post { type nat hook postrouting priority -199; oifname eth0 masquerade; }; }`)
			if p.ok("ping -c1 -W0.5 " + f.egress) {
				t.Errorf("an echo request to an egress IP is forwarded")
			}
		})
	}
}

// A selected pod asks an egress IP that is not an address of the node yet.
func TestASelectedPodsQuestionToAnEgressIPDoesNotGoOn(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			other := []string{"10.10.0.9", "fd10::9"}[f.egressIP().BitLen()/128]
			ext, p := ownGateway(t, f, "addressguard "+other+"\n")
			netns.Run(t, fmt.Sprintf("ip route add %s via %s", other, f.lan))
			ext.run(fmt.Sprintf("ip addr add %s dev lo", other))
			if p.ok("ping -c1 -W0.5 " + other) {
				t.Errorf("an echo request to an egress IP is forwarded")
			}
		})
	}
}

// A selected pod tries all protocols that there are, and all types of ICMP: the kernel translates some of them, and
// takes others for nothing of a connection.
func TestNoProtocolOfASelectedPodLeavesWithAnotherSource(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			ext, p := ownGateway(t, f, "")
			on, at, header := f.listenIP(t, ext)
			server, me := netip.MustParseAddr(f.server), netip.MustParseAddr(f.pod)
			sent := make(chan error, 1) // beside: a socket holds fewer packets
			send := func() error {
				for n := range 256 {
					icmp := []byte{byte(n), 0, 0, 0, 0, 9, 0, 1}
					head := []byte(nil)
					if server.Is6() {
						head = slices.Concat(me.AsSlice(), server.AsSlice(), []byte{0, 0, 0, byte(len(icmp)), 0, 0, 0, f.icmp()})
					}
					binary.BigEndian.PutUint16(icmp[2:], checksum(head, icmp))
					for _, b := range [][]byte{packetOf(me, server, byte(n), make([]byte, 32)), packetOf(me, server, f.icmp(), icmp)} {
						if err := sendRaw(b, server); err != nil {
							return err
						}
					}
				}
				return udp(netip.Addr{}, server, 7002, []byte("the last"))
			}
			go func() { sent <- p.in()(send) }()
			seen := map[netip.Addr]int{}
			for b, last := make([]byte, 2000), false; !last; {
				if err := on.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
					t.Fatal(err)
				}
				n, _, err := on.ReadFrom(b)
				if err != nil {
					t.Fatalf("after %v: %v", seen, err)
				}
				size := len(server.AsSlice())
				if n < header || string(b[at+size:at+2*size]) != key(server) {
					continue
				}
				source, _ := netip.AddrFromSlice(b[at : at+size])
				seen[source]++
				last = strings.HasSuffix(string(b[:n]), "the last")
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
			if ip := f.egressIP(); len(seen) != 1 || seen[ip] < 200 {
				t.Errorf("packets by their source: %v, want 200 or more of %s alone", seen, ip)
			}
		})
	}
}
