package nft

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// sctp is a packet with one chunk (RFC 9260).
func sctp(from, to uint16, tag uint32, chunk []byte) []byte {
	b := binary.BigEndian.AppendUint16(nil, from)
	b = binary.BigEndian.AppendUint16(b, to)
	b = binary.BigEndian.AppendUint32(b, tag)
	b = append(append(b, 0, 0, 0, 0), chunk...)
	binary.LittleEndian.PutUint32(b[8:], crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// Associations of SCTP leave by ports of a block, as TCP does, and what comes back has the port and the checksum of the
// pod's own.
func TestByABlockSCTPLeavesAndComesBack(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			network := fmt.Sprintf("ip%s:%d", map[bool]string{true: "4", false: "6"}[f.egressIP().Is4()], unix.IPPROTO_SCTP)
			listen := func(s space, ip string) (c net.PacketConn) {
				t.Helper()
				s.do(func() (err error) { c, err = net.ListenPacket(network, ip); return err })
				t.Cleanup(func() { c.Close() })
				return c
			}
			hears := func(who string, c net.PacketConn) (packet []byte, from netip.Addr) {
				t.Helper()
				packet = make([]byte, 200)
				if err := c.SetReadDeadline(time.Now().Add(2 * time.Second)); err != nil {
					t.Fatal(err)
				}
				n, addr, err := c.ReadFrom(packet)
				if err != nil {
					t.Fatalf("%s hears nothing: %v", who, err)
				}
				packet = packet[:n]
				sum := binary.LittleEndian.Uint32(packet[8:])
				clear(packet[8:12])
				if want := crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)); sum != want {
					t.Errorf("%s: checksum %#x, want %#x", who, sum, want)
				}
				return packet, netip.MustParseAddr(addr.String())
			}
			send := func(c net.PacketConn, to netip.Addr, packet []byte) {
				t.Helper()
				if _, err := c.WriteTo(packet, &net.IPAddr{IP: to.AsSlice()}); err != nil {
					t.Fatal(err)
				}
			}
			server := listen(b.ext, f.server)
			const port, serverPort = 5000, 2905
			for _, gateway := range gateways() {
				b.moveTo(gateway)
				for n := 1; n <= 2; n++ {
					b.output(b.nodes[n].space, "conntrack -F")
				}
				used := map[uint16]string{}
				for i, name := range []string{"a", "b", "c"} {
					pod := listen(b.pods[name], b.podAddress(name).String())
					tag := uint32(0x01020300 + i)
					// an INIT and its answer: tag, window, streams both ways, sequence number
					begin := binary.BigEndian.AppendUint32([]byte{1, 0, 0, 20}, tag)
					send(pod, netip.MustParseAddr(f.server), sctp(port, serverPort, 0, append(begin, 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1)))
					packet, from := hears("the server", server)
					seen := netip.AddrPortFrom(from, binary.BigEndian.Uint16(packet))
					b.inBlock("pod "+name, seen, map[string]int{"a": 1, "b": 1, "c": 2}[name])
					if used[seen.Port()] != "" {
						t.Errorf("pods %s and %s have one port, %d", name, used[seen.Port()], seen.Port())
					}
					used[seen.Port()] = name
					answer := []byte{2, 0, 0, 20, 9, 9, 9, byte(i), 0, 0, 16, 0, 0, 1, 0, 1, 0, 0, 0, 1}
					send(server, seen.Addr(), sctp(serverPort, seen.Port(), tag, answer))
					packet, from = hears("pod "+name, pod)
					if to := binary.BigEndian.Uint16(packet[2:]); from.String() != f.server || to != port {
						t.Errorf("pod %s is answered by %s at port %d, want %s at %d", name, from, to, f.server, port)
					}
					pod.Close()
				}
			}
		})
	}
}

// With --egress.snatFullyRandomPorts the ports are of the node's block, too.
func TestByABlockSourcePortsStayOrAreRandom(t *testing.T) {
	for _, f := range blockSides() {
		t.Run(f.pod, func(t *testing.T) {
			b := newBlockSite(t, f)
			b.listenTCP(7001)
			const connections = 20
			// At random comes last: its ports are those that the others would keep.
			for _, random := range []bool{false, true} {
				b.random = random
				b.reach()
				same := 0
				for i := range connections {
					from := int(b.block(1).First) + i
					if random {
						from += connections
					}
					_, seen := b.dial("a", from, 7001)
					b.inBlock("pod a", seen, 1)
					if int(seen.Port()) == from {
						same++
					}
				}
				// What is taken at random may be what it was.
				if random && same > connections/4 || !random && same < connections {
					t.Errorf("random %t: %d of %d connections kept their port", random, same, connections)
				}
			}
		})
	}
}

