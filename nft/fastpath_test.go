package nft

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/internal/need"
)

// The fast path beside the tables: what it takes, and what it leaves to them.

// withFastPath are the families, and IPv4 with the fast path where the kernel has what that needs.
func withFastPath() []sides {
	all := blockSides()
	if p, err := fastpath.New(); err == nil {
		p.Close()
		fast := all[0]
		fast.fast = true
		all = append(slices.Clone(all), fast)
	}
	return all
}

// name is what a test with these sides is called.
func (f sides) name() string {
	if f.fast {
		return f.pod + " by the fast path"
	}
	return f.pod
}

func fastSides(t testing.TB) sides {
	t.Helper()
	need.TCX(t)
	f := bothSides[0]
	f.fast = true
	return f
}

// hasten loads the programs on all nodes.
func (b *blockSite) hasten() {
	b.t.Helper()
	b.fast = map[int]*fastpath.Path{}
	for n, node := range b.nodes {
		node.do(func() (err error) { b.fast[n], err = fastpath.New(); return err })
		b.t.Cleanup(func() { b.fast[n].Close() })
	}
}

// fastState is what a node has in its programs, by its tables' State, as the agent makes it.
func (b *blockSite) fastState(n int) fastpath.State {
	s := b.state(n)
	f := fastpath.State{Self: s.Self, Nodes: s.Nodes}
	b.nodes[n].do(func() error {
		for name, index := range map[string]*int{"eth0": &f.Uplink, egress.OverlayLink: &f.Overlay} {
			link, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			*index = link.Index
			f.MTU = min(cmp.Or(f.MTU, link.MTU), link.MTU)
		}
		return nil
	})
	for _, p := range s.Ports {
		if h := s.Hosted[blockID]; h.IP == p.IP && h.Limit == (Limit{}) {
			f.Ports = append(f.Ports, fastpath.Port{Block: p.Block, Node: p.Node})
		}
	}
	return f
}

// hurry makes the programs of a node what they are to be: what goes, before the tables change, or all, after.
func (b *blockSite) hurry(n int, removes bool) {
	b.t.Helper()
	p := b.fast[n]
	if p == nil {
		return
	}
	b.nodes[n].do(func() error {
		have, err := p.Observe()
		if err != nil {
			return err
		}
		changes := fastpath.Diff(have, b.fastState(n))
		if removes {
			changes = changes.Removes()
		}
		if err := p.Apply(changes); err != nil || removes {
			return err
		}
		if have, err = p.Observe(); err == nil && !fastpath.Diff(have, b.fastState(n)).Empty() {
			err = errors.New("something is left to do:\n" + fastpath.Diff(have, b.fastState(n)).String())
		}
		return err
	})
}

// permitFast lets the programs of a node send with the egress IP, for a time; 0: no more.
func (b *blockSite) permitFast(n int, d time.Duration) {
	b.t.Helper()
	if p := b.fast[n]; p != nil {
		if err := p.Permit([]netip.Addr{b.f.egressIP()}, time.Now().Add(d)); err != nil {
			b.t.Fatal(err)
		}
	}
}

// steps returns what the programs of a node have taken.
func (b *blockSite) steps(n int) fastpath.Steps {
	b.t.Helper()
	s, err := b.fast[n].Steps()
	if err != nil {
		b.t.Fatal(err)
	}
	return s
}

// took returns what the programs of a node take while f runs.
func (b *blockSite) took(n int, f func()) fastpath.Steps {
	b.t.Helper()
	before := b.steps(n)
	f()
	after := b.steps(n)
	if after.Failed != before.Failed {
		b.t.Errorf("the programs of node %d failed at %d packets", n, after.Failed-before.Failed)
	}
	return fastpath.Steps{
		Forwarded: after.Forwarded - before.Forwarded, Wrapped: after.Wrapped - before.Wrapped, Unwrapped: after.Unwrapped - before.Unwrapped,
	}
}

