package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// tooBig is an ICMP error that says that a packet which begins with quote does not fit a link of mtu.
func tooBig(from, to netip.Addr, mtu int, quote []byte) []byte {
	kind, head := []byte{3, 4}, []byte(nil) // what else the checksum is of
	protocol := byte(unix.IPPROTO_ICMP)
	if from.Is6() {
		kind, protocol = []byte{2, 0}, unix.IPPROTO_ICMPV6
		head = binary.BigEndian.AppendUint32(append(from.AsSlice(), to.AsSlice()...), uint32(8+len(quote)))
		head = append(head, 0, 0, 0, protocol)
	}
	icmp := append([]byte{kind[0], kind[1], 0, 0, 0, 0, byte(mtu >> 8), byte(mtu)}, quote...)
	binary.BigEndian.PutUint16(icmp[2:], checksum(head, icmp))
	return packetOf(from, to, protocol, icmp)
}

// A pod says to its node that the way to another one takes less than it does. The kernel looks at no more than that the
// overlay has such a socket, and of other protocols at nothing. It does not hear of it; a router and the other node are
// heard.
func TestAPodMakesNoWayBetweenNodesNarrow(t *testing.T) {
	for i, f := range bothSides {
		ends := [][2]string{{"10.11.0.101", "10.11.0.102"}, {"fd11::101", "fd11::102"}}[i]
		t.Run(f.pod, func(t *testing.T) {
			testNarrow(t, f, netip.MustParseAddr(ends[0]), netip.MustParseAddr(ends[1]))
		})
	}
}

func testNarrow(t *testing.T, f sides, here, there netip.Addr) {
	const mtu = 1280
	known, unknown := netip.MustParseAddr("10.244.1.8"), netip.MustParseAddr("10.244.1.9")
	if here.Is6() {
		known, unknown = netip.MustParseAddr("fd44:1::8"), netip.MustParseAddr("fd44:1::9")
	}
	tables := open(t)
	ext, p := outside(t), pod(t)
	ext.serve(f.server)
	gw := remoteGateway(t, ext, here, there)
	far := gw.tables()
	reach(t, tables, parseState(t, fmt.Sprintf("mtu 1430\nself %s\nnode %s\nexcept %s\nknown %s\npodcidr %s\n", here, there, f.pods, known, netip.PrefixFrom(unknown, unknown.BitLen()))+f.atPod(5, there)))
	reach(t, far, parseState(t, fmt.Sprintf("mtu 1430\nself %s\nnode %s\nexcept %s\n", there, here, f.pods)+f.atGateway(5, here)))
	if err := far.Permit([]Permit{{IP: f.egressIP()}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	var s net.PacketConn
	ext.do(func() (err error) { s, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7010")); return err })
	defer s.Close()
	large := func() bool {
		p.do(func() error { return udp(netip.Addr{}, netip.MustParseAddr(f.server), 7010, make([]byte, 1350)) })
		if err := s.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		n, _, err := s.ReadFrom(make([]byte, 3000))
		return err == nil && n == 1350
	}
	if !large() {
		t.Fatal("a large datagram does not arrive")
	}
	narrow := func() bool {
		return strings.Contains(netns.Run(t, "ip route get "+there.String()), fmt.Sprint("mtu ", mtu))
	}
	router, link := here.Next().Next(), netip.MustParseAddr("fe80::7")
	frame := inner{node: here, to: there, pod: f.overlaySource(5), id: 5}
	overlay := datagram(netip.AddrPortFrom(here, 40000), netip.AddrPortFrom(there, egress.OverlayPort), frame.vxlan(f.server))
	echo := f.echo(here, there, 1, true, "reply")
	for _, a := range []struct {
		name string
		from netip.Addr
	}{
		{"its own address", netip.MustParseAddr(f.pod)},
		{"that of a pod that no egress selects", known},
		{"that of a pod that is not known", unknown},
		{"the other node's", there},
		{"a router's", router},
		{"one of the link", link},
	} {
		if a.from.Is6() != here.Is6() {
			continue
		}
		for what, quote := range map[string][]byte{"VXLAN": overlay, "an echo reply": echo} {
			counts(t, tables, CounterForged, func() {
				p.do(func() error { return sendRaw(tooBig(a.from, here, mtu, quote), here) })
				if narrow() {
					t.Errorf("a pod with %s is heard, about %s", a.name, what)
				}
			})
		}
	}
	if !large() {
		t.Error("a large datagram does not arrive after a pod has said that it is too large")
	}
	for name, from := range map[string]netip.Addr{"the other node": there, "a router": router} {
		gw.do(func() error { return sendRaw(tooBig(from, here, mtu, overlay), here) })
		eventually(t, name+" is not heard", narrow)
		netns.Run(t, "ip route flush cache")
		netns.Run(t, "ip -6 route flush cache")
	}
}