// The gateway knows nothing of windows, and the pod's node sees both ways: so a stream goes on through moves where
// conntrack is strict.
func TestByABlockAStreamGoesOnThroughMovesWhereConntrackIsStrict(t *testing.T) {
	for _, f := range withFastPath() {
		t.Run(f.name(), func(t *testing.T) {
			b := newBlockSite(t, f)
			for _, node := range b.nodes {
				node.run("sysctl -qw net.netfilter.nf_conntrack_tcp_be_liberal=0")
			}
			accepted := b.listenTCP(7001)
			c, _ := b.dial("a", 0, 7001)
			s := <-accepted
			const part = 1 << 20
			for _, gateway := range []int{2, 3, 2} {
				sent := make(chan error)
				go func() {
					_, err := s.Write(make([]byte, part))
					sent <- err
				}()
				if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
					t.Fatal(err)
				}
				if _, err := io.CopyN(io.Discard, c, part/4); err != nil {
					t.Fatal(err)
				}
				b.moveTo(gateway)
				if _, err := io.CopyN(io.Discard, c, part-part/4); err != nil {
					t.Errorf("node %d becomes the gateway: %v", gateway, err)
				}
				if err := <-sent; err != nil {
					t.Error(err)
				}
			}
			for n, node := range b.nodes {
				if dropped := counter(t, node.tables, CounterInvalid); dropped > 0 {
					t.Errorf("node %d has dropped %d packets as invalid", n, dropped)
				}
			}
		})
	}
}

// An egress IP that is the node's own address takes no port from the node: two connections with one port, the node's
// and the pod's, go on side by side, and the node's services stay reached.
func TestAStaticIPLeavesTheNodeItsPorts(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			state := fmt.Sprintf("except %s\nsource %s\npod %s 5\nnexthop 5 0x3fff\nhosted 5 %[2]s 0x3fff\n", f.pods, f.node, f.pod)
			reach(t, tables, parseState(t, state))
			if err := tables.Permit([]Permit{{netip.MustParseAddr(f.node), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			var server net.PacketConn
			ext.do(func() (err error) {
				server, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7001"))
				return err
			})
			defer server.Close()
			go func() {
				for buf := make([]byte, 100); ; {
					n, from, err := server.ReadFrom(buf)
					if err != nil {
						return // closed
					}
					server.WriteTo(fmt.Append(buf[:n:n], from), from) // what is lost shows as no answer
				}
			}()
			const port = egress.StatefulPort + 3
			talk := func(c net.Conn, word string) (seen netip.AddrPort) {
				t.Helper()
				eventually(t, word+" has no answer", func() bool {
					if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
						t.Fatal(err)
					}
					_, _ = c.Write([]byte(word)) // what is lost shows as no answer
					buf := make([]byte, 100)
					n, err := c.Read(buf)
					if err != nil {
						return false
					}
					if string(buf[:len(word)]) != word {
						t.Fatalf("%s gets an answer of another: %q", word, buf[:n])
					}
					seen = netip.MustParseAddrPort(string(buf[len(word):n]))
					return true
				})
				if seen = netip.AddrPortFrom(seen.Addr().Unmap(), seen.Port()); seen.Addr().String() != f.node {
					t.Errorf("%s is seen as %s, want the node's address", word, seen)
				}
				return seen
			}
			dial := func(in func(func() error) error) (c net.Conn) {
				t.Helper()
				if err := in(func() (err error) {
					c, err = (&net.Dialer{LocalAddr: &net.UDPAddr{Port: port}}).Dial("udp", net.JoinHostPort(f.server, "7001"))
					return err
				}); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { c.Close() })
				return c
			}
			for _, first := range []string{"pod", "node"} {
				netns.Run(t, "conntrack -F")
				in := map[string]func(func() error) error{"pod": p.in(), "node": local}
				second := map[string]string{"pod": "node", "node": "pod"}[first]
				one, other := dial(in[first]), dial(in[second])
				if a, b := talk(one, first), talk(other, second); a == b {
					t.Errorf("the %s began: both are seen as %s", first, a)
				}
				talk(one, first)
				talk(other, second)
				one.Close()
				other.Close()
			}
			var service net.PacketConn // of the node
			if err := local(func() (err error) {
				service, err = net.ListenPacket("udp", net.JoinHostPort(f.node, "7000"))
				return err
			}); err != nil {
				t.Fatal(err)
			}
			defer service.Close()
			go answerAll(service)
			if got := answer(t, ext.in(), f.node, "7000"); got == "" {
				t.Error("a service of the node is not reached at its own address")
			}
		})
	}
}
