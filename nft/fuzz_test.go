package nft

import (
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Whatever the kernel, or who writes into the agent's socket, says: no more than an error comes of it.
func FuzzDecode(f *testing.F) {
	for _, b := range [][]byte{nil, {4, 0, 1, 0}, {3, 0, 1, 0}, {8, 0, 1, 0, 0, 0, 0, 7}, {12, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 0, 1}, {255, 255, 1, 0}, {5, 0, 2, 0, 1}} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, err := decodeElement(b); err == nil && len(e.key)+len(e.value) > len(b) {
			t.Errorf("%x says %+v", b, e)
		}
		if v, err := decodeLimit(b); err == nil && v != "" && len(v) != len(limitValue(0, 0)) {
			t.Errorf("%x is the limit %x", b, v)
		}
		a, _ := decode(b) // what was read until an error
		for typ := range a {
			_, _ = a.uint32(typ), a.string(typ)
		}
	})
}

// An event of a trace has the headers of a packet, which a pod wrote: whatever is in them, and wherever they are cut
// off, ends are of one family or there are none.
func FuzzTrace(f *testing.F) {
	attribute := func(typ byte, value ...byte) []byte {
		b := append([]byte{byte(4 + len(value)), 0, typ, 0}, value...)
		return append(b, make([]byte, -len(value)&3)...)
	}
	ip4 := append([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, 10, 0, 0, 1, 10, 0, 0, 2)
	ip6 := append([]byte{0x60, 0, 0, 0, 0, 8, unix.IPPROTO_ICMPV6, 64}, make([]byte, 32)...)
	udp := []byte{0, 1, 0, 2, 0, 8, 0, 0}
	policy := attribute(unix.NFTA_TRACE_POLICY, 0, 0, 0, 1)
	for _, parts := range [][][]byte{
		nil, {{2, 0, 0, 0}}, {{2, 0, 0, 0}, attribute(unix.NFTA_TRACE_NETWORK_HEADER, ip4...), attribute(unix.NFTA_TRACE_TRANSPORT_HEADER, udp...), policy},
		{{10, 0, 0, 0}, attribute(unix.NFTA_TRACE_NETWORK_HEADER, ip6...), attribute(unix.NFTA_TRACE_TRANSPORT_HEADER, 128, 0, 0, 0, 0, 7, 0, 0), policy},
		{{1, 0, 0, 0}, attribute(unix.NFTA_TRACE_NETWORK_HEADER, ip6[:39]...), attribute(unix.NFTA_TRACE_VERDICT, 8, 0, 1, 0, 0, 0, 0, 1)},
	} {
		var b []byte
		for _, p := range parts {
			b = append(b, p...)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_TRACE}, Data: b}
		e, ok := decodeTrace(m)
		if from, to := e.Ends.From, e.Ends.To; from.IsValid() != to.IsValid() || from.Is4() != to.Is4() || !from.IsValid() && e.Ends.FromPort != 0 {
			t.Errorf("%x says, %v: %+v", b, ok, e)
		}
	})
}