func TestTheFastPathTakesBothWays(t *testing.T) {
	b := newBlockSite(t, fastSides(t))
	b.ext.serve(b.f.server)
	eventually(t, "the pod does not get out", func() bool { return b.pods["a"].seenAtOnce(b.f.server) == b.f.egress })
	counted := func() Traffic {
		all, err := b.nodes[3].tables.Traffic()
		if err != nil {
			t.Fatal(err)
		}
		return all[b.f.egressIP()]
	}
	before := counted()
	var pod fastpath.Steps
	gateway := b.took(3, func() {
		pod = b.took(1, func() {
			for range 10 {
				if got := b.pods["a"].seen(b.f.server); got != b.f.egress {
					t.Errorf("source %q, want the egress IP", got)
				}
			}
		})
	})
	if gateway.Forwarded < 10 || gateway.Wrapped < 10 {
		t.Errorf("the gateway took %+v, want all ten both ways", gateway)
	}
	if pod.Wrapped < 10 || pod.Unwrapped < 10 {
		t.Errorf("the pod's node took %+v, want all ten both ways", pod)
	}
	if now := counted(); now != before {
		t.Errorf("the gateway's tables have seen more: %+v, before %+v", now, before)
	}
	traffic, err := b.fast[3].Traffic()
	if err != nil {
		t.Fatal(err)
	}
	if got := traffic[b.f.egressIP()]; got.SentPackets < 10 || got.SentBytes != got.SentPackets*29 || got.ReceivedPackets < 10 || got.ReceivedBytes < got.ReceivedPackets*29 {
		t.Errorf("counted %+v, want ten datagrams of 29 bytes, and their answers", got)
	}

	resume, err := b.fast[3].Pause()
	if err != nil {
		t.Fatal(err)
	}
	if got := b.took(3, func() { b.pods["a"].seen(b.f.server) }); got != (fastpath.Steps{}) {
		t.Errorf("paused, the gateway took %+v", got)
	}
	if err := resume(); err != nil {
		t.Fatal(err)
	}
	if got := b.took(3, func() { b.pods["a"].seen(b.f.server) }); got.Forwarded == 0 {
		t.Errorf("resumed, the gateway took %+v", got)
	}
}

// Large segments of TCP pass whole, both ways, and what comes is what was sent; also while the programs come and go.
func TestTheFastPathTakesTCP(t *testing.T) {
	b := newBlockSite(t, fastSides(t))
	conns := b.listenTCP(7001)
	c, seen := b.dial("a", 0, 7001)
	b.inBlock("a connection", seen, 1)
	far := <-conns
	data := make([]byte, 8<<20)
	for i := range data {
		data[i] = byte(i * 7 >> 3)
	}
	transfer := func(what string, from, to net.Conn) {
		t.Helper()
		sent := make(chan error, 1)
		go func() { _, err := from.Write(data); sent <- err }()
		got := make([]byte, len(data))
		if err := to.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(to, got); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if err := <-sent; err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%s: other bytes came than were sent (%v)", what, err)
		}
	}
	for _, tt := range []struct {
		what string
		fast bool
	}{{"by the programs", true}, {"by the tables", false}, {"by the programs again", true}} {
		if !tt.fast {
			for _, p := range b.fast {
				if err := p.Close(); err != nil {
					t.Fatal(err)
				}
			}
			b.fast = nil
			for n, node := range b.nodes {
				if out := b.output(node.space, "ip -d link show"); bytes.Contains([]byte(out), []byte("tcx")) {
					t.Errorf("node %d still has programs:\n%s", n, out)
				}
			}
		} else if b.fast == nil {
			b.hasten()
			b.reach()
		}
		run := func() {
			transfer("out, "+tt.what, c, far)
			transfer("in, "+tt.what, far, c)
		}
		if !tt.fast {
			run()
			continue
		}
		if got := b.took(3, run); got.Forwarded < 100 || got.Wrapped < 100 {
			t.Errorf("%s: the gateway took %+v", tt.what, got)
		}
	}
}

