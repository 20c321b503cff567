package fastpath

import (
	"encoding/binary"
	"net/netip"

	"github.com/egret-project/egret/egress"
)

// State is what the programs work with. The zero State: none is attached. Its slices need no order, may hold
// duplicates, and are not changed.
type State struct {
	// Self is the overlay endpoint of this node. Where it is not IPv4, there is no fast path.
	Self netip.Addr
	// Overlay and Uplink are the indexes of the overlay link and of the link that carries Self, of Ethernet both; 0:
	// there is none, and no fast path.
	Overlay, Uplink int
	// MTU is that of the overlay link, bytes.
	MTU int
	// Nodes are the overlay endpoints of the other nodes.
	Nodes []netip.Addr
	// Ports are the blocks of other nodes at the egress IPs that leave this node by the uplink, without a limit.
	Ports []Port
}

// Port is a block of another node.
type Port struct {
	egress.Block
	Node netip.Addr // its overlay endpoint
}

// on reports whether there is a fast path.
func (s State) on() bool {
	return s.Self.Is4() && s.Overlay > 0 && s.Uplink > 0 && s.MTU > 0
}

// What follows is as fast.c has it.
type (
	conf struct {
		Self                 [4]byte
		Overlay, Uplink, MTU uint32
		MAC                  [6]byte
		_                    [2]byte
	}
	unit struct {
		IP   [4]byte
		Port uint16
		_    [2]byte
	}
	node struct {
		Underlay [4]byte
		MAC      [6]byte
		_        [2]byte
	}
	peer struct {
		Underlay [4]byte
		_        [4]byte
		Heard    uint64
	}
	count struct{ Sent, SentBytes, Received, ReceivedBytes uint64 }
)

// attachment is a program at a link.
type attachment struct {
	program string
	link    int
}

// contents is what the maps hold, and what is attached.
type contents struct {
	conf  conf
	at    map[attachment]bool
	units map[unit]node
	peers map[uint64][4]byte // by MAC address
	ips   map[[4]byte]bool   // that are counted
}

// contents returns what there is with a State.
func (s State) contents() contents {
	c := contents{at: map[attachment]bool{}, units: map[unit]node{}, peers: map[uint64][4]byte{}, ips: map[[4]byte]bool{}}
	if !s.on() {
		return c
	}
	c.conf = conf{
		Self: s.Self.As4(), Overlay: uint32(s.Overlay), Uplink: uint32(s.Uplink), MTU: uint32(s.MTU), MAC: macOf(s.Self),
	}
	c.at = map[attachment]bool{
		{"from_uplink", s.Uplink}: true, {"from_overlay", s.Overlay}: true, {"to_overlay", s.Overlay}: true,
	}
	for _, n := range s.Nodes {
		if n.Is4() {
			c.peers[macKey(n)] = n.As4()
		}
	}
	for _, p := range s.Ports {
		if !p.IP.Is4() || !p.Node.Is4() {
			continue
		}
		c.ips[p.IP.As4()] = true
		for n := 0; n < p.Size; n += egress.MinBlock {
			c.units[unit{IP: p.IP.As4(), Port: p.First + uint16(n)}] = node{Underlay: p.Node.As4(), MAC: macOf(p.Node)}
		}
	}
	return c
}

func macOf(n netip.Addr) [6]byte { return [6]byte(egress.OverlayMAC(n)) }

// macKey returns the MAC address of a node's overlay link as fast.c has it as a key.
func macKey(n netip.Addr) uint64 {
	m := macOf(n)
	return binary.LittleEndian.Uint64(append(m[:], 0, 0))
}
