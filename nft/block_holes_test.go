package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// What the tests without blocks have of holes, by blocks.

// gateways are the gateways of pod c, whose node is 2; an emulated machine tries the one elsewhere alone.
func gateways() map[string]int {
	if testing.Short() {
		return map[string]int{"another node is the gateway": 3}
	}
	return map[string]int{"another node is the gateway": 3, "its own node is the gateway": 2}
}

// moveTo makes a node the gateway.
func (b *blockSite) moveTo(gateway int) {
	b.t.Helper()
	b.gates = gateway
	b.reach()
}

// A pod's own link may carry less than the overlay. Its node says so in the name of the egress IP.
func TestByABlockAnswersTooLargeForThePodsLinkGetAnICMPError(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			for name, gateway := range gateways() {
				t.Run(name, func(t *testing.T) {
					b.moveTo(gateway)
					answersFit(t, f, b.ext, b.pods["c"], func(mtu int) {
						b.nodes[2].run(fmt.Sprint("ip link set podc mtu ", mtu))
						b.pods["c"].run(fmt.Sprint("ip link set eth0 mtu ", mtu))
					})
				})
			}
		})
	}
}

// A pod that is no longer selected, one that another egress selects, and one that gets the address of such a pod: a
// flow that is open goes on with no egress IP.
func TestByABlockAnOpenFlowDoesNotKeepAnEgressIPThatItsPodHasNoMore(t *testing.T) {
	for i, f := range blockSides() {
		for name, gateway := range gateways() {
			t.Run(f.pod+"/"+name, func(t *testing.T) {
				b := newBlockSite(t, f)
				node, pod, other := b.nodes[2], b.podAddress("c"), netip.MustParseAddr([]string{"10.10.0.9", "fd10::9"}[i])
				b.moveTo(gateway)
				// selected makes the pod one of the other egress, of id 6, or of none.
				selected := func(by egress.ID) {
					t.Helper()
					b.mangle = func(n int, s *State) {
						s.Sources, s.Pooled = append(s.Sources, other), append(s.Pooled, other)
						block := func(n int) egress.Block { return egress.Block{IP: other, First: b.block(n).First, Size: 64} }
						s.Blocks[6], s.NextHops[6] = block(n), s.NextHops[blockID]
						if to, ok := s.Gateways[blockID]; ok {
							s.Gateways[6] = to
						}
						if s.Hosted != nil {
							s.Hosted[6] = Hosted{IP: other, Mark: egress.LocalMark, Shared: true}
							for _, p := range s.Ports {
								s.Ports = append(s.Ports, Port{block(p.Index), p.Index, p.Node})
							}
						}
						if n == 2 {
							s.Pods = map[netip.Addr]egress.ID{}
							if by != 0 {
								s.Pods[pod] = by
							}
						}
					}
					b.reach()
					if err := b.nodes[gateway].tables.Permit([]Permit{{f.egressIP(), true}, {other, true}}, time.Hour); err != nil {
						t.Fatal(err)
					}
				}
				heard := b.wire(7003)
				flow := func(pod string) net.Conn { return b.flow(pod, 30000, 7003) }
				want := func(c net.Conn, source netip.Addr, when string) {
					t.Helper()
					if got := heard(c, source.IsValid()); got != source {
						t.Errorf("%s: source %v, want %v", when, got, source)
					}
				}
				dropped := func(c net.Conn, counter, when string) {
					t.Helper()
					counts(t, node.tables, counter, func() { want(c, netip.Addr{}, when) })
				}
				forget := func() {
					t.Helper()
					node.do(func() error { netns.Run(t, "conntrack -D --orig-src "+pod.String()); return nil })
				}

				selected(blockID)
				c := flow("c")
				want(c, f.egressIP(), "selected")
				selected(0)
				dropped(c, CounterNoNextHop, "no longer selected")
				selected(6)
				dropped(c, CounterNoNextHop, "selected by another egress")
				forget()
				want(c, other, "opened anew")
				selected(blockID)
				dropped(c, CounterNoNextHop, "selected by the former egress again")
				forget()
				want(c, f.egressIP(), "opened anew by the former")
				node.do(func() error { netns.Run(t, fmt.Sprintf("conntrack -U --orig-src %s -m 1", pod)); return nil })
				dropped(c, CounterUnmarked, "another program wrote its mark")
				forget()
				want(c, f.egressIP(), "opened anew, as the mark is gone")

				node.run("ip link del podc")
				b.pod("heir", 2, 2)
				selected(0)
				c = flow("heir")
				dropped(c, CounterNoNextHop, "a pod that no egress selects got the address")
				selected(6)
				dropped(c, CounterNoNextHop, "a pod of another egress got the address")
				forget()
				want(c, other, "the heir's own")
			})
		}
	}
}

// flow is a UDP connection of a pod to a port of the server that need not answer. The pod's port is given, so that
// another can have it.
func (b *blockSite) flow(pod string, from, to int) (c net.Conn) {
	b.t.Helper()
	b.pods[pod].do(func() (err error) {
		c, err = (&net.Dialer{LocalAddr: &net.UDPAddr{Port: from}}).Dial("udp", net.JoinHostPort(b.f.server, fmt.Sprint(to)))
		return err
	})
	b.t.Cleanup(func() { c.Close() })
	return c
}

