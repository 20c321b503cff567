package nft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
)

// What the programs of the fast path look at in a frame, and what they make of it, one thing at a time. That each of
// their checks is found by a test when it is left out is what TestEachCheckOfTheFastPathIsFoundMissing tries.

// wire is the gateway of a site, node 3, with all that is needed to send it frames by hand.
type wire struct {
	*blockSite
	send        func(frame []byte)
	gateway, me net.HardwareAddr
	inside      inner          // what node 1 sends it with the egress IP, in the overlay
	server      netip.AddrPort // where that goes
	port        netip.AddrPort // of node 1's block, where it comes from
}

func newWire(t *testing.T) *wire {
	b := newBlockSite(t, fastSides(t))
	b.ext.serve(b.f.server)
	eventually(t, "the pod does not get out", func() bool { return b.pods["a"].seenAtOnce(b.f.server) == b.f.egress })
	// It answers nothing but what the pod asks.
	b.ext.run(fmt.Sprintf(`nft add table ip silent
		nft add chain ip silent in { type filter hook prerouting priority -300 ; }
		nft add rule ip silent in ip saddr %s th dport != 7000 drop`, b.f.egress))
	send, macOf := b.ext.onWire()
	port := netip.AddrPortFrom(b.f.egressIP(), b.block(1).First+7)
	return &wire{
		blockSite: b, send: send, gateway: macOf(b.nodes[3].space), me: macOf(b.ext), server: netip.AddrPortFrom(netip.MustParseAddr(b.f.server), 7002),
		port: port, inside: inner{node: b.underlay(1), to: b.underlay(3), pod: port.Addr(), id: blockID, port: port.Port()},
	}
}

// Where the headers of a frame of the overlay begin, and those of a plain one.
const (
	atIP    = 14
	atUDP   = atIP + 20
	atVXLAN = atUDP + 8
	atInEth = atVXLAN + 8
	atInIP  = atInEth + 14
	atInUDP = atInIP + 20
)

// out is a frame of the overlay from node 1 to the gateway, with an IP packet in it; nil: a datagram.
func (w *wire) out(ip []byte) []byte {
	vxlan := w.inside.vxlan(w.f.server)
	if ip != nil {
		vxlan = append(vxlan[:8+14], ip...)
	}
	p := datagram(netip.AddrPortFrom(w.underlay(1), 40000), netip.AddrPortFrom(w.underlay(3), uint16(egress.OverlayPort)), vxlan)
	p[26], p[27] = 0, 0 // without a checksum, as the overlay has it
	return frame(w.gateway, w.me, p)
}

// back is a frame for a port of node 1's block.
func (w *wire) back(ip []byte) []byte {
	if ip == nil {
		ip = datagram(w.server, w.port, []byte("back"))
	}
	return frame(w.gateway, w.me, ip)
}

// tcpPacket is a packet of TCP, of 20 bytes of header, with these flags, and some bytes.
func tcpPacket(from, to netip.AddrPort, flags byte, payload string) []byte {
	tcp := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from.Port()), to.Port())
	tcp = append(append(tcp, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 1, 0, 0, 0, 0, 0), payload...)
	size := binary.BigEndian.AppendUint16(nil, uint16(len(tcp)))
	binary.BigEndian.PutUint16(tcp[16:], checksum(from.Addr().AsSlice(), to.Addr().AsSlice(), []byte{0, unix.IPPROTO_TCP}, size, tcp))
	return packetOf(from.Addr(), to.Addr(), unix.IPPROTO_TCP, tcp)
}

// with changes a packet, and its IP checksum with it.
func with(p []byte, change func(p []byte)) []byte {
	p = slices.Clone(p)
	change(p)
	return resum(p)
}

// took is what the gateway's programs take of frames.
func (w *wire) took(frames ...[]byte) fastpath.Steps {
	w.t.Helper()
	return w.blockSite.took(3, func() {
		w.settled(3, func() {
			for _, f := range frames {
				w.send(f)
			}
		})
	})
}

// bits are those of some bytes of a frame: of each of n bytes, those of a mask.
type bits struct {
	at, n int
	mask  byte
}

