package crdsync

import "github.com/egret-project/egret/egress"

// freePorts says which ports of an egress IP are free: those of slots that are false. A slot is egress.MinBlock ports:
// no block begins or ends within one.
type freePorts [(1 << 16) / egress.MinBlock]bool

// newFreePorts returns those of an IP without blocks: all ports from egress.FirstBlockPort on.
func newFreePorts() *freePorts {
	r := &freePorts{}
	r.take(0, egress.FirstBlockPort)
	return r
}

// take takes some ports, whether they are free or not. Of a slot that is touched, all ports are taken.
func (r *freePorts) take(first uint16, size int) {
	for slot := int(first) / egress.MinBlock; slot*egress.MinBlock < int(first)+size && slot < len(r); slot++ {
		r[slot] = true
	}
}

// place returns the first port of a free block of a size, which is a power of two from egress.MinBlock to
// egress.MaxBlock. Blocks are those of a buddy system: each is aligned to its size, and two neighbours that are the
// halves of a larger one are one when both are free. The block is of the smallest free one that holds it, of the lowest
// such: large ones are kept whole for as long as that can be. ok is false where there is none.
func (r *freePorts) place(size int) (first uint16, ok bool) {
	best := len(r) + 1
	at := 0
	r.holes(0, len(r), func(slot, slots int) {
		if slots*egress.MinBlock >= size && (slots < best || slots == best && slot < at) {
			best, at = slots, slot
		}
	})
	return uint16(at * egress.MinBlock), best <= len(r)
}

// holes reports whether all of some slots are free, a power of two of them, and otherwise calls f with the largest free
// blocks among them.
func (r *freePorts) holes(slot, slots int, f func(slot, slots int)) bool {
	if slots == 1 {
		return !r[slot]
	}
	half := slots / 2
	low, high := r.holes(slot, half, f), r.holes(slot+half, half, f)
	switch {
	case low && high:
		return true
	case low:
		f(slot, half)
	case high:
		f(slot+half, half)
	}
	return false
}

// extent returns the largest block that may begin at a port, for a record of which only the first port is known. Where
// none may begin there, it is the slot of the port.
func extent(first uint16) (from uint16, size int) {
	size = egress.MaxBlock
	for int(first)%size != 0 {
		size /= 2
	}
	if size < egress.MinBlock {
		return first / egress.MinBlock * egress.MinBlock, egress.MinBlock
	}
	return first, size
}
