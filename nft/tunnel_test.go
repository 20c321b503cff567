package nft

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/netns"
)

// A pod of another node writes VXLAN of the CNI, which asks nobody who he is, and in it a packet in the name of a pod that is selected here: the CNI's
// masquerade makes the outer one a node's. It does not leave with the egress IP, whatever rp_filter says; what comes so in the sender's own name goes on.
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
			counts(t, tables, CounterForged, func() {
				sneaks(t, "a pod of another node", ext, f, func() {
					write(netip.AddrPortFrom(netip.MustParseAddr(f.pod), 7003), netip.AddrPortFrom(netip.MustParseAddr(f.server), 7002))
				})
			})
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