// A frame that the gateway takes, with each of its bits changed in turn, as it is and with the checksums of its IP
// headers made right again. It is taken where the bit says nothing of who sent it and what it is, and nowhere else.
func TestTheFastPathTakesNoFrameOfWhichABitIsWrong(t *testing.T) {
	w := newWire(t)
	const all = 0xff
	for _, tt := range []struct {
		name    string
		frame   []byte
		headers []int // of IP
		// free are the bits that may be otherwise, as it is, and with the checksums made right. What came to all hosts
		// of the LAN, was not so large on its way, or has a bit that nothing uses, the kernel and the tables take out
		// of the overlay as well.
		free, right []bits
	}{
		{"of the overlay", w.out(nil), []int{atIP, atInIP}, []bits{
			{0, 1, 1}, {6, 1, 0xfe}, {7, 5, all}, // to a group; from another MAC address than a group's
			{atUDP, 2, all},                                                   // source port
			{atVXLAN, 1, 0x80}, {atVXLAN + 1, 1, 0xb7}, {atVXLAN + 2, 2, all}, // whether it has an id, and that
			{atInUDP + 1, 1, 0x3f}, {atInUDP + 2, 12, all}, // a port of the block; to which port, and what it says
		}, []bits{
			{atIP + 1, 1, all}, {atIP + 4, 2, all}, {atIP + 6, 1, 0xc0}, {atIP + 8, 1, all},
			{atInIP + 1, 1, all}, {atInIP + 4, 2, all}, {atInIP + 6, 1, 0x40}, {atInIP + 8, 1, 0xbf},
			{atInIP + 16, 1, 0xdf}, {atInIP + 17, 3, all}, // to any address but one of a group
		}},
		{"for a block", w.back(nil), []int{atIP}, []bits{
			{6, 1, 0xfe}, {7, 5, all},
			{atUDP, 2, all}, {atUDP + 3, 1, 0x3f}, {atUDP + 4, 8, all},
		}, []bits{
			{atIP + 1, 1, all}, {atIP + 4, 2, all}, {atIP + 6, 1, 0x40}, {atIP + 8, 1, 0xbf},
			{atIP + 12, 1, 0xdf}, {atIP + 13, 3, all}, // from any address but one of a group
		}},
	} {
		taken := func(s fastpath.Steps) int {
			if len(tt.headers) == 2 {
				return int(s.Forwarded)
			}
			return int(s.Wrapped)
		}
		for _, right := range []bool{false, true} {
			where, free := make([]bool, 8*len(tt.frame)), tt.free
			for i := range where {
				where[i] = !right
			}
			if right {
				free = tt.right
				for _, h := range tt.headers {
					for i := 8 * h; i < 8*(h+20); i++ {
						where[i] = i/8 != h+10 && i/8 != h+11
					}
				}
			}
			may := make([]bool, len(where))
			for _, f := range free {
				for i := 8 * f.at; i < 8*(f.at+f.n); i++ {
					may[i] = f.mask&(0x80>>(i%8)) != 0
				}
			}
			changed := func(i int) []byte {
				f := slices.Clone(tt.frame)
				f[i/8] ^= 0x80 >> (i % 8)
				for _, h := range tt.headers {
					if right {
						resum(f[h : h+20])
					}
				}
				return f
			}
			for _, taking := range []bool{true, false} {
				var at []int
				var frames [][]byte
				for i := range where {
					if where[i] && may[i] == taking {
						at, frames = append(at, i), append(frames, changed(i))
					}
				}
				want := 0
				if taking {
					want = len(at)
				}
				if got := taken(w.took(frames...)); got == want {
					continue
				}
				for n, i := range at {
					if got := taken(w.took(frames[n])) == 1; got != taking {
						t.Errorf("a frame %s, with bit %#x of byte %d changed, checksums right %t: taken %t, want %t", tt.name, 0x80>>(i%8), i/8, right, got, taking)
					}
				}
			}
		}
	}
}

