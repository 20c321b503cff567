package conntrack

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Connection is what an entry says.
type Connection struct {
	// Source is who opened the connection, before any translation. Destination is who answers it: after the DNAT of a Service.
	// Translated is whom that one answers: after any SNAT.
	Source, Destination, Translated netip.Addr
	Mark                            egress.Mark
}

// dumps is how often a listing that was interrupted, because the table changed, is begun anew.
const dumps = 20

// Delete deletes the entries, of both IP families, that match says yes to, in the network namespace of the calling thread. It reads the
// whole table; an entry that comes meanwhile may be missed. No such entry, or one that ends meanwhile, is no error. Delete goes on after
// an error and returns all of them, joined.
func Delete(match func(Connection) bool) error {
	var errs []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		for n := 1; ; n++ {
			// An interrupted listing may lack entries: what it had is deleted, and the rest is found the next time.
			_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, filter(match))
			if errors.Is(err, netlink.ErrDumpInterrupted) && n < dumps {
				continue
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("deleting connections: %w", err))
			}
			break
		}
	}
	return errors.Join(errs...)
}

// filter is what the library asks about each entry.
type filter func(Connection) bool

// MatchConntrackFlow reports whether the entry is to be deleted.
func (f filter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return f(Connection{addrOf(flow.Forward.SrcIP), addrOf(flow.Reverse.SrcIP), addrOf(flow.Reverse.DstIP), egress.Mark(flow.Mark)})
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
