package egress

import (
	"crypto/sha256"
	"net"
	"net/netip"
	"strconv"
)

// Primary returns the first of the node's addresses of the family of like, its overlay endpoint. ok is false when it
// has none.
func (n Node) Primary(like netip.Addr) (ip netip.Addr, ok bool) {
	for _, a := range n.Addresses {
		if a.Is4() == like.Is4() {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// OverlayMAC returns the MAC address of the overlay link of the node whose overlay endpoint is ip: locally
// administered, the same wherever it is computed, so that an FDB entry depends on nothing but the node's record.
func OverlayMAC(ip netip.Addr) net.HardwareAddr {
	b := ip.As16()
	h := sha256.Sum256(b[:])
	return net.HardwareAddr{0x02, 0xe9, h[0], h[1], h[2], h[3]}
}

// VLANLink returns the name of the link of a VLAN id.
func VLANLink(id int) string { return VLANLinkPrefix + strconv.Itoa(id) }

// VLANMAC returns the MAC address of the link of a VLAN id on the node whose overlay endpoint is ip: locally
// administered, and another on every node and link.
func VLANMAC(ip netip.Addr, id int) net.HardwareAddr {
	b := ip.As16()
	h := sha256.Sum256(append(b[:], VLANLink(id)...))
	return net.HardwareAddr{0x02, 0xea, h[0], h[1], h[2], h[3]}
}

// OverlayLinkLocal returns the IPv6 link-local address of the overlay link of the node whose overlay endpoint is ip
// (RFC 4291, appendix A, from OverlayMAC): that link needs one to pass IPv6.
func OverlayLinkLocal(ip netip.Addr) netip.Addr {
	m := OverlayMAC(ip)
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
}

// The prefixes of OverlaySource. The former are addresses that nobody has (RFC 1122, section 3.2.1.3; Linux passes them
// since 5.3), the latter are of one site (RFC 4193).
var (
	OverlaySources4 = netip.MustParsePrefix("0.0.0.0/8")
	OverlaySources6 = netip.MustParsePrefix("fd65:6772:6574::/96")
)

// OverlaySource returns the source address, of the family of like, that a packet of id has in the overlay where the
// node with the index has no port of the egress IP for it: the gateway translates it once more, and knows by the
// address which node its answers go to. The id keeps connections of two egress IPs apart: of an IPv4 address it has 8
// bits.
func OverlaySource(index int, id ID, like netip.Addr) netip.Addr {
	if like.Is4() {
		return netip.AddrFrom4([4]byte{0, byte(id), byte(index >> 8), byte(index)})
	}
	b := OverlaySources6.Addr().As16()
	b[12], b[13], b[14], b[15] = byte(id>>8), byte(id), byte(index>>8), byte(index)
	return netip.AddrFrom16(b)
}

// IndexOfSource returns the index of the node that an OverlaySource is of. ok is false for any other address.
func IndexOfSource(ip netip.Addr) (index int, ok bool) {
	if !OverlaySources4.Contains(ip) && !OverlaySources6.Contains(ip) {
		return 0, false
	}
	b := ip.AsSlice()
	return int(b[len(b)-2])<<8 | int(b[len(b)-1]), true
}