// What cannot be said of one bit.
func TestTheFastPathTakesNoFrameThatIsMadeForIt(t *testing.T) {
	w := newWire(t)
	datagramOut := datagram(w.port, w.server, []byte("forged"))
	// An option is in the place of the ports, and the ports after it are another node's.
	option := func(p []byte, ports netip.AddrPort, back bool) []byte {
		at := 0
		if back {
			at = 2
		}
		q := slices.Concat(p[:20], p[20:24], p[20:])
		binary.BigEndian.PutUint16(q[24+at:], ports.Port())
		q[0], q[3] = 0x46, q[3]+4
		return resum(q)
	}
	notOurs := netip.AddrPortFrom(w.port.Addr(), w.block(2).First)
	datagramBack := datagram(w.server, w.port, []byte("back"))
	padded := func(f []byte) []byte { return append(slices.Clone(f), make([]byte, 20)...) }
	edit := func(f []byte, change func(f []byte)) []byte {
		f = slices.Clone(f)
		change(f)
		return f
	}
	const ack, synAck, fin, rst = 0x10, 0x12, 0x11, 0x04
	type steps = fastpath.Steps
	for _, tt := range []struct {
		name  string
		frame []byte
		want  steps
	}{
		{"a segment of TCP", w.out(tcpPacket(w.port, w.server, ack, "")), steps{Forwarded: 1}},
		{"the end of a connection", w.out(tcpPacket(w.port, w.server, fin, "")), steps{Forwarded: 1}},
		{"its reset", w.out(tcpPacket(w.port, w.server, rst, "")), steps{Forwarded: 1}},
		{"a SYN", w.out(tcpPacket(w.port, w.server, 2, "")), steps{Unwrapped: 1}},
		{"a SYN that is an answer", w.out(tcpPacket(w.port, w.server, synAck, "")), steps{Unwrapped: 1}},
		{"a TCP header that is too short", w.out(with(tcpPacket(w.port, w.server, ack, ""), func(p []byte) { p[32] = 0x40 })), steps{Unwrapped: 1}},
		{"ports among the options", w.out(option(datagramOut, notOurs, false)), steps{Unwrapped: 1}},
		{"a source of another node's, as it has been told of", w.out(datagram(notOurs, w.server, nil)), steps{Unwrapped: 1}},
		{"from a node that is none", edit(w.out(nil), func(f []byte) { copy(f[atInEth+6:], egress.OverlayMAC(netip.MustParseAddr("10.10.0.9"))) }), steps{}},
		{"from the gateway itself", edit(w.out(nil), func(f []byte) { copy(f[atInEth+6:], egress.OverlayMAC(w.underlay(3))) }), steps{}},
		{"in which another protocol is said to be", edit(w.out(nil), func(f []byte) { f[atInEth+12], f[atInEth+13] = 0x86, 0xdd }), steps{}},
		{"of another EtherType", edit(w.out(nil), func(f []byte) { f[12], f[13] = 0x88, 0xb5 }), steps{}},
		{"shorter by its UDP header", edit(w.out(nil), func(f []byte) { f[atUDP+5]-- }), steps{}},
		{"longer by its UDP header", edit(w.out(nil), func(f []byte) { f[atUDP+5]++ }), steps{}},
		// by the kernel, which takes it off, and then the program
		{"with something behind it", padded(w.out(nil)), steps{Forwarded: 1}},
		{"to another address of the gateway", edit(w.out(nil), func(f []byte) { copy(f[atIP+16:], w.port.Addr().AsSlice()); resum(f[atIP : atIP+20]) }), steps{}},
		{"for a multicast group", w.out(datagram(w.port, netip.AddrPortFrom(netip.MustParseAddr("224.1.1.1"), 7002), nil)), steps{Unwrapped: 1}},

		{"back: a segment of TCP", w.back(tcpPacket(w.server, w.port, ack, "")), steps{Wrapped: 1}},
		{"back: a SYN that is an answer", w.back(tcpPacket(w.server, w.port, synAck, "")), steps{}},
		{"back: ports among the options", w.back(option(datagramBack, notOurs, true)), steps{}},
		{"back: a TCP header that is cut off", padded(w.back(with(tcpPacket(w.server, w.port, ack, ""), func(p []byte) { p[3] = 36 }))), steps{}},
		{"back: headers that are cut off", padded(w.back(with(datagramBack, func(p []byte) { p[3] = 24 }))), steps{}},
		{"back: longer than it came", w.back(with(datagramBack, func(p []byte) { p[3] += 8 })), steps{}},
		{"back: of another EtherType", edit(w.back(nil), func(f []byte) { f[12], f[13] = 0x88, 0xb5 }), steps{}},
		{"back: too large for the overlay", w.back(datagram(w.server, w.port, make([]byte, 1430))), steps{}},
		{"back: as large as the overlay takes", w.back(datagram(w.server, w.port, make([]byte, 1422))), steps{Wrapped: 1}},
		{"back: to the port of the overlay", w.back(datagram(w.server, netip.AddrPortFrom(w.port.Addr(), uint16(egress.OverlayPort)), nil)), steps{}},
	} {
		if got := w.took(tt.frame); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// The way is that of the node's rules and routes, as for what the tables forward; what does not leave by the uplink the
// programs leave alone.
func TestTheFastPathGoesTheWayOfTheRoutes(t *testing.T) {
	w := newWire(t)
	gateway := w.nodes[3]
	gateway.run(`ip link add behind type veth peer name behind1
		ip link set behind1 up
		ip link set behind up
		ip addr add 192.0.2.1/24 dev behind
		ip neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev behind nud permanent`)
	const class = 0x10
	marked := w.out(with(datagram(w.port, w.server, nil), func(p []byte) { p[1] = class }))
	large := w.out(datagram(w.port, w.server, make([]byte, 1000)))
	type steps = fastpath.Steps
	rule := func(r string) string { return "rule add pref 500 unreachable " + r }
	for _, tt := range []struct {
		name, add string // ip commands, taken back after it
		frame     []byte
		want      steps
	}{
		{"no way of its own", "", w.out(nil), steps{Forwarded: 1}},
		{"a rule for its protocol", rule("ipproto udp"), w.out(nil), steps{Unwrapped: 1}},
		{"a rule for another protocol", rule("ipproto tcp"), w.out(nil), steps{Forwarded: 1}},
		{"a rule for its destination port", rule("dport 7002"), w.out(nil), steps{Unwrapped: 1}},
		{"a rule for its source port", rule(fmt.Sprint("sport ", w.port.Port())), w.out(nil), steps{Unwrapped: 1}},
		{"a rule for the egress IP", rule("from " + w.f.egress), w.out(nil), steps{Unwrapped: 1}},
		{"a rule for what comes by the overlay", rule("iif " + egress.OverlayLink), w.out(nil), steps{Unwrapped: 1}},
		{"a rule for its service class", rule("tos 0x10"), marked, steps{Unwrapped: 1}},
		{"a rule for another service class", rule("tos 0x08"), marked, steps{Forwarded: 1}},
		{"no route", "route add blackhole 203.0.113.0/24", w.out(nil), steps{Unwrapped: 1}},
		{"by another link", "route add 203.0.113.0/24 via 192.0.2.2 dev behind", w.out(nil), steps{Unwrapped: 1}},
		{"by a router that has IPv6 alone", "route add 203.0.113.0/24 via inet6 fd10::200 dev eth0", w.out(nil), steps{Unwrapped: 1}},
		{"by a router that nobody knows", "route add 203.0.113.0/24 via 10.10.0.99 dev eth0", w.out(nil), steps{Unwrapped: 1}},
		{"too large for the route", "route add 203.0.113.0/24 via 10.10.0.200 dev eth0 mtu lock 900", large, steps{Unwrapped: 1}},
		{"not too large for the route", "route add 203.0.113.0/24 via 10.10.0.200 dev eth0 mtu lock 1100", large, steps{Forwarded: 1}},
		{"from a node to which another link leads", "route add 10.10.0.101/32 via 192.0.2.2 dev behind", w.out(nil), steps{}},
		{"back: to a node to which another link leads", "route add 10.10.0.101/32 via 192.0.2.2 dev behind", w.back(nil), steps{}},
		{"back: to a node to which no route leads", "route add blackhole 10.10.0.101/32", w.back(nil), steps{}},
		{"back: too large for the route to the node", "route add 10.10.0.101/32 dev eth0 mtu lock 900", w.back(datagram(w.server, w.port, make([]byte, 860))), steps{}},
		{"back: from where another link leads", "route add 203.0.113.0/24 via 192.0.2.2 dev behind", w.back(nil), steps{}},
		{"back: as ever", "", w.back(nil), steps{Wrapped: 1}},
	} {
		if strings.Contains(tt.add, "inet6") {
			gateway.ok("ping -c1 -w3 fd10::200") // so that it is known
		}
		if tt.add != "" {
			gateway.run("ip " + tt.add)
		}
		if strings.HasPrefix(tt.name, "from a node") {
			time.Sleep(1200 * time.Millisecond) // the programs look for the way back to a node once a second
		}
		if got := w.took(tt.frame); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
		if tt.add != "" {
			gateway.run("ip " + strings.Replace(tt.add, " add ", " del ", 1))
		}
	}
	// Addresses of this host and of none have routes of their own, but are nobody's without them, too.
	gateway.run(`ip route flush table local root 127.0.0.0/8
		ip route flush table all root 0.0.0.0/8`)
	for _, ip := range []string{"0.0.0.0", "0.0.0.7", "127.0.0.1", "127.1.1.1", "255.255.255.255"} {
		if out := w.output(gateway.space, "ip route get "+ip); !strings.Contains(out, "eth0") && ip != "0.0.0.0" && ip != "255.255.255.255" {
			t.Errorf("premise: the way to %s is %s", ip, out)
		}
		its := netip.AddrPortFrom(netip.MustParseAddr(ip), 7002)
		// which Linux takes for a host since 5.3
		if got := w.took(w.back(datagram(its, w.port, nil))); got != (steps{}) && ip != "0.0.0.7" {
			t.Errorf("back: from %s: %+v", ip, got)
		}
		if got := w.took(w.out(datagram(w.port, its, nil))); got != (steps{Unwrapped: 1}) {
			t.Errorf("to %s: %+v", ip, got)
		}
	}
	gateway.run("ip link set " + egress.OverlayLink + " mtu 1000") // less than the uplink would bear
	w.hurry(3, false)
	for size, want := range map[int]steps{1000: {Wrapped: 1}, 1001: {}} {
		if got := w.took(w.back(datagram(w.server, w.port, make([]byte, size-28)))); got != want {
			t.Errorf("back: %d bytes into an overlay of 1000: %+v, want %+v", size, got, want)
		}
	}
}

// captured reads whole frames from eth0 of a namespace, those from a MAC address.
func (s space) captured(from net.HardwareAddr) (next func(what string, like func(frame []byte) bool) []byte) {
	s.t.Helper()
	var c *packet.Conn
	s.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			// who waits for IP alone does not see what programs take
			c, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_ALL, nil)
		}
		return err
	})
	s.t.Cleanup(func() { c.Close() })
	return func(what string, like func([]byte) bool) []byte {
		s.t.Helper()
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			s.t.Fatal(err)
		}
		b := make([]byte, 1<<16)
		for {
			n, _, err := c.ReadFrom(b)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				s.t.Errorf("%s: nothing came", what)
				return nil
			}
			if err != nil {
				s.t.Fatal(err)
			}
			if f := b[:n]; n > atUDP && bytes.Equal(f[6:12], from) && like(f) {
				return f
			}
		}
	}
}

