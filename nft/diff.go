package nft

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
)

// Changes are the difference between the kernel and a State: one transaction, after one more where tables themselves
// are changed, as when they are taken over. The zero Changes are empty.
type Changes struct {
	// Reselected are the pods that got an egress IP, got another one, or have none any more, sorted by family. To the
	// outside, connections that they opened before are dropped for as long as conntrack knows them.
	Reselected []netip.Addr
	// Unhosted are the egress IPs that this node steered and SNATed to, and does no more. What conntrack has of their
	// connections stands still from now on, and would be wrong should the IP come back.
	Unhosted []netip.Addr
	// Repairs say what of the tables, chains, rules, sets and counters was not as it must be, as after a first start or
	// someone else's hand. Missing elements are not in it.
	Repairs []string

	tables, ops []op
	known       []netip.Addr // pods that are known from now on, selected or not

	of    uint64                // the Observed that they are the difference to
	after []map[string]elements // what the sets that a State fills hold afterwards, by table; nil: that has to be read
}

// Empty reports whether there is nothing to write.
func (c Changes) Empty() bool { return len(c.tables)+len(c.ops) == 0 }

// String returns the transactions as the lines of a script for nft -f, in order; "" when it is empty. One rule, that on
// the target of neighbor advertisements, nft prints like that but does not take.
func (c Changes) String() string {
	var b strings.Builder
	for _, o := range slices.Concat(c.tables, c.ops) {
		b.WriteString(o.line)
		b.WriteByte('\n')
	}
	return b.String()
}

// Diff returns what makes a kernel that was observed as have equal to want. Equal arguments give equal Changes.
func Diff(have Observed, want State) Changes { return new(Differ).Diff(have, want) }

// Differ is for who calls Diff again and again: it remembers how what thousands of nodes and egress IPs have in a
// State is written for the kernel. Its results are those of Diff. The zero Differ is ready; it is for one goroutine.
type Differ struct{ memo memo }

// Diff is as the function Diff.
func (d *Differ) Diff(have Observed, want State) Changes {
	c := Changes{of: have.serial}
	all := want.elements(&d.memo)
	var after []map[string]elements
	whole := true // no table is made anew, or in part
	for i, t := range tables(want) {
		before := len(c.tables) + len(c.ops)
		var old observedTable
		if i < len(have.tables) {
			old = have.tables[i]
		}
		was := old.elements
		old, t = c.own(old, t, have.socket)
		if damage := t.damage(old); len(damage) > 0 {
			c.Repairs = append(c.Repairs, damage...)
			c.ops = append(c.ops, t.rebuild(old)...)
		}
		whole = whole && len(c.tables)+len(c.ops) == before
		after = append(after, map[string]elements{})
		for _, s := range t.sets {
			if !s.fromState() {
				continue
			}
			wanted := all[s.name]
			if want.Keep && !s.ofPods || want.KeepSenders && s.ofOtherNodes {
				wanted = s.unite(was[s.name], all[s.name])
			}
			if digit, ok := strings.CutPrefix(s.name, "known"); ok {
				// An address in known passes, so one that is kept there must not be selected now.
				maps.DeleteFunc(wanted, func(k, _ string) bool { _, selected := all["pod"+digit][k]; return selected })
			}
			after[i][s.name] = wanted
			if s.flags&flagObject != 0 {
				limits := t.changeLimits(s, old, wanted)
				// there are objects beside the elements
				c.ops, whole = append(c.ops, limits...), whole && len(limits) == 0
			} else {
				c.ops = append(c.ops, t.change(s, old.elements[s.name], wanted)...)
			}
		}
	}
	var inet map[string]elements
	if len(have.tables) > 0 {
		inet = have.tables[0].elements
	}
	if want.FirstPacketDelay > 0 {
		c.known = becomeKnown(inet, all)
	}
	c.Reselected = reselected(inet, all)
	if !want.Keep {
		c.Unhosted = unhosted(inet, all)
	}
	if whole {
		c.after = after
	}
	return c
}

// own makes the table that of the socket, where there is one, and returns it, and what is left of the old one then. One
// that its former owner has left is taken over as it is: that, and to wake one that sleeps, is a transaction of its
// own, since the kernel hooks no chain in one that changes the table (linux: nf_tables_addchain). The kernel makes no
// other table one that is owned, nor takes the flag away: such a table is made anew, in one transaction with all that
// is in it, and only permits, which are renewed all the time, are lost.
func (c *Changes) own(old observedTable, t table, socket uint32) (observedTable, table) {
	if socket != 0 {
		t.flags = flagsOwned
	}
	switch {
	case !old.exists || old.flags == flagsOwned && old.socket == socket:
	case (old.flags^t.flags)&flagPersist != 0:
		c.ops = append(c.ops, t.deleteTable())
		old = observedTable{}
	case old.flags != t.flags:
		c.tables = append(c.tables, t.addTable())
		old.flags |= t.flags
	}
	return old, t
}

