package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Permit lets this node use an egress IP for some time.
type Permit struct {
	IP netip.Addr
	// Answer: the node answers ARP and NDP for the IP. Without it, it only sends with the IP.
	Answer bool
}

// permitSet names a set of those that hold permits. The permits of a table end together, by its clocks.
type permitSet struct {
	family nftables.TableFamily
	name   string
}

func (p permitSet) table() table { return table{family: p.family, name: egress.TableName} }

// permitSets returns the sets that the permits for ip are in. ok is false for the zero Addr.
func permitSets(ip netip.Addr) (answer []permitSet, send permitSet, plain netip.Addr, ok bool) {
	f, plain, ok := familyOf(ip)
	return f.answer, permitSet{nftables.TableFamilyINet, "permit" + f.digit}, plain, ok
}

// Permit makes list all the permits that there are, and makes them last for d from now, in one transaction. d is
// rounded down to the kernel's tick; what is shorter than the longest one, 10 ms, ends them all. The error is
// ErrNoTable when the tables are not there, or damaged: apply a State first.
func (t *Tables) Permit(list []Permit, d time.Duration) error {
	if d < tick {
		list, d = nil, tick // the kernel makes a tick of it, which is longer, and of 0 an element for ever
	}
	ips := setsOf(list)
	var ops []op
	for _, s := range allPermitSets() {
		ops = append(ops, s.table().flushSet(s.name))
		ops = append(ops, s.table().addAddresses(s.name, ips[s], 0)...)
	}
	for _, f := range families {
		for _, c := range f.clocks {
			ops = append(ops, c.set(d)...)
		}
	}
	if err := t.write.commit(ops); err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = errors.Join(ErrNoTable, err)
		}
		return fmt.Errorf("writing permits: %w", err)
	}
	return nil
}

// Permitted reports whether the permits that there are, those that have ended included, are those of list.
func (t *Tables) Permitted(list []Permit) (bool, error) {
	ips, same := setsOf(list), true
	err := t.read.whole(func(uint32) error {
		same = true
		for _, s := range allPermitSets() {
			have, err := t.dumpSet(s.table(), s.name)
			if errors.Is(err, unix.ENOENT) {
				same = false
				continue
			} else if err != nil {
				return fmt.Errorf("reading permits: %w", err)
			}
			keys := make([]string, len(have))
			for i, e := range have {
				keys[i] = e.key
			}
			slices.Sort(keys)
			want := make([]string, len(ips[s]))
			for i, ip := range ips[s] {
				want[i] = key(ip)
			}
			same = same && slices.Equal(keys, want)
		}
		return nil
	})
	return same && err == nil, err
}

// Revoke ends the permits of ips at once. Permits that are not there are no error.
func (t *Tables) Revoke(ips ...netip.Addr) error {
	return t.revoke(ips, func(answer []permitSet, send permitSet) []permitSet { return append(slices.Clone(answer), send) })
}

// RevokeAnswer ends at once the permission to answer for ips; this node may send with them for as long as it might.
// Permits that are not there are no error.
func (t *Tables) RevokeAnswer(ips ...netip.Addr) error {
	return t.revoke(ips, func(answer []permitSet, _ permitSet) []permitSet { return answer })
}

// revoke takes ips out of the sets that of chooses: set by set, so that one that is not there does not save the others,
// and in order.
func (t *Tables) revoke(ips []netip.Addr, of func(answer []permitSet, send permitSet) []permitSet) error {
	gone := map[permitSet][]netip.Addr{}
	for _, ip := range ips {
		if answer, send, plain, ok := permitSets(ip); ok {
			for _, s := range of(answer, send) {
				gone[s] = append(gone[s], plain)
			}
		}
	}
	var errs []error
	for _, s := range allPermitSets() {
		if len(gone[s]) == 0 {
			continue
		}
		if err := t.write.commit(s.table().without(s.name, gone[s], 0)); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("revoking permits: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Permits returns how long each permit to send still lasts. It is empty when the tables are absent.
func (t *Tables) Permits() (map[netip.Addr]time.Duration, error) {
	out := map[netip.Addr]time.Duration{}
	err := t.read.whole(func(uint32) error {
		clear(out)
		for _, f := range families {
			send := f.clocks[0]
			left, err := t.left(send.table(), "alive", send.ether)
			if err != nil {
				return fmt.Errorf("reading permits: %w", err)
			}
			list, err := t.dumpSet(send.table(), "permit"+f.digit)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("reading permits: %w", err)
			}
			for _, e := range list {
				if ip, ok := netip.AddrFromSlice([]byte(e.key)); ok && left > 0 {
					out[ip] = left
				}
			}
		}
		return nil
	})
	return out, err
}

// Answering returns the IPs whose permits are to answer for them, too, as long as they last.
func (t *Tables) Answering() (map[netip.Addr]bool, error) {
	out := map[netip.Addr]bool{}
	err := t.read.whole(func(uint32) error {
		clear(out)
		for _, f := range families {
			list, err := t.dumpSet(f.answer[0].table(), f.answer[0].name)
			if err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("reading permits: %w", err)
			}
			for _, e := range list {
				if ip, ok := netip.AddrFromSlice([]byte(e.key)); ok {
					out[ip] = true
				}
			}
		}
		return nil
	})
	return out, err
}

// allPermitSets returns the sets that permits are in, in order.
func allPermitSets() []permitSet {
	var all []permitSet
	for _, f := range families {
		all = append(all, permitSet{nftables.TableFamilyINet, "permit" + f.digit})
		all = append(all, f.answer...)
	}
	return all
}

// setsOf returns what of the addresses of list is in each set, sorted, and once.
func setsOf(list []Permit) map[permitSet][]netip.Addr {
	out := map[permitSet][]netip.Addr{}
	for _, p := range list {
		answer, send, ip, ok := permitSets(p.IP)
		if !ok {
			continue
		}
		out[send] = append(out[send], ip)
		if p.Answer {
			for _, s := range answer {
				out[s] = append(out[s], ip)
			}
		}
	}
	for s, ips := range out {
		slices.SortFunc(ips, netip.Addr.Compare)
		out[s] = slices.Compact(ips)
	}
	return out
}

// addAddresses puts ips into a set, for d; 0: for good.
func (t table) addAddresses(set string, ips []netip.Addr, d time.Duration) []op {
	return t.addresses(t.addElements, set, ips, d)
}

// without takes ips out of a set. Deleting an element that is not there fails: so it is added before, for d where
// elements of the set have a time; packets see only the outcome.
func (t table) without(set string, ips []netip.Addr, d time.Duration) []op {
	return append(t.addresses(t.addElements, set, ips, d), t.addresses(t.deleteElements, set, ips, 0)...)
}

func (t table) addresses(verb func(string, []string, []element) op, set string, ips []netip.Addr, d time.Duration) []op {
	ips = slices.Clone(ips)
	slices.SortFunc(ips, netip.Addr.Compare)
	var ops []op
	for part := range slices.Chunk(slices.Compact(ips), batch) { // an element twice in one delete is refused
		names, list := make([]string, len(part)), make([]element, len(part))
		for i, ip := range part {
			names[i], list[i] = ip.String(), element{key: key(ip), timeout: d}
		}
		ops = append(ops, verb(set, names, list))
	}
	return ops
}