// What leaves by the programs is byte for byte what leaves by the tables and the kernel, but for the outer header: each
// chooses a source port, and the programs' packets are not to be cut up, so that they need no identification, and have
// no checksum.
func TestTheFastPathSendsWhatTheTablesSend(t *testing.T) {
	w := newWire(t)
	node1 := w.nodes[1]
	macs := map[string]net.HardwareAddr{}
	_, macOf := w.ext.onWire()
	macs["gateway"], macs["node"] = macOf(w.nodes[3].space), macOf(node1.space)
	outside, atNode, atGateway := w.ext.captured(macs["gateway"]), node1.captured(macs["gateway"]), w.nodes[3].captured(macs["node"])
	const payload = "forged"
	class := func(p []byte, tos byte) []byte { return with(p, func(p []byte) { p[1] = tos }) }
	datagramOut, datagramBack := datagram(w.port, w.server, []byte(payload)), datagram(w.server, w.port, []byte(payload))
	plain := w.out(datagramOut)
	plain[atVXLAN], plain[atVXLAN+1], plain[atVXLAN+2], plain[atVXLAN+3] = 8, 0, 0, 0
	pod := w.pods["a"].open(w.f.server)
	overlay := func(f []byte) bool {
		return binary.BigEndian.Uint16(f[atUDP+2:]) == uint16(egress.OverlayPort) && len(f) > atInUDP
	}
	type read = func(string, func([]byte) bool) []byte
	for _, tt := range []struct {
		name string
		node int // whose programs take it
		send func()
		next read
	}{
		{"a datagram", 3, func() { w.send(w.out(datagramOut)) }, outside},
		{"a datagram without an id", 3, func() { w.send(plain) }, outside},
		{"a segment", 3, func() { w.send(w.out(tcpPacket(w.port, w.server, 0x10, payload))) }, outside},
		{"with its last hop but one", 3, func() { w.send(w.out(with(datagramOut, func(p []byte) { p[8] = 2 }))) }, outside},
		{"not to be cut up", 3, func() { w.send(w.out(with(datagramOut, func(p []byte) { p[6], p[4], p[5] = 0x40, 0xab, 0xcd }))) }, outside},
		{"of a service class", 3, func() { w.send(w.out(class(datagramOut, 0xb9))) }, outside},
		{"a checksum near its end", 3, func() { w.send(w.out(with(datagramOut, func(p []byte) { nearEnd(p) }))) }, outside},
		{"back: a datagram", 3, func() { w.send(w.back(datagramBack)) }, atNode},
		{"back: a segment", 3, func() { w.send(w.back(tcpPacket(w.server, w.port, 0x10, payload))) }, atNode},
		{"back: padded", 3, func() { w.send(append(w.back(datagramBack), make([]byte, 20)...)) }, atNode},
		{"back: of a service class", 3, func() { w.send(w.back(class(datagramBack, 0xb8))) }, atNode},
		{"back: congestion may be told", 3, func() { w.send(w.back(class(datagramBack, 2))) }, atNode},
		{"back: so, the other way", 3, func() { w.send(w.back(class(datagramBack, 1))) }, atNode},
		{"back: congestion was told", 3, func() { w.send(w.back(class(datagramBack, 3))) }, atNode},
		{"a pod's datagram", 1, func() { pod.seen(time.Second) }, atGateway},
	} {
		like := func(f []byte) bool {
			if tt.node == 1 {
				return overlay(f) && f[atInIP+9] == unix.IPPROTO_UDP && binary.BigEndian.Uint16(f[atInUDP+2:]) == 7000
			}
			return bytes.Contains(f, []byte(payload))
		}
		leaves := func(fast bool) []byte {
			what := tt.name + " by the tables"
			if fast {
				what = tt.name + " by the programs"
			} else {
				resume, err := w.fast[tt.node].Pause()
				if err != nil {
					t.Fatal(err)
				}
				defer resume()
			}
			var f []byte
			by := w.blockSite.took(tt.node, func() {
				tt.send()
				f = slices.Clone(tt.next(what, like))
			})
			if taken := by.Forwarded+by.Wrapped > 0; taken != fast {
				t.Errorf("%s: the programs took %+v", what, by)
			}
			if len(f) < atUDP {
				return nil
			}
			if checksum(f[atIP:atUDP]) != 0 {
				t.Errorf("%s: the IP header has a wrong checksum: %x", what, f[atIP:atUDP])
			}
			if overlay(f) {
				if port := binary.BigEndian.Uint16(f[atUDP:]); port < 32768 {
					t.Errorf("%s: source port %d", what, port)
				}
				if !bytes.Equal(f[atIP+4:atIP+8], []byte{0, 0, 0x40, 0}) && fast || !bytes.Equal(f[atUDP+6:atVXLAN], []byte{0, 0}) && fast {
					t.Errorf("%s: an identification, may be cut up, or has a checksum: %x", what, f[atIP:atVXLAN])
				}
				for _, at := range []int{atIP + 4, atIP + 6, atIP + 10, atUDP, atUDP + 6} {
					f[at], f[at+1] = 0, 0
				}
				if tt.node == 1 { // the pod's own packet has an identification of its own each time
					for _, at := range []int{atInIP + 4, atInIP + 10} {
						f[at], f[at+1] = 0, 0
					}
				}
			}
			return f
		}
		if tables, programs := leaves(false), leaves(true); !bytes.Equal(tables, programs) {
			t.Errorf("%s:\nby the tables   %x\nby the programs %x", tt.name, tables, programs)
		}
	}
}

