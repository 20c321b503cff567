package conntrack

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Connection is what an entry says.
type Connection struct {
	// Source is who opened the connection, before any translation. Destination is who answers it: after the DNAT of a Service.
	// Translated is whom that one answers: after any SNAT.
	Source, Destination, Translated netip.Addr
	// Port is the port at Translated, or the identifier of an ICMP echo; 0: the protocol has none.
	Port uint16
	Mark egress.Mark
	// Protocol is that of IP, and DestinationPort the port at Destination; 0: the protocol has none.
	Protocol        uint8
	DestinationPort uint16
	// Ended says that it is one of TCP that has ended, and is remembered for some time: in TIME_WAIT or CLOSE.
	Ended bool
}

// Filter says which entries are meant. What is zero in it says nothing; the zero Filter means all.
type Filter struct {
	// Source, Destination and Translated are those of Connection, of one IP family.
	Source, Destination, Translated netip.Addr
	// Mark is what the bits of Mask in the mark of the connection are.
	Mark, Mask egress.Mark
}

func (f Filter) matches(c Connection) bool {
	is := func(want, have netip.Addr) bool { return !want.IsValid() || want == have }
	return is(f.Source, c.Source) && is(f.Destination, c.Destination) && is(f.Translated, c.Translated) && c.Mark&f.Mask == f.Mark
}

// families are the families of which there may be such entries.
func (f Filter) families() []byte {
	for _, a := range []netip.Addr{f.Source, f.Destination, f.Translated} {
		if a.Is4() {
			return []byte{unix.AF_INET}
		} else if a.IsValid() {
			return []byte{unix.AF_INET6}
		}
	}
	return []byte{unix.AF_INET, unix.AF_INET6}
}

func (f Filter) hasAddress() bool {
	return f.Source.IsValid() || f.Destination.IsValid() || f.Translated.IsValid()
}