// Nobody writes any more: first the programs leave all to the tables, and then those drop it.
func TestTheFastPathsPermitEndsByItself(t *testing.T) {
	b := newBlockSite(t, fastSides(t))
	b.ext.serve(b.f.server)
	eventually(t, "the pod does not get out", func() bool { return b.pods["a"].seenAtOnce(b.f.server) == b.f.egress })
	flow := b.pods["a"].open(b.f.server) // one: each takes a port of the block
	ask := func() (got string, by fastpath.Steps) {
		by = b.took(3, func() { got = flow.seen(300 * time.Millisecond) })
		return got, by
	}
	const d = 2 * time.Second
	earliest := time.Now().Add(d)
	b.permitFast(3, d) // the tables have an hour
	ended := time.Now().Add(d)
	eventually(t, "the programs go on", func() bool {
		asked := time.Now()
		got, by := ask()
		if by.Forwarded > 0 && asked.After(ended) {
			t.Fatalf("taken %v after the permit", asked.Sub(ended))
		}
		return by.Forwarded == 0 && got == b.f.egress
	})
	if time.Now().Before(earliest) {
		t.Errorf("the programs ended %v early", time.Until(earliest))
	}
	if err := b.nodes[3].tables.Permit([]Permit{{b.f.egressIP(), true}}, d); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the tables go on", func() bool { got, _ := ask(); return got == "" })
	if got, by := ask(); got != "" || by.Forwarded != 0 {
		t.Errorf("source %q, %+v, after all permits", got, by)
	}
	// A process that was frozen while it wrote: its end is over.
	if err := b.fast[3].Permit([]netip.Addr{b.f.egressIP()}, ended); err != nil {
		t.Fatal(err)
	}
	if got, by := ask(); got != "" || by.Forwarded != 0 {
		t.Errorf("source %q, %+v, by a permit that was over when it was written", got, by)
	}
}

// onWire is a socket for whole frames on eth0 of a namespace.
func (s space) onWire() (send func(frame []byte), mac func(of space) net.HardwareAddr) {
	s.t.Helper()
	var c *packet.Conn
	s.do(func() error {
		ifi, err := net.InterfaceByName("eth0")
		if err == nil {
			c, err = packet.Listen(ifi, packet.Raw, unix.ETH_P_IP, nil)
		}
		return err
	})
	s.t.Cleanup(func() { c.Close() })
	return func(frame []byte) {
			s.t.Helper()
			if _, err := c.WriteTo(frame, &packet.Addr{HardwareAddr: frame[:6]}); err != nil {
				s.t.Fatal(err)
			}
		}, func(of space) (mac net.HardwareAddr) {
			of.do(func() error {
				ifi, err := net.InterfaceByName("eth0")
				if err == nil {
					mac = ifi.HardwareAddr
				}
				return err
			})
			return mac
		}
}

// frame is an Ethernet frame around an IPv4 packet.
func frame(to, from net.HardwareAddr, p []byte) []byte {
	return slices.Concat(to, from, []byte{8, 0}, p)
}

