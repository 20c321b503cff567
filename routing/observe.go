package routing

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// maxTable is the last of our tables.
const maxTable = egress.ClosedTable

// Observed is what the kernel holds of ours. The zero Observed is a kernel that holds nothing.
type Observed struct {
	off     map[int]bool    // families that this namespace does without
	links   map[string]link // ours, by name
	entries map[string]entry
	// filters are the rp_filter of the VLAN links, by name.
	filters map[string]int
	// locals are the addresses of the links for egress IPs that are local by the kernel's own route, with their link.
	locals map[netip.Addr]string
}

// Locals returns the egress IPs that a route of ours makes local: the kernel answers for them.
func (o Observed) Locals() []netip.Addr {
	var out []netip.Addr
	for _, e := range o.entries {
		if e.local.IsValid() {
			out = append(out, e.local)
		}
	}
	return out
}

// Observe reads what the kernel holds of ours. An error means that nothing is known.
func (r *Router) Observe() (Observed, error) {
	o := Observed{off: map[int]bool{}, links: map[string]link{}, entries: map[string]entry{}, locals: map[netip.Addr]string{}}
	for _, name := range []string{egress.OverlayLink, formerLink} {
		l, err := r.link(name)
		if err != nil {
			return Observed{}, fmt.Errorf("reading link %s: %w", name, err)
		}
		o.links[name] = l
	}
	addressLinks, err := r.addressLinks()
	if err != nil {
		return Observed{}, err
	}
	for _, f := range families {
		known, on := f.support()
		if o.off[f.af] = !on; !known {
			continue
		}
		reads := []func(family) ([]entry, error){r.rules, r.routes, func(f family) ([]entry, error) { return r.addresses(f, o.links) }}
		if l := o.links[egress.OverlayLink]; l.exists() {
			reads = append(reads, func(f family) ([]entry, error) { return r.neighbours(f, l.index) })
		}
		for _, read := range reads {
			if err := o.add(read(f)); err != nil {
				return Observed{}, err
			}
		}
		if err := r.locals(f, addressLinks, o.locals); err != nil {
			return Observed{}, err
		}
	}
	if l := o.links[egress.OverlayLink]; l.exists() {
		if err := o.add(r.fdb(l.index)); err != nil {
			return Observed{}, err
		}
	}
	if o.filters, err = r.filters(); err != nil {
		return Observed{}, fmt.Errorf("reading rp_filter of VLAN links: %w", err)
	}
	return o, nil
}

// Unchanged reports whether o, read before, is so still in what no event of a Watcher tells: the settings of the
// overlay link, and whether IPv6 is on. It reads no more than that.
func (r *Router) Unchanged(o Observed) (bool, error) {
	for _, f := range families {
		if _, on := f.support(); o.off[f.af] == on {
			return false, nil
		}
	}
	l, err := r.link(egress.OverlayLink)
	if err != nil {
		return false, fmt.Errorf("reading link %s: %w", egress.OverlayLink, err)
	}
	return reflect.DeepEqual(l, o.links[egress.OverlayLink]), nil
}

func (o *Observed) add(es []entry, err error) error {
	for _, e := range es {
		o.entries[e.key()] = e
	}
	return err
}

// dumps is how often a dump that the kernel interrupted, because what it lists changed, is begun anew. Each time is a
// chance of its own, so that many only fail where something changes all the time.
const dumps = 20

// whole returns what list returns once it was not interrupted.
func whole[T any](what string, list func() (T, error)) (T, error) {
	for n := 1; ; n++ {
		all, err := list()
		if err == nil {
			return all, nil
		}
		if n == dumps || !errors.Is(err, netlink.ErrDumpInterrupted) {
			var none T
			return none, fmt.Errorf("listing %s: %w", what, err)
		}
	}
}

// rules returns our rules.
func (r *Router) rules(f family) ([]entry, error) {
	list, err := whole("rules", func() ([]netlink.Rule, error) { return r.handle.RuleList(f.af) })
	var es []entry
	for _, l := range list {
		ours := l.Protocol == egress.RouteProtocol && l.Priority >= egress.MinPriority && l.Priority <= egress.MaxPriority
		if ours && l.Family == f.af {
			es = append(es, ruleEntry(f, l))
		}
	}
	return es, err
}

