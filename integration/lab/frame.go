package lab

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

const ethernetHeader = 14

// parseARP reads an ARP packet for IPv4 over Ethernet (RFC 826); ok is false for every other frame.
func parseARP(frame []byte) (a ARP, ok bool) {
	if etherType(frame) != unix.ETH_P_ARP || len(frame) < ethernetHeader+28 {
		return ARP{}, false
	}
	b := frame[ethernetHeader:]
	if binary.BigEndian.Uint16(b) != 1 || binary.BigEndian.Uint16(b[2:]) != unix.ETH_P_IP || b[4] != 6 || b[5] != 4 {
		return ARP{}, false
	}
	return ARP{
		Operation: binary.BigEndian.Uint16(b[6:]),
		SenderMAC: [6]byte(b[8:]),
		SenderIP:  netip.AddrFrom4([4]byte(b[14:])),
		TargetIP:  netip.AddrFrom4([4]byte(b[24:])),
	}, true
}

// parseNDP reads a neighbor solicitation or advertisement (RFC 4861, sections 4.3 and 4.4); ok is false for every other
// frame.
func parseNDP(frame []byte) (n NDP, ok bool) {
	const header = 40
	if etherType(frame) != unix.ETH_P_IPV6 || len(frame) < ethernetHeader+header+24 {
		return NDP{}, false
	}
	ip, icmp := frame[ethernetHeader:], frame[ethernetHeader+header:]
	if ip[6] != unix.IPPROTO_ICMPV6 {
		return NDP{}, false
	}
	n = NDP{Type: icmp[0], MAC: [6]byte(frame[6:])}
	switch n.Type {
	case neighborSolicitation:
		n.IP = netip.AddrFrom16([16]byte(ip[8:]))
	case neighborAdvertisement:
		n.IP = netip.AddrFrom16([16]byte(icmp[8:]))
	default:
		return NDP{}, false
	}
	return n, true
}

// The types of ICMPv6 that tell a link-layer address (RFC 4861, section 4).
const (
	neighborSolicitation  = 135
	neighborAdvertisement = 136
)

// parsePacket reads the headers of an IPv4 (RFC 791) or IPv6 (RFC 8200) packet; ok is false for every other frame.
func parsePacket(frame []byte) (p Packet, ok bool) {
	var transport []byte
	first := true // the fragment with the transport header
	switch etherType(frame) {
	case unix.ETH_P_IP:
		b := frame[ethernetHeader:]
		if len(b) < 20 {
			return Packet{}, false
		}
		p.Protocol, p.Src, p.Dst = b[9], netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		first = binary.BigEndian.Uint16(b[6:])&0x1fff == 0
		transport = b[min(len(b), int(b[0]&15)*4):]
	case unix.ETH_P_IPV6:
		b := frame[ethernetHeader:]
		if len(b) < 40 {
			return Packet{}, false
		}
		p.Protocol, p.Src, p.Dst = b[6], netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		transport = b[40:]
	default:
		return Packet{}, false
	}
	p.SrcMAC = [6]byte(frame[6:])
	if first && len(transport) >= 4 && (p.Protocol == unix.IPPROTO_TCP || p.Protocol == unix.IPPROTO_UDP) {
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
	}
	// RFC 9293, section 3.1
	p.Reset = first && len(transport) >= 14 && p.Protocol == unix.IPPROTO_TCP && transport[13]&4 != 0
	return p, true
}

func etherType(frame []byte) uint16 {
	if len(frame) < ethernetHeader {
		return 0
	}
	return binary.BigEndian.Uint16(frame[12:])
}
