package nft

import (
	"errors"
	"fmt"
	"maps"
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

// permitSet names a set whose elements end by themselves, as those that hold permits.
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

// Permit renews permits for d from now, in one transaction; permits that are not in list stay as they are, and so does the permission
// to answer where Answer is false. d has the kernel's precision, one millisecond; shorter ones revoke. The error is ErrNoTable when
// the tables are not there, or damaged: apply a State first.
func (t *Tables) Permit(list []Permit, d time.Duration) error {
	if d < time.Millisecond {
		// 0 would be a permit for ever.
		ips := make([]netip.Addr, len(list))
		for i, p := range list {
			ips[i] = p.IP
		}
		return t.Revoke(ips...)
	}
	var w permitWrites
	for _, p := range list {
		answer, send, ip, ok := permitSets(p.IP)
		if !ok {
			continue
		}
		w.add(ip, send)
		if p.Answer {
			w.add(ip, answer...)
		}
	}
	if len(w.order) == 0 {
		return nil
	}
	var ops []op
	for _, s := range w.order {
		ops = append(ops, s.renew(w.ips[s], d)...)
	}
	if err := t.write.commit(ops); err != nil {
		if errors.Is(err, unix.ENOENT) {
			err = errors.Join(ErrNoTable, err)
		}
		return fmt.Errorf("renewing permits: %w", err)
	}
	return nil
}

// Revoke ends the permits of ips at once. Permits that are not there are no error.
func (t *Tables) Revoke(ips ...netip.Addr) error {
	return t.revoke(ips, func(answer []permitSet, send permitSet) []permitSet { return append(slices.Clone(answer), send) })
}

// RevokeAnswer ends at once the permission to answer for ips; this node may send with them for as long as it might. Permits that are
// not there are no error.
func (t *Tables) RevokeAnswer(ips ...netip.Addr) error {
	return t.revoke(ips, func(answer []permitSet, _ permitSet) []permitSet { return answer })
}

// revoke takes ips out of the sets that of chooses: set by set, so that one that is not there does not save the others, and in order.
func (t *Tables) revoke(ips []netip.Addr, of func(answer []permitSet, send permitSet) []permitSet) error {
	var w permitWrites
	for _, ip := range ips {
		answer, send, plain, ok := permitSets(ip)
		if !ok {
			continue
		}
		w.add(plain, of(answer, send)...)
	}
	var errs []error
	for _, s := range w.order {
		if err := t.write.commit(s.revoke(w.ips[s])); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("revoking permits: %w", err))
		}
	}
	return errors.Join(errs...)
}

// Permits returns how long each permit to send still lasts. It is empty when the tables are absent. A permit without an end, which
// this package never writes, is left out.
func (t *Tables) Permits() (map[netip.Addr]time.Duration, error) {
	// The kernel resizes timed sets in the background, and a dump that comes upon that misses elements with no sign of it (see
	// maxIDs). Two dumps that agree did not.
	var last map[netip.Addr]time.Duration
	for range reads {
		next := map[netip.Addr]time.Duration{}
		if err := t.read.whole(func() error { return t.readPermits(next) }); err != nil {
			return nil, err
		}
		if last != nil && maps.EqualFunc(last, next, func(a, b time.Duration) bool { return true }) {
			return next, nil
		}
		last = next
	}
	return nil, fmt.Errorf("reading permits: %w", errChanged)
}

func (t *Tables) readPermits(out map[netip.Addr]time.Duration) error {
	clear(out)
	for _, f := range families {
		list, err := t.dumpSet(table{family: nftables.TableFamilyINet, name: egress.TableName}, "permit"+f.digit)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("reading permits: %w", err)
		}
		for _, e := range list {
			if ip, ok := netip.AddrFromSlice([]byte(e.key)); ok && e.left > 0 {
				out[ip] = e.left
			}
		}
	}
	return nil
}

// permitWrites are addresses by the set that they go into; the sets in the order of their first address.
type permitWrites struct {
	order []permitSet
	ips   map[permitSet][]netip.Addr
}

func (w *permitWrites) add(ip netip.Addr, sets ...permitSet) {
	if w.ips == nil {
		w.ips = map[permitSet][]netip.Addr{}
	}
	for _, s := range sets {
		if _, ok := w.ips[s]; !ok {
			w.order = append(w.order, s)
		}
		w.ips[s] = append(w.ips[s], ip)
	}
}

// renew gives ips a new end. Adding a timed element that is there does not extend it on every kernel, and deleting one that is not
// there fails: so add, delete, add, of which packets see only the outcome.
func (p permitSet) renew(ips []netip.Addr, d time.Duration) []op {
	return append(p.revoke(ips), p.write(table.addElements, ips, d)...)
}

func (p permitSet) revoke(ips []netip.Addr) []op {
	// The time of the first add is of no meaning, but an element without one would stay for ever if the rest went wrong.
	return append(p.write(table.addElements, ips, time.Millisecond), p.write(table.deleteElements, ips, 0)...)
}

func (p permitSet) write(verb func(table, string, []string, []element) op, ips []netip.Addr, d time.Duration) []op {
	ips = slices.Clone(ips)
	slices.SortFunc(ips, netip.Addr.Compare)
	var ops []op
	for part := range slices.Chunk(slices.Compact(ips), batch) { // an element twice in one delete is refused
		names, list := make([]string, len(part)), make([]element, len(part))
		for i, ip := range part {
			names[i], list[i] = ip.String(), element{key: key(ip), timeout: d}
		}
		ops = append(ops, verb(p.table(), p.name, names, list))
	}
	return ops
}
