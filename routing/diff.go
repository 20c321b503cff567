package routing

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
)

// Changes are the difference between the kernel and a State. The zero Changes are empty.
type Changes struct {
	links, adds, comes, goes, removes []op
	// Loosened are the links of Egret's whose rp_filter is not what it has to be: those of VLANs that are new, and those
	// of which somebody set it.
	Loosened []string
	// Loose are those of which it is what it has to be.
	Loose []string
}

// op is one write, and the command of ip(8), bridge(8) or sysctl(8) for it.
type op struct {
	line string
	run  func(*writer) error
	exit egress.Mark // of the subnet that it is about; 0: it is about more
}

// Empty reports whether there is nothing to write.
func (c Changes) Empty() bool {
	return len(c.links)+len(c.adds)+len(c.comes)+len(c.goes)+len(c.removes) == 0
}

// Links returns the part that makes links, which nothing comes in by yet. One of ours that has to be made anew goes and
// comes here, with all that is on it.
func (c Changes) Links() Changes { return Changes{links: c.links} }

// Entries returns the part that brings what else is missing, and takes nothing away, but for Locals.
func (c Changes) Entries() Changes { return Changes{adds: c.adds} }

// Locals returns the part that makes egress IPs local: from then on the kernel answers for them. NoLocals is the part
// of Removes that takes that away.
func (c Changes) Locals() Changes   { return Changes{comes: c.comes} }
func (c Changes) NoLocals() Changes { return Changes{goes: c.goes} }

// Removes returns the part that takes away what is not wanted any more.
func (c Changes) Removes() Changes { return Changes{goes: c.goes, removes: c.removes} }

// String returns the changes in the order in which Apply makes them, as lines that a shell could run; "" when there are
// none.
func (c Changes) String() string {
	var b strings.Builder
	for _, o := range slices.Concat(c.links, c.adds, c.comes, c.goes, c.removes) {
		b.WriteString(o.line)
		b.WriteByte('\n')
	}
	return b.String()
}

// Diff returns what makes a kernel that was observed as have equal to want. It does no I/O; equal arguments give equal
// Changes.
func Diff(have Observed, want State) Changes {
	var c Changes
	old, wanted := have.entries, map[string]entry{}
	for _, e := range want.entries(have.off) {
		wanted[e.key()] = e
	}
	var gone map[string]bool
	c.links, c.adds, gone = have.changeLinks(want.Overlay)
	// What is on a link goes with it.
	old = maps.Clone(old)
	maps.DeleteFunc(old, func(_ string, e entry) bool { return gone[e.bound] })

	if filter := have.links[egress.OverlayLink].rpFilter; !gone[egress.OverlayLink] && filter >= 0 {
		if filter == looseFilter {
			c.Loose = append(c.Loose, egress.OverlayLink)
		} else {
			c.Loosened = append(c.Loosened, egress.OverlayLink)
		}
	}
	loose := map[string]bool{}
	for _, s := range want.Subnets {
		f, ok := have.filters[s.Link]
		switch {
		case !ok || loose[s.Link]:
		case f == looseFilter:
			loose[s.Link] = true
			c.Loose = append(c.Loose, s.Link)
		default:
			loose[s.Link] = true
			o := loosen(s.Link)
			o.exit = s.Mark
			c.adds = append(c.adds, o)
			c.Loosened = append(c.Loosened, s.Link)
		}
	}
	slots, places := map[string]bool{}, map[string]bool{}
	for _, e := range wanted {
		if e.slot != "" {
			slots[e.command+" "+e.slot] = true
		}
	}
	held := map[string]bool{}
	for _, e := range old {
		places[e.place], held[e.command+" "+e.slot] = true, true
	}
	for _, e := range sorted(wanted) {
		if _, ok := old[e.key()]; !ok {
			verb := verbs[e.kind]
			switch {
			case e.kind == route && held[e.command+" "+e.slot]:
				verb = "replace"
			case e.kind == route && places[e.place]:
				verb = "append" // the old one is used until it goes
			}
			o := op{e.command + " " + verb + " " + e.words, func(w *writer) error { return present(e.add(w, verb)) }, e.exit}
			if e.local.IsValid() {
				c.comes = append(c.comes, o)
			} else {
				c.adds = append(c.adds, o)
			}
		}
	}
	for _, e := range slices.Backward(sorted(old)) {
		if want.Keep {
			continue
		}
		if _, ok := wanted[e.key()]; !ok && !slots[e.command+" "+e.slot] {
			o := op{e.command + " del " + e.words, func(w *writer) error { return absent(e.del(w)) }, e.exit}
			if e.local.IsValid() {
				c.goes = append(c.goes, o)
			} else {
				c.removes = append(c.removes, o)
			}
		}
	}
	for _, ip := range slices.SortedFunc(maps.Keys(want.Addresses), netip.Addr.Compare) {
		f, link := familyOf(ip), want.Addresses[ip]
		if have.off[f.af] {
			continue
		}
		// With an address that comes, the kernel's route comes, after what was observed.
		if _, known := have.entries[routeEntry(f, localRoute(f, egress.AddressTable, ip), loopback).key()]; !known || have.locals[ip] == link {
			c.removes = append(c.removes, removeLocal(f, ip, link))
		}
	}
	for _, name := range []string{egress.OverlayLink, formerLink} {
		if have.links[name].exists() && (name == formerLink || !want.Overlay.Local.IsValid()) {
			c.removes = append(c.removes, removeLink(name))
		}
	}
	return c
}

// verbs are the words that add an entry of each kind.
var verbs = [...]string{address: "add", neighbour: "replace", fdb: "replace", route: "add", rule: "add"}

// sorted returns entries in the order in which they can be added.
func sorted(m map[string]entry) []entry {
	return slices.SortedFunc(maps.Values(m), func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.key(), b.key()))
	})
}