// nearEnd gives a packet an identification with which its checksum overflows when a hop is taken off: it is all ones
// then, or none.
func nearEnd(p []byte) {
	for id := range 1 << 16 {
		binary.BigEndian.PutUint16(p[4:], uint16(id))
		if resum(p); p[10] == 0xfe && p[11] == 0xff {
			return
		}
	}
}

// What is put into the overlay by another than the tables, or is not any more as they sent it, is not sent on by the
// programs.
func TestTheFastPathWrapsOnlyWhatTheTablesSend(t *testing.T) {
	w := newWire(t)
	node := w.nodes[1]
	pod := w.pods["a"].open(w.f.server)
	ask := func() (got string, by fastpath.Steps) {
		by = w.blockSite.took(1, func() { got = pod.seen(time.Second) })
		return got, by
	}
	if got, by := ask(); got != w.f.egress || by.Wrapped != 1 {
		t.Fatalf("source %q, %+v, want the egress IP by the programs", got, by)
	}
	// A process writes frames to the overlay link.
	var c *packet.Conn
	node.do(func() error {
		ifi, err := net.InterfaceByName(egress.OverlayLink)
		if err == nil {
			c, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_IP, nil)
		}
		return err
	})
	defer c.Close()
	f := frame(egress.OverlayMAC(w.underlay(3)), egress.OverlayMAC(w.underlay(1)), datagram(w.port, w.server, []byte("forged")))
	by := w.blockSite.took(1, func() {
		if _, err := c.WriteTo(f, &packet.Addr{HardwareAddr: f[:6]}); err != nil {
			t.Fatal(err)
		}
	})
	if by != (fastpath.Steps{}) {
		t.Errorf("of a process: %+v", by)
	}
	// Another program overwrites the marks of what the tables have sent, by which these say to which node it goes.
	node.run(`nft add table ip marks
		nft add chain ip marks out { type filter hook postrouting priority 500 ; }`)
	var marks []egress.Mark
	// of ids and routing marks, kube-proxy's two, and others'
	for _, bit := range []int{0, 7, 13, 14, 15, 16, 18, 20, 31} {
		bit := egress.Mark(1) << bit
		if marks = append(marks, bit); bit > egress.Mark(egress.MaxID) {
			marks = append(marks, bit|egress.IDBit)
		}
	}
	if err := pod.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	by = w.blockSite.took(1, func() {
		for _, mark := range marks {
			node.run(fmt.Sprintf(`nft flush chain ip marks out
				nft add rule ip marks out oifname %s meta mark set %#x counter`, egress.OverlayLink, uint32(mark)))
			if _, err := pod.Write([]byte("?")); err != nil {
				t.Fatal(err)
			}
			eventually(t, "nothing is sent", func() bool {
				return strings.Contains(w.output(node.space, "nft list chain ip marks out"), "packets 1 ")
			})
		}
		node.run("nft delete table ip marks")
		if got, _ := ask(); got != w.f.egress {
			t.Errorf("source %q, want the egress IP again", got)
		}
	})
	if by.Wrapped != 1 {
		t.Errorf("of a datagram with each of the marks %v, and one without: %+v", marks, by)
	}
}

