package conntrack

import (
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	// dumps is how often a listing that was interrupted, because the table changed, is begun anew.
	dumps = 20
	// mostFilters is how many listings of a part cost less than one of the whole: for each the kernel looks at the
	// whole table, at a twentieth of what it costs to read it here.
	mostFilters = 16
	// receiveBuffer holds what the kernel has written of a listing and nobody has read yet.
	receiveBuffer = 1 << 20
)

// Delete deletes the entries that match says yes to, of those that one of the filters matches; without filters, of all
// of both IP families; in the network namespace of the calling thread. match is asked about each of them, now and then
// twice. An entry that comes meanwhile may be missed. No such entry, or one that ends meanwhile, is no error. Delete
// goes on after an error and returns all of them, joined.
//
// What the kernel cannot choose by itself is listed and then chosen here: addresses, of IPv4 before Linux 5.8, of IPv6
// also on Linux 6.18.
func Delete(match func(Connection) bool, filters ...Filter) error {
	t, err := open()
	if err != nil {
		return err
	}
	defer t.nl.Close()
	if len(filters) == 0 {
		filters = []Filter{{}}
	}
	var errs []error
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		var list []Filter
		for _, f := range filters {
			if slices.Contains(f.families(), family) {
				list = append(list, f)
			}
		}
		listings, err := listings(family, list)
		errs = append(errs, err)
		for _, f := range listings {
			errs = append(errs, t.delete(family, f, func(c Connection) bool {
				return slices.ContainsFunc(list, func(f Filter) bool { return f.matches(c) }) && match(c)
			}))
		}
	}
	return errors.Join(errs...)
}

// listings returns what the kernel is to be asked for, so that it lists what one of the filters matches.
func listings(family byte, filters []Filter) ([]Filter, error) {
	if !slices.ContainsFunc(filters, Filter.hasAddress) {
		return filters, nil
	}
	if len(filters) <= mostFilters {
		chooses, empty, err := choosesAddresses(family)
		switch {
		case err != nil || chooses && !empty:
			return filters, err
		case empty:
			return nil, nil
		}
	}
	one := Filter{Mark: filters[0].Mark, Mask: filters[0].Mask}
	for _, f := range filters {
		if f.Mark != one.Mark || f.Mask != one.Mask {
			one = Filter{}
		}
	}
	return []Filter{one}, nil
}

// table is the connection tracking table, by a socket.
type table struct{ nl *netlink.Conn }

// open returns the table of the network namespace of the calling thread.
func open() (table, error) {
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return table{}, fmt.Errorf("opening a conntrack socket: %w", err)
	}
	if err := c.SetReadBuffer(receiveBuffer); err != nil {
		c.Close()
		return table{}, fmt.Errorf("opening a conntrack socket: %w", err)
	}
	return table{c}, nil
}

// delete deletes what the kernel lists for the filter and match says yes to.
func (t table) delete(family byte, f Filter, match func(Connection) bool) error {
	var errs []error
	for n := 1; ; n++ {
		var found [][]byte
		err := t.list(family, f, func(c Flow, attributes []byte) {
			if match(c.Connection) {
				found = append(found, attributes)
			}
		})
		for _, attributes := range found {
			if err := t.remove(family, attributes); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("deleting a connection: %w", err))
			}
		}
		// An interrupted listing may lack entries: what it had is deleted, and the rest is found the next time.
		if errors.Is(err, errInterrupted) && n < dumps {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("listing connections: %w", err))
		}
		return errors.Join(errs...)
	}
}
