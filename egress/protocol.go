package egress

import (
	"fmt"
	"net/netip"
	"strconv"
)

// Protocols are the names of those whose packets can be followed (LiveQuestion).
var Protocols = []string{"tcp", "udp", "icmp"}

// ProtocolNames is what Protocol takes, in words.
const ProtocolNames = "tcp, udp, sctp, icmp, gre, esp, ah, or a number from 1 to 255"

// Protocol returns the number of a protocol over IP that a user names, toward an address: icmp is another one toward an
// IPv6 address than toward an IPv4 one.
func Protocol(name string, to netip.Addr) (byte, error) {
	switch name {
	case "icmp":
		if to.Is4() {
			return 1, nil
		}
		return 58, nil
	case "tcp":
		return 6, nil
	case "udp":
		return 17, nil
	case "sctp":
		return 132, nil
	case "gre":
		return 47, nil
	case "esp":
		return 50, nil
	case "ah":
		return 51, nil
	}
	n, err := strconv.ParseUint(name, 10, 8)
	if err != nil || n == 0 {
		return 0, fmt.Errorf("%.50q: want %s", name, ProtocolNames)
	}
	return byte(n), nil
}

// HasPorts reports whether packets of a protocol toward an address have ports, or identifiers as those of ICMP echoes,
// by which a block of ports (Block) serves their connections.
func HasPorts(protocol byte, to netip.Addr) bool {
	switch protocol {
	case 6, 17, 132:
		return true
	case 1:
		return to.Is4()
	case 58:
		return !to.Is4()
	}
	return false
}