// resum gives an IPv4 packet its checksum.
func resum(p []byte) []byte {
	p[10], p[11] = 0, 0
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(p[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(p[10:], ^uint16(sum))
	return p
}

// A neighbour on the LAN writes frames by hand. What the programs take is what the tables would have taken; the right
// frame is taken, so that those which differ from it in one thing would be.
func TestTheFastPathTakesNoForgedFrame(t *testing.T) {
	b := newBlockSite(t, fastSides(t))
	b.ext.serve(b.f.server)
	eventually(t, "the pod does not get out", func() bool { return b.pods["a"].seenAtOnce(b.f.server) == b.f.egress })
	send, macOf := b.ext.onWire()
	gateway, me := macOf(b.nodes[3].space), macOf(b.ext)
	b.nodes[3].run("ip link set eth0 promisc on")
	b.nodes[3].run("ip link set eth0 allmulticast on")
	self, node1, node2, server := b.underlay(3), b.underlay(1), b.underlay(2), netip.MustParseAddr(b.f.server)
	right := inner{node: node1, to: self, pod: b.f.egressIP(), id: blockID, port: b.block(1).First + 7}
	outer := func(from netip.Addr, vxlan []byte) []byte {
		p := datagram(netip.AddrPortFrom(from, 40000), netip.AddrPortFrom(self, uint16(egress.OverlayPort)), vxlan)
		p[26], p[27] = 0, 0 // without a checksum, as the overlay has it
		return p
	}
	with := func(p []byte, change func(p []byte)) []byte {
		p = slices.Clone(p)
		change(p)
		return p
	}
	const inIP = 28 + 8 + 14 // the IP header inside, in the outer packet
	good := outer(node1, right.vxlan(b.f.server))
	as := func(change func(*inner)) []byte {
		i := right
		change(&i)
		return outer(node1, i.vxlan(b.f.server))
	}
	back := datagram(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(b.f.egressIP(), b.block(1).First+7), []byte("back"))
	from := func(ip string) []byte {
		return datagram(netip.AddrPortFrom(netip.MustParseAddr(ip), 7000), netip.AddrPortFrom(b.f.egressIP(), b.block(1).First+7), []byte("back"))
	}
	vlan := func(p []byte) []byte { return slices.Concat(gateway, me, []byte{0x81, 0, 0, 100, 8, 0}, p) }
	other := net.HardwareAddr{2, 1, 1, 1, 1, 1}
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for _, tt := range []struct {
		name  string
		frame []byte
		want  fastpath.Steps
	}{
		{"the right one", frame(gateway, me, good), fastpath.Steps{Forwarded: 1}},
		{"the right one without an id", frame(gateway, me, as(func(i *inner) { i.plain, i.id = true, 0 })), fastpath.Steps{Forwarded: 1}},
		{"of another node's address", frame(gateway, me, outer(node2, right.vxlan(b.f.server))), fastpath.Steps{}},
		{"of nobody's address", frame(gateway, me, outer(netip.MustParseAddr("10.10.0.77"), right.vxlan(b.f.server))), fastpath.Steps{}},
		{"of an address that the link does not lead to", frame(gateway, me, outer(netip.MustParseAddr("127.0.0.1"), right.vxlan(b.f.server))), fastpath.Steps{}},
		{"of a node, with another's block", frame(gateway, me, as(func(i *inner) { i.port = b.block(2).First })), fastpath.Steps{Unwrapped: 1}},
		{"of a node, with the gateway's own block", frame(gateway, me, as(func(i *inner) { i.port = b.block(3).First })), fastpath.Steps{Unwrapped: 1}},
		{"of a node, with a port of no block", frame(gateway, me, as(func(i *inner) { i.port = 1024 })), fastpath.Steps{Unwrapped: 1}},
		{"of a node, the port after its block", frame(gateway, me, as(func(i *inner) { i.port = b.block(1).Last() + 1 })), fastpath.Steps{Unwrapped: 1}},
		{"of a node, with a source that is no egress IP", frame(gateway, me, as(func(i *inner) { i.pod = netip.MustParseAddr("10.10.0.66") })), fastpath.Steps{Unwrapped: 1}},
		{"with a routing mark for an id", frame(gateway, me, with(as(func(i *inner) { i.plain = true }), func(p []byte) {
			p[30], p[31] = 0x3f, 0xff
		})), fastpath.Steps{}},
		{"of another VNI", frame(gateway, me, with(good, func(p []byte) { p[34] = 8 })), fastpath.Steps{}},
		{"with a checksum in the outer header", frame(gateway, me, with(good, func(p []byte) { p[26], p[27] = 1, 1 })), fastpath.Steps{}},
		{"for another node's overlay link", frame(gateway, me, as(func(i *inner) { i.to = node2 })), fastpath.Steps{}},
		{"with congestion told on the way", frame(gateway, me, with(good, func(p []byte) { p[1] = 3; resum(p) })), fastpath.Steps{}},
		{"with a wrong checksum inside", frame(gateway, me, with(good, func(p []byte) { p[inIP+10]++ })), fastpath.Steps{Unwrapped: 1}},
		{"with a wrong checksum outside", frame(gateway, me, with(good, func(p []byte) { p[10]++ })), fastpath.Steps{}},
		{"with its last hop", frame(gateway, me, with(good, func(p []byte) { p[inIP+8] = 1; resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"longer than it is", frame(gateway, me, with(good, func(p []byte) { p[inIP+3] += 8; resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"shorter than it is", frame(gateway, me, with(good, func(p []byte) { p[inIP+3]--; resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"a fragment inside", frame(gateway, me, with(good, func(p []byte) { p[inIP+6] = 0x20; resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"a fragment outside", frame(gateway, me, with(good, func(p []byte) { p[6] = 0x20; resum(p) })), fastpath.Steps{}},
		{"of a protocol without ports", frame(gateway, me, with(good, func(p []byte) { p[inIP+9] = 47; resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"to the gateway itself", frame(gateway, me, with(good, func(p []byte) { copy(p[inIP+16:], self.AsSlice()); resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"to a loopback address", frame(gateway, me, with(good, func(p []byte) { copy(p[inIP+16:], []byte{127, 0, 0, 1}); resum(p[inIP:]) })), fastpath.Steps{Unwrapped: 1}},
		{"for another MAC address", frame(other, me, good), fastpath.Steps{}},
		{"to all, which the kernel and the tables take as well", frame(all, me, good), fastpath.Steps{Forwarded: 1}},
		{"in a VLAN", vlan(good), fastpath.Steps{}},

		{"back: the right one", frame(gateway, me, back), fastpath.Steps{Wrapped: 1}},
		{"back: padded", frame(gateway, me, append(slices.Clone(back), make([]byte, 14)...)), fastpath.Steps{Wrapped: 1}},
		{"back: for another MAC address", frame(other, me, back), fastpath.Steps{}},
		{"back: in a VLAN", vlan(back), fastpath.Steps{}},
		{"back: to a port of no block", frame(gateway, me, datagram(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(b.f.egressIP(), 1024), nil)), fastpath.Steps{}},
		{"back: from this host", frame(gateway, me, from("127.0.0.1")), fastpath.Steps{}},
		{"back: from the gateway", frame(gateway, me, from("10.10.0.103")), fastpath.Steps{}},
		{"back: from the egress IP", frame(gateway, me, from(b.f.egress)), fastpath.Steps{}},
		{"back: from nowhere", frame(gateway, me, from("0.0.0.0")), fastpath.Steps{}},
		{"back: from a group", frame(gateway, me, from("224.0.0.5")), fastpath.Steps{}},
		{"back: from an address behind another link", frame(gateway, me, from("198.51.100.7")), fastpath.Steps{}},
		{"back: a SYN", frame(gateway, me, syn(netip.AddrPortFrom(server, 7000), netip.AddrPortFrom(b.f.egressIP(), b.block(1).First+7))), fastpath.Steps{}},
	} {
		if tt.name == "back: from an address behind another link" {
			b.nodes[3].run("ip link add behind type veth peer name behind1\nip link set behind1 up\nip link set behind up\nip route add 198.51.100.0/24 dev behind")
		}
		got := b.took(3, func() { b.settled(3, func() { send(tt.frame) }) })
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
	// The permit goes: the tables drop and count it.
	b.permitFast(3, 0)
	if err := b.nodes[3].tables.Revoke(b.f.egressIP()); err != nil {
		t.Fatal(err)
	}
	counts(t, b.nodes[3].tables, CounterGuard, func() {
		if got := b.took(3, func() { b.settled(3, func() { send(frame(gateway, me, good)) }) }); got.Forwarded != 0 {
			t.Errorf("without a permit: %+v", got)
		}
	})
}

// settled runs f, which sends a frame to a node, and waits until that has seen it, and what it made of it.
func (b *blockSite) settled(n int, f func()) {
	b.t.Helper()
	f()
	// It is answered after whatever came before it by the same link.
	if !b.ext.ok(fmt.Sprintf("ping -c1 -w5 %s", b.underlay(n))) {
		b.t.Fatalf("node %d does not answer", n)
	}
}

// syn is the first packet of a TCP connection.
func syn(from, to netip.AddrPort) []byte {
	p := datagram(from, to, make([]byte, 12))
	p[9] = unix.IPPROTO_TCP
	p[32], p[33] = 0x50, 2
	return resum(p)
}