// unite returns what a set has and is to have. Ranges that overlap, or follow on each other, become one: the kernel
// refuses those that overlap.
func (s set) unite(have, want elements) elements {
	out := elements{}
	if s.flags&flagInterval == 0 {
		maps.Copy(out, have)
		maps.Copy(out, want)
		return out
	}
	var all []span
	for _, part := range []elements{have, want} {
		for first, last := range part {
			all = append(all, span{address(first), address(last)})
		}
	}
	for _, r := range union(all) {
		out[key(r.first)] = key(r.last)
	}
	return out
}

// becomeKnown returns the addresses of pods of which it was not known whether they are selected.
func becomeKnown(have, want map[string]elements) (out []netip.Addr) {
	for _, f := range families {
		sets := []string{"pod" + f.digit, "known" + f.digit}
		for _, set := range sets {
			for _, k := range slices.Sorted(maps.Keys(want[set])) {
				if !slices.ContainsFunc(sets, func(s string) bool { _, ok := have[s][k]; return ok }) {
					ip, _ := netip.AddrFromSlice([]byte(k))
					out = append(out, ip)
				}
			}
		}
	}
	return out
}

// reselected returns the pods that have another egress IP than before, or none any more.
func reselected(have, want map[string]elements) (out []netip.Addr) {
	for _, f := range families {
		old, pods := have["pod"+f.digit], want["pod"+f.digit]
		var changed []string
		for k := range pods {
			if old[k] != pods[k] {
				changed = append(changed, k)
			}
		}
		for k := range old {
			if _, ok := pods[k]; !ok {
				changed = append(changed, k)
			}
		}
		slices.Sort(changed)
		for _, k := range changed {
			ip, _ := netip.AddrFromSlice([]byte(k))
			out = append(out, ip)
		}
	}
	return out
}

// unhosted returns the egress IPs that are no more what an id is translated to.
func unhosted(have, want map[string]elements) (out []netip.Addr) {
	for _, f := range families {
		set := "snat" + f.digit
		for _, k := range slices.Sorted(maps.Keys(have[set])) {
			if have[set][k] != want[set][k] {
				ip, _ := netip.AddrFromSlice([]byte(have[set][k]))
				out = append(out, ip)
			}
		}
	}
	return out
}

// batch is how many elements one message holds: a message's attributes end at 64 KiB, and an element takes up to 80
// bytes.
const batch = 500

// change returns what turns the elements of a set from old into wanted. The kernel refuses another value for a key that
// is there: such an element is deleted and added, in one transaction.
func (t table) change(s set, old, wanted elements) []op {
	if reflect.ValueOf(old).UnsafePointer() == reflect.ValueOf(wanted).UnsafePointer() {
		return nil // they are one map: what was written last, and is remembered
	}
	var gone, come []string
	for k, was := range old {
		if v, ok := wanted[k]; !ok || v != was {
			gone = append(gone, k)
		}
	}
	for k, v := range wanted {
		if was, ok := old[k]; !ok || v != was {
			come = append(come, k)
		}
	}
	slices.Sort(gone)
	slices.Sort(come)
	var ops []op
	if s.flags&flagInterval != 0 && len(gone) > 0 {
		// Ranges that come may overlap ranges that go, in ways that not every kernel sorts out: write all of them.
		ops = append(ops, t.flushSet(s.name))
		gone, come = nil, slices.Sorted(maps.Keys(wanted))
	}
	size := batch
	if s.flags&flagInterval != 0 {
		size /= 2 // a range is two elements, which stay together
	}
	for part := range slices.Chunk(gone, batch) {
		names, list := make([]string, len(part)), make([]element, len(part))
		for i, k := range part {
			names[i], list[i] = s.key.print(k), element{key: s.key.wire(k)}
		}
		ops = append(ops, t.deleteElements(s.name, names, list))
	}
	for part := range slices.Chunk(come, size) {
		names, list := make([]string, len(part)), make([]element, 0, len(part))
		for i, k := range part {
			name, elems := s.element(k, wanted[k])
			names[i], list = name, append(list, elems...)
		}
		ops = append(ops, t.addElements(s.name, names, list))
	}
	return ops
}

// element returns an element as nft prints it, and as the kernel takes it: a range is two.
func (s set) element(k, v string) (string, []element) {
	switch {
	case s.flags&flagInterval != 0:
		first, _ := netip.AddrFromSlice([]byte(k))
		last, _ := netip.AddrFromSlice([]byte(v))
		list := []element{{key: k}}
		if end := last.Next(); end.IsValid() {
			list = append(list, element{key: key(end), end: true})
		}
		return span{first, last}.String(), list
	case s.flags&flagObject != 0:
		return fmt.Sprintf("%s : %q", s.key.print(k), limitName(k)), []element{{key: s.key.wire(k), object: limitName(k)}}
	case s.flags&flagMap != 0:
		return s.key.print(k) + " : " + s.value.print(v), []element{{key: s.key.wire(k), value: s.value.wire(v)}}
	default:
		return s.key.print(k), []element{{key: s.key.wire(k)}}
	}
}