// routes returns our routes.
func (r *Router) routes(f family) ([]entry, error) {
	// Table 0 with its filter set means every table.
	filter := &netlink.Route{Protocol: egress.RouteProtocol}
	mask := netlink.RT_FILTER_PROTOCOL | netlink.RT_FILTER_TABLE
	list, err := whole("routes", func() ([]netlink.Route, error) { return r.filtered.RouteListFiltered(f.af, filter, mask) })
	var es []entry
	names := map[int]string{0: ""}
	name := func(index int) string {
		if _, ok := names[index]; !ok {
			names[index] = fmt.Sprintf("if%d", index)
			if dev, err := r.handle.LinkByIndex(index); err == nil { // else it is going, and so is the route
				names[index] = dev.Attrs().Name
			}
		}
		return names[index]
	}
	for _, l := range list {
		if l.Table < egress.FirstTable || l.Table > maxTable {
			continue
		}
		for _, one := range split(l) {
			es = append(es, routeEntry(f, one, name(one.LinkIndex)))
		}
	}
	return es, err
}

// addressLinks returns the links that egress IPs are on, by index.
func (r *Router) addressLinks() (map[int]string, error) {
	links, err := whole("links", r.handle.LinkList)
	names := map[int]string{}
	for _, l := range links {
		id, vlan := strings.CutPrefix(l.Attrs().Name, egress.VLANLinkPrefix)
		if _, err := strconv.Atoi(id); vlan && err == nil || l.Attrs().Name == egress.AddressLink {
			names[l.Attrs().Index] = l.Attrs().Name
		}
	}
	return names, err
}

// locals adds the addresses of those links that are local by the kernel's own route.
func (r *Router) locals(f family, links map[int]string, out map[netip.Addr]string) error {
	if len(links) == 0 {
		return nil
	}
	filter := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL}
	list, err := whole("local routes", func() ([]netlink.Route, error) {
		return r.filtered.RouteListFiltered(f.af, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_TYPE)
	})
	for _, l := range list {
		if name, ok := links[l.LinkIndex]; ok {
			out[prefixOf(l.Dst).Addr()] = name
		}
	}
	return err
}

// split returns the routes that a route with several next hops stands for. IPv6 routes that differ in nothing but the
// next hop show as one, as ours do between the appending of the new and the removal of the old.
func split(r netlink.Route) []netlink.Route {
	if len(r.MultiPath) == 0 {
		return []netlink.Route{r}
	}
	var all []netlink.Route
	for _, hop := range r.MultiPath {
		one := r
		one.MultiPath = nil
		one.LinkIndex, one.Gw, one.Flags = hop.LinkIndex, hop.Gw, hop.Flags
		all = append(all, one)
	}
	return all
}

// addresses returns the addresses on our links: they are ours alone, so all of them.
func (r *Router) addresses(f family, ours map[string]link) ([]entry, error) {
	list, err := whole("addresses", func() ([]netlink.Addr, error) { return r.handle.AddrList(nil, f.af) })
	var es []entry
	for _, l := range list {
		for name, dev := range ours {
			if l.LinkIndex == dev.index {
				es = append(es, addressEntry(f, prefixOf(l.IPNet), name))
			}
		}
	}
	return es, err
}

// neighbours returns the permanent neighbours on the overlay link. The kernel has others there, of its own.
func (r *Router) neighbours(f family, index int) ([]entry, error) {
	list, err := whole("neighbours", func() ([]netlink.Neigh, error) { return r.handle.NeighList(index, f.af) })
	var es []entry
	for _, l := range list {
		if l.State&netlink.NUD_PERMANENT != 0 {
			es = append(es, neighbourEntry(f, addrOf(l.IP), l.HardwareAddr, l.State))
		}
	}
	return es, err
}

// fdb returns the forwarding database of the overlay link.
func (r *Router) fdb(index int) ([]entry, error) {
	list, err := whole("FDB entries", func() ([]netlink.Neigh, error) { return r.handle.NeighList(index, unix.AF_BRIDGE) })
	var es []entry
	for _, l := range list {
		if l.IP != nil {
			es = append(es, fdbEntry(l.HardwareAddr, addrOf(l.IP), l.State))
		}
	}
	return es, err
}