// wire listens to what comes to the host outside by its link, for a port: a socket would not show sources that are
// nobody's. What it returns sends by a connection, and returns the source that is seen on the wire then; the invalid
// address where there is none. A source that is wanted is waited for.
func (b *blockSite) wire(port uint16) func(c net.Conn, wanted bool) netip.Addr {
	b.t.Helper()
	kind, at, size, header := unix.ETH_P_IP, 12, 4, 20
	if b.f.egressIP().Is6() {
		kind, at, size, header = unix.ETH_P_IPV6, 8, 16, 40
	}
	var on *packet.Conn
	var server net.PacketConn // or else each sender is told that nobody is there, in place of its next datagram
	b.ext.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			server, err = net.ListenPacket("udp", net.JoinHostPort(b.f.server, fmt.Sprint(port)))
		}
		if err == nil {
			on, err = packet.Listen(ifi, packet.Datagram, kind, nil)
		}
		return err
	})
	b.t.Cleanup(func() { on.Close(); server.Close() })
	seen := make(chan netip.Addr, 1000)
	go func() {
		for p := make([]byte, 2000); ; {
			n, _, err := on.ReadFrom(p)
			if err != nil {
				return // closed
			}
			if n >= header+4 && binary.BigEndian.Uint16(p[header+2:]) == port {
				source, _ := netip.AddrFromSlice(p[at : at+size])
				select {
				case seen <- source:
				default:
				}
			}
		}
	}()
	return func(c net.Conn, wanted bool) netip.Addr {
		b.t.Helper()
		for len(seen) > 0 {
			<-seen
		}
		_, _ = c.Write([]byte("?")) // what is lost shows as nothing that is seen
		within := 300 * time.Millisecond
		if wanted {
			within *= 10
		}
		select {
		case source := <-seen:
			return source
		case <-time.After(within):
			return netip.Addr{}
		}
	}
}

// Who writes VXLAN with the egress IP and a port of a node's block in it needs no id, nor a source that is a secret. It
// does not come out of the gateway, which is node 2: from its own pod c, from pod a elsewhere, nor from processes of
// both nodes.
func TestNobodyButANodeSendsByItsBlock(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			b.moveTo(2)
			here, there := b.underlay(1), b.underlay(2)
			const port = int(egress.OverlayPort)
			right := inner{node: here, to: there, pod: f.egressIP(), plain: true, port: b.block(1).First + 7}
			withID, own := right, right
			withID.plain, withID.id = false, blockID
			own.node, own.port = there, b.block(2).First+7 // as by the gateway itself
			udpAs := func(node netip.Addr) func([]byte) error {
				return func(p []byte) error { return udp(node, there, port, p) }
			}
			rawAs := func(node netip.Addr) func([]byte) error {
				return func(p []byte) error { return raw(node, there, uint16(port), p) }
			}
			for _, a := range []struct {
				name string
				from space
				node int // whose tables drop it
				send func(payload []byte) error
				inner
			}{
				{"a pod of another node", b.pods["a"], 1, udpAs(netip.Addr{}), right},
				{"a pod of another node, with an id", b.pods["a"], 1, udpAs(netip.Addr{}), withID},
				{"a pod of another node with NET_RAW, as its node", b.pods["a"], 1, rawAs(here), right},
				{"a process of another node", b.nodes[1].space, 1, udpAs(netip.Addr{}), right},
				{"a process of another node, as its node", b.nodes[1].space, 1, udpAs(here), right},
				{"a process of another node, with an id", b.nodes[1].space, 1, udpAs(netip.Addr{}), withID},
				{"a pod of the gateway", b.pods["c"], 2, udpAs(netip.Addr{}), right},
				{"a pod of the gateway, as by the gateway itself", b.pods["c"], 2, udpAs(netip.Addr{}), own},
				{"a pod of the gateway with NET_RAW, as a node", b.pods["c"], 2, rawAs(here), right},
				{"a pod of the gateway with NET_RAW, as the gateway", b.pods["c"], 2, rawAs(there), own},
				{"a process of the gateway", b.nodes[2].space, 2, udpAs(netip.Addr{}), right},
				{"a process of the gateway, as by the gateway itself", b.nodes[2].space, 2, udpAs(there), own},
			} {
				before := counter(t, b.nodes[a.node].tables, CounterForeign)
				sneaks(t, a.name, b.ext, f, func() {
					// What is refused at once is as good.
					err := a.from.in()(func() error { return a.send(a.vxlan(f.server)) })
					if err != nil && !slices.ContainsFunc(refusals, func(r error) bool { return errors.Is(err, r) }) {
						t.Errorf("%s: %v", a.name, err)
					}
				})
				if counter(t, b.nodes[a.node].tables, CounterForeign) == before {
					t.Errorf("%s: %s stays at %d", a.name, CounterForeign, before)
				}
			}

			// The same bytes leave where a node sends them: without its tables, all of it may.
			b.nodes[1].do(func() error { return b.nodes[1].tables.Delete() })
			var server net.PacketConn
			b.ext.do(func() (err error) {
				server, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7002"))
				return err
			})
			defer server.Close()
			b.nodes[1].do(func() error { return udp(netip.Addr{}, there, port, right.vxlan(f.server)) })
			if err := server.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
				t.Fatal(err)
			}
			_, from, err := server.ReadFrom(make([]byte, 2000))
			if want := netip.AddrPortFrom(f.egressIP(), right.port); err != nil || netip.MustParseAddrPort(from.String()) != want {
				t.Errorf("what a node sends comes from %v (%v), want %s", from, err, want)
			}
			server.Close()
			foreign := right
			foreign.port = own.port
			counts(t, b.nodes[2].tables, CounterSender, func() {
				sneaks(t, "a node, with a port of another's block", b.ext, f, func() {
					b.nodes[1].do(func() error { return udp(netip.Addr{}, there, port, foreign.vxlan(f.server)) })
				})
			})
		})
	}
}