// A card hands over segments of TCP as one packet, which is taken where they fit, and becomes no packet that is too
// long.
func TestTheFastPathTakesSegmentsThatFitWhereTheyGo(t *testing.T) {
	w := newWire(t)
	s, link := 0, 0
	w.ext.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		link = ifi.Index
		if s, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.SetsockoptInt(s, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1)
	})
	defer unix.Close(s)
	for _, tt := range []struct {
		name          string
		size, payload int
		want          fastpath.Steps
	}{
		{"as large as the overlay takes", 1410, 14100, fastpath.Steps{Wrapped: 1}},
		{"a byte larger", 1411, 14110, fastpath.Steps{}},
		{"so many that they fit with the header", 1000, 65535 - 50 - 40, fastpath.Steps{Wrapped: 1}},
		{"one byte more", 1000, 65535 - 50 - 40 + 1, fastpath.Steps{}},
	} {
		ip := with(tcpPacket(w.server, w.port, 0x10, strings.Repeat("x", tt.payload)), func(p []byte) { p[6] = 0x40 })
		// struct virtio_net_hdr: a checksum is to be made, it is TCP over IPv4, and in what pieces it goes.
		header := []byte{unix.VIRTIO_NET_HDR_F_NEEDS_CSUM, unix.VIRTIO_NET_HDR_GSO_TCPV4}
		for _, n := range []int{atIP + 40, tt.size, atIP + 20, 16} {
			header = binary.NativeEndian.AppendUint16(header, uint16(n))
		}
		got := w.blockSite.took(3, func() {
			w.settled(3, func() {
				if err := unix.Sendto(s, append(header, w.back(ip)...), 0, &unix.SockaddrLinklayer{Ifindex: link}); err != nil {
					t.Fatal(err)
				}
			})
		})
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}
