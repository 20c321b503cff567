package inject

import (
	"encoding/binary"
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// frame returns the packet in an Ethernet frame from the pod to its node.
func (p Packet) frame(node, pod net.HardwareAddr) ([]byte, error) {
	payload, err := p.payload()
	if err != nil {
		return nil, err
	}
	b := append(append([]byte{}, node...), pod...)
	if p.From.Is4() {
		ip := make([]byte, 20)
		ip[0], ip[6], ip[8], ip[9] = 0x45, 0x40, 64, p.Protocol // DF, TTL
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(payload)))
		copy(ip[12:], p.From.AsSlice())
		copy(ip[16:], p.To.AsSlice())
		binary.BigEndian.PutUint16(ip[10:], checksum(ip))
		b = append(binary.BigEndian.AppendUint16(b, unix.ETH_P_IP), ip...)
	} else {
		ip := make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, p.Protocol, 64
		binary.BigEndian.PutUint16(ip[4:], uint16(len(payload)))
		copy(ip[8:], p.From.AsSlice())
		copy(ip[24:], p.To.AsSlice())
		b = append(binary.BigEndian.AppendUint16(b, unix.ETH_P_IPV6), ip...)
	}
	return append(b, payload...), nil
}

// payload returns what is behind the IP header.
func (p Packet) payload() (b []byte, err error) {
	sum := 0 // where the checksum is
	switch p.Protocol {
	case unix.IPPROTO_TCP:
		b = make([]byte, 20)
		binary.BigEndian.PutUint16(b, p.FromPort)
		binary.BigEndian.PutUint16(b[2:], p.Port)
		binary.BigEndian.PutUint32(b[4:], uint32(p.FromPort)<<16) // sequence number
		b[12], b[13], sum = 5<<4, 0x02, 16                        // header of 5 words, SYN
		binary.BigEndian.PutUint16(b[14:], 64240)                 // window
	case unix.IPPROTO_UDP:
		b, sum = make([]byte, 8), 6
		binary.BigEndian.PutUint16(b, p.FromPort)
		binary.BigEndian.PutUint16(b[2:], p.Port)
		b[5] = 8 // length
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		b, sum = make([]byte, 8), 2
		if b[0] = 8; p.From.Is6() {
			b[0] = 128 // echo request
		}
		binary.BigEndian.PutUint16(b[4:], p.FromPort)
		b[7] = 1 // sequence number
	default:
		return nil, fmt.Errorf("protocol %d: want TCP, UDP or ICMP", p.Protocol)
	}
	var pseudo []byte // header
	if p.Protocol != unix.IPPROTO_ICMP {
		pseudo = append(append(p.From.AsSlice(), p.To.AsSlice()...), 0, byte(len(b)), 0, p.Protocol)
	}
	binary.BigEndian.PutUint16(b[sum:], checksum(append(pseudo, b...)))
	return b, nil
}

// checksum is that of IP, TCP, UDP and ICMP (RFC 1071), of an even number of bytes.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	if out := ^uint16(sum); out != 0 {
		return out
	}
	return 0xffff // of UDP, 0 is none
}