// Another program's NAT, beside ours on all nodes, changes nothing: what a pod sends is translated before, and at the
// gateway no NAT sees it.
func TestByABlockNoSourceNATOfOthersComesBeforeOurs(t *testing.T) {
	for i, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			family := []string{"ip", "ip6"}[i]
			all := map[string]string{
				"kindnet": kindnet,
				"masquerade at -198": fmt.Sprintf(`table inet other { chain post { type nat hook postrouting priority -198;
					%[1]s saddr %[2]s masquerade; %[1]s saddr %[3]s masquerade; }; }`, family, f.pods, f.egress),
			}
			for name, others := range all {
				if testing.Short() && name != "kindnet" {
					continue
				}
				for where, gateway := range gateways() {
					t.Run(name+"/"+where, func(t *testing.T) {
						b.moveTo(gateway)
						for _, n := range b.nodes {
							n.do(func() error { nft(t, others); return nil })
						}
						for _, pod := range []string{"a", "c"} {
							c := b.pods[pod].open(f.server)
							c.t = t
							c.want(f.egress, "pod "+pod)
							c.want(f.egress, "pod "+pod+", again")
						}
						for _, n := range b.nodes {
							n.run("nft delete table inet " + strings.Fields(others)[2])
						}
					})
				}
			}
		})
	}
}

// Somebody deletes the gateway's tables, as a flush does where nobody owns them. What comes out of the overlay goes
// nowhere: others would make it the node's.
func TestWithoutTheGatewaysTablesNothingLeavesWithAnotherSource(t *testing.T) {
	for _, f := range blockSides() {
		for name, others := range map[string]string{"beside a plain CNI": cni, "beside kindnet": kindnet} {
			for what, without := range map[string]bool{"by a block": false, "without a block": true} {
				if testing.Short() && others == cni {
					continue
				}
				t.Run(f.pod+"/"+what+"/"+name, func(t *testing.T) {
					b := newBlockSite(t, f)
					if without {
						b.without(1)
						b.reach()
					}
					gateway := b.nodes[3]
					gateway.do(func() error { nft(t, others); return nil })
					heard := b.wire(7003)
					open := b.flow("a", 30000, 7003)
					if got := heard(open, true); got != f.egressIP() {
						t.Fatalf("before: source %v, want %s", got, f.egress)
					}
					gateway.do(func() error { return gateway.tables.Delete() })
					came := func() string { return gateway.out("cat /sys/class/net/egret.vx/statistics/rx_packets") }
					for flow, c := range map[string]net.Conn{
						"an open flow": open, "a new flow": b.flow("a", 30001, 7003), "a new flow of another pod": b.flow("b", 0, 7003),
					} {
						before := came()
						if got := heard(c, false); got.IsValid() {
							t.Errorf("%s: source %s", flow, got)
						}
						if came() == before {
							t.Errorf("%s: nothing came to the gateway", flow)
						}
					}
				})
			}
		}
	}
}

// Another program marks the overlay's own packets, as a firewall of the nodes does. An answer, which has no id, has no
// mark of its own.
func TestMarksOfOthersOnTheOverlaysPacketsDropNoAnswer(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.ext.serve(f.server)
			for n := 2; n <= 3; n++ {
				b.nodes[n].run("nft add table inet other")
				for i, hook := range []string{"input priority 0", "prerouting priority -150", "output priority -150"} {
					b.nodes[n].run(fmt.Sprintf("nft add chain inet other c%d { type filter hook %s; }", i, hook))
					b.nodes[n].run(fmt.Sprintf("nft add rule inet other c%d udp dport %d meta mark set 0x10000", i, egress.OverlayPort))
				}
			}
			for what, without := range map[string]bool{"by a block": false, "without a block": true} {
				if b.mangle = nil; without {
					b.without(2)
				}
				b.reach()
				b.output(b.nodes[2].space, "conntrack -F")
				eventually(t, what+": no answer", func() bool { return b.pods["c"].seenAtOnce(f.server) == f.egress })
			}
		})
	}
}
