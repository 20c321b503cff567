package egress

import (
	"fmt"
	"math/bits"
	"net/netip"
	"time"
)

// Block is blocks/<ip>/<first>: ports of an egress IP, both of TCP and UDP, and ids of ICMP, that connections of one
// node's pods alone get as their source port. The record is there from when the block is given to the node until it has
// rested after that, so that no two nodes ever have one port. The Members of the node have a copy for as long as the
// node may use it.
type Block struct {
	IP    netip.Addr `json:"ip"`
	First uint16     `json:"first"` // the lowest port, a multiple of Size
	Size  int        `json:"size"`  // how many: a power of two, MinBlock to MaxBlock
	Node  string     `json:"node"`
	// Egress is of whose pods' connections the ports were when the node got them. Empty: an older crdsync did not say.
	Egress string    `json:"egress,omitempty"`
	Since  time.Time `json:"since"`
	// Retired says that no new connection is to get a port of it: the node says when the last one has ended
	// (PortUse.Drained).
	Retired bool `json:"retired,omitempty"`
	// Freed is since when the node has it no more. Zero: it has.
	Freed time.Time `json:"freed,omitzero"`
}

const (
	// MinBlock and MaxBlock bound Block.Size.
	MinBlock, MaxBlock = 64, 1 << 15
	// FirstBlockPort is the lowest port of all blocks. Those from StatefulPort up to it are for what has no block: the
	// gateway translates it.
	FirstBlockPort = 2048
	StatefulPort   = 1024
)

// Last returns the highest port of the block.
func (b Block) Last() uint16 { return b.First + uint16(b.Size-1) }

// Has reports whether the port of the IP is of the block.
func (b Block) Has(ip netip.Addr, port uint16) bool {
	return b.IP == ip && b.First <= port && port <= b.Last()
}

// Overlaps reports whether the two have a port of one IP in common.
func (b Block) Overlaps(o Block) bool {
	return b.IP == o.IP && b.First <= o.Last() && o.First <= b.Last()
}

// Current returns the block, of those of one node, that new connections by the IP get: the largest that is not on its
// way out.
func Current(blocks []Block, ip netip.Addr) (best Block, ok bool) {
	for _, b := range blocks {
		if b.IP == ip && !b.Retired && b.Fault() == nil && b.Size > best.Size {
			best, ok = b, true
		}
	}
	return best, ok
}

// Fault says what is wrong with the block; nil: it is one.
func (b Block) Fault() error {
	switch {
	case b.Size < MinBlock || b.Size > MaxBlock || bits.OnesCount(uint(b.Size)) != 1:
		return fmt.Errorf("block of %d ports: want a power of two from %d to %d", b.Size, MinBlock, MaxBlock)
	case int(b.First)%b.Size != 0 || b.First < FirstBlockPort:
		return fmt.Errorf("block of %d ports from %d: want a multiple of its size, %d or more", b.Size, b.First, FirstBlockPort)
	}
	return nil
}

// BlockTenure is blocks-history/<ip>/<first>/<until>-<since>: a block of ports was a node's from when to when. It is
// written in the transaction that deletes the record of the block, or that gives the ports to the node anew: up to then
// the record itself says so.
type BlockTenure struct {
	IP     netip.Addr `json:"ip"`
	First  uint16     `json:"first"`
	Size   int        `json:"size"`
	Node   string     `json:"node"`
	Egress string     `json:"egress,omitempty"` // as Block.Egress
	Since  time.Time  `json:"since"`
	Until  time.Time  `json:"until"` // Block.Freed
}

// Tenure returns what the history is to have of a block: that of one in use has no end yet.
func (b Block) Tenure() BlockTenure {
	return BlockTenure{IP: b.IP, First: b.First, Size: b.Size, Node: b.Node, Egress: b.Egress, Since: b.Since, Until: b.Freed}
}

// Has reports whether the port was the node's at a time, as far as the clock of the crdsync that wrote it goes. One
// without an end goes on.
func (t BlockTenure) Has(port uint16, at time.Time) bool {
	return t.Ports(port) && !at.Before(t.Since) && (t.Until.IsZero() || at.Before(t.Until))
}

// Ports reports whether the port is of the block.
func (t BlockTenure) Ports(port uint16) bool {
	return t.First <= port && int(port) < int(t.First)+t.Size
}

// PortUse is what a node's agent says of the ports of one egress IP.
type PortUse struct {
	// Want is the size of the largest block that the node asks for; 0: what it has is enough.
	Want int `json:"want,omitempty"`
	// Used is how many ports of its block were in use, to the busiest destination, when it asked for Want.
	Used int `json:"used,omitempty"`
	// Drained are the first ports of retired blocks of which no connection of the node has a port any more. It counts
	// where the record of the block is older than this one: what is said of a block that retires again has to be said
	// again.
	Drained []uint16 `json:"drained,omitempty"`
}
