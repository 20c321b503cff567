package conntrack

import (
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Connection is what an entry says.
type Connection struct {
	// Source is who opened the connection, before any translation. Destination is who answers it: after the DNAT of a
	// Service. Translated is whom that one answers: after any SNAT.
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

// Flow is what an entry says at a time, with all that is for a log of it.
type Flow struct {
	Connection
	// ID is the number of the entry; with the rest that does not change it tells it from others, also from a later one
	// of the same ends.
	ID uint32
	// SourcePort is the port at Source, before any translation, or the identifier of an ICMP echo; 0: the protocol has
	// none.
	SourcePort uint16
	Replied    bool // the destination has answered
	// Counted says that Sent, by the source, and Received are known: the kernel counts them with
	// net.netfilter.nf_conntrack_acct=1 alone.
	Counted        bool
	Sent, Received Count
	// Start and Stop are when the connection began and ended, by the kernel, with
	// net.netfilter.nf_conntrack_timestamp=1; else zero. The event of a beginning has neither.
	Start, Stop time.Time
}

// Count is how much passed in a direction, from the IP header on.
type Count struct{ Packets, Bytes uint64 }

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
