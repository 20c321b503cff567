package crdsync

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/crdsync/spec"
	"github.com/egret-project/egret/egress"
)

// want is one address that an egress asks for.
type want struct {
	pool string     // empty: a static address
	ip   netip.Addr // the zero Addr: any of the pool
	err  error      // why it cannot be had, whatever is free
}

// wants returns the addresses that an egress asks for, at most one of each family. unread says why a pool could not be
// read.
func wants(d demand, pools map[string]egress.Pool, unread map[string]error) []want {
	var out []want
	covered, paired := map[family]bool{}, map[string]bool{}
	outside := false // an address is not of any of the pools
	for _, ip := range d.ips {
		w := want{ip: ip}
		w.pool, w.err = spec.PoolOf(ip, d.pools, pools)
		paired[w.pool] = w.err == nil
		if w.err != nil {
			outside = true
			if err := missing(d.pools, pools, unread); err != nil {
				w.err = err
			}
		}
		covered[familyOf(ip)] = true
		out = append(out, w)
	}
	for _, name := range d.pools {
		if paired[name] {
			continue
		}
		p, ok := pools[name]
		w := want{pool: name}
		fs := poolFamilies(p)
		switch {
		case !ok && outside:
			continue // the address that was to be of this pool says so
		case !ok:
			w.err = missing([]string{name}, pools, unread)
		case len(fs) > 0 && !slices.ContainsFunc(fs, func(f family) bool { return !covered[f] }):
			if outside {
				continue // the address that was to be of this pool is refused already, and no other takes its place
			}
			w.err = fmt.Errorf("pool %s: another address of its IP family is asked for already", name)
		}
		for _, f := range fs {
			covered[f] = true
		}
		out = append(out, w)
	}
	return out
}

// missing says that pools are not there, or cannot be read.
func missing(names []string, pools map[string]egress.Pool, unread map[string]error) (err error) {
	for _, name := range names {
		if _, ok := pools[name]; ok {
			continue
		}
		if unread[name] != nil {
			err = errors.Join(err, fmt.Errorf("pool %s cannot be read: %w", name, unread[name]))
		} else {
			err = errors.Join(err, fmt.Errorf("pool %s does not exist", name))
		}
	}
	return err
}

// poolFamilies returns the IP families of a pool's ranges, in their order.
func poolFamilies(p egress.Pool) []family {
	var out []family
	for _, r := range p.Ranges {
		if f := familyOf(r.Start); !slices.Contains(out, f) {
			out = append(out, f)
		}
	}
	return out
}

// request is what an egress asks for when addresses are given out.
type request struct {
	name  string
	wants []want
	// keep: what the egress wants cannot be read, so it keeps what it has.
	keep bool
	// lost are addresses that it has and keeps, although their pools no longer have them, and what is to be said about
	// that.
	lost map[netip.Addr]error
	// prefer are addresses that it had once. Their ids may be 0.
	prefer []egress.Address
}

// outcome is what an egress gets.
type outcome struct {
	addresses []egress.Address // IPv4 first; id 0: not numbered yet
	err       error            // why it does not get all that it wants
	duplicate error            // the part of err that is about addresses that others have
}

func (o outcome) has(f family) bool {
	return slices.ContainsFunc(o.addresses, func(a egress.Address) bool { return familyOf(a.IP) == f })
}

// allocator gives out addresses. have is what etcd shows as taken. An address whose egress gives it up counts as taken
// until etcd no longer has it.
type allocator struct {
	pools    map[string]egress.Pool
	nodes    map[netip.Addr]string // the nodes' own addresses, which no pool gives out
	have     map[netip.Addr]egress.Allocation
	granted  map[netip.Addr]grant // that are not in have
	kept     map[netip.Addr]bool  // of have, that stay with their egresses
	reserved map[netip.Addr]bool  // that specs name
	out      map[string]*outcome
}

// grant is an address that was given out just now.
type grant struct{ pool, egress string }

// allocate decides who gets which address. The requests are in the order in which they are served. What an egress has
// it keeps, as long as it still wants it, also when it is no longer a pool's, or has become one, or was taken out of
// its pool; else it gets the address that it names; else one that it had once, if that is free; else the lowest free
// one of the pool, leaving out those that others name as long as there is another. A pool gives out no address of a
// node: what comes to the node at it would be dropped where the egress is.
func allocate(
	requests []request, pools map[string]egress.Pool, nodes map[netip.Addr]string, have map[netip.Addr]egress.Allocation,
) map[string]*outcome {
	have = maps.Clone(have)
	if have == nil {
		have = map[netip.Addr]egress.Allocation{}
	}
	a := allocator{pools, nodes, have, map[netip.Addr]grant{}, map[netip.Addr]bool{}, map[netip.Addr]bool{}, map[string]*outcome{}}
	byName := map[string][]egress.Allocation{}
	for _, ip := range slices.SortedFunc(maps.Keys(have), netip.Addr.Compare) {
		for _, name := range have[ip].Egresses {
			byName[name] = append(byName[name], have[ip])
		}
	}
	open := map[string][]want{}
	for _, r := range requests {
		open[r.name] = a.keep(r, byName[r.name])
	}
	for _, r := range requests {
		for _, w := range open[r.name] {
			a.give(r, w)
		}
		o := a.out[r.name]
		slices.SortFunc(o.addresses, func(x, y egress.Address) int { return x.IP.Compare(y.IP) })
	}
	return a.out
}

// keep gives a request what it has and still wants, and returns what is left to be wanted.
func (a *allocator) keep(r request, has []egress.Allocation) (left []want) {
	o := &outcome{}
	a.out[r.name] = o
	for _, h := range has {
		if r.keep && !o.has(familyOf(h.IP)) {
			a.kept[h.IP] = true
			o.addresses = append(o.addresses, egress.Address{IP: h.IP, ID: h.ID, Pool: h.Pool})
		}
	}
	for _, w := range r.wants {
		i := slices.IndexFunc(has, func(h egress.Allocation) bool {
			same := w.ip == h.IP && (h.Pool == w.pool || len(h.Egresses) == 1)
			filled := !w.ip.IsValid() && h.Pool == w.pool && a.pools[w.pool].Contains(h.IP)
			lost := r.lost[h.IP] != nil && (w.ip == h.IP || !w.ip.IsValid() && h.Pool == w.pool)
			return (w.err == nil && (same || filled) || lost) && !o.has(familyOf(h.IP))
		})
		if i >= 0 {
			h := &has[i]
			if err := r.lost[h.IP]; err != nil {
				o.err = errors.Join(o.err, err)
			} else {
				h.Pool = w.pool
			}
			a.have[h.IP], a.kept[h.IP] = *h, true
			o.addresses = append(o.addresses, egress.Address{IP: h.IP, ID: h.ID, Pool: h.Pool})
			continue
		}
		left = append(left, w)
		a.reserved[w.ip] = true
		for _, p := range r.prefer {
			a.reserved[p.IP] = true
		}
	}
	return left
}

// give gives a request one address that it wants, or the reason why not.
func (a *allocator) give(r request, w want) {
	o := a.out[r.name]
	refuse := func(err error) { o.err = errors.Join(o.err, err) }
	taken := func(ip netip.Addr) bool {
		_, granted := a.granted[ip]
		return a.have[ip].IP.IsValid() || granted
	}
	got := egress.Address{IP: w.ip, Pool: w.pool}
	h := a.have[w.ip]
	g, granted := a.granted[w.ip]
	switch {
	case w.err != nil:
		refuse(w.err)
		return
	case w.ip.IsValid() && w.pool == "" && (h.IP == w.ip && h.Pool == "" || granted && g.pool == ""):
		got.ID = h.ID // a static address may be shared
	case w.pool != "" && a.nodes[w.ip] != "":
		refuse(fmt.Errorf("%s is the address of node %s: want another one of pool %s, or no pool", w.ip, a.nodes[w.ip], w.pool))
		return
	case w.ip.IsValid() && taken(w.ip):
		err := inUse(w.ip, h, g)
		refuse(err)
		o.duplicate = errors.Join(o.duplicate, err)
		return
	case !w.ip.IsValid():
		var err error
		if got.IP, err = a.choose(r, w, taken); err != nil {
			refuse(err)
			return
		}
	}
	if got.ID == 0 {
		a.granted[got.IP] = grant{w.pool, r.name}
		if i := slices.IndexFunc(r.prefer, func(p egress.Address) bool { return p.IP == got.IP }); i >= 0 {
			got.ID = r.prefer[i].ID
		}
	}
	o.addresses = append(o.addresses, got)
}

// choose returns a free address of the pool of w, of a family that the egress has no address of. For an address that it
// had, and that etcd still shows as that of an egress which gives it up, it waits, as after a restore of etcd.
func (a *allocator) choose(r request, w want, taken func(netip.Addr) bool) (netip.Addr, error) {
	pool := a.pools[w.pool]
	pool.Ranges = slices.DeleteFunc(slices.Clone(pool.Ranges), func(g egress.Range) bool { return a.out[r.name].has(familyOf(g.Start)) })
	for _, p := range r.prefer {
		switch _, granted := a.granted[p.IP]; {
		case !pool.Contains(p.IP) || a.nodes[p.IP] != "":
		case !taken(p.IP):
			return p.IP, nil
		case !granted && !a.kept[p.IP] && len(a.have[p.IP].Egresses) > 0:
			return netip.Addr{}, fmt.Errorf("%s is being released", p.IP)
		}
	}
	unfit := func(ip netip.Addr) bool { return taken(ip) || a.nodes[ip] != "" }
	if ip, ok := pool.Free(func(ip netip.Addr) bool { return unfit(ip) || a.reserved[ip] }); ok {
		return ip, nil
	}
	if ip, ok := pool.Free(unfit); ok {
		return ip, nil
	}
	total := a.pools[w.pool].Total()
	if total == 0 {
		return netip.Addr{}, fmt.Errorf("pool %s has no address: of a cidr, neither the first one nor, for IPv4, the last one is given out", w.pool)
	}
	own, nodes := 0, ""
	for ip := range a.nodes {
		if a.pools[w.pool].Contains(ip) {
			own++
			nodes = fmt.Sprintf(", of which %d are the nodes' own", own)
		}
	}
	return netip.Addr{}, fmt.Errorf("pool %s has no free address: it has %d%s", w.pool, total, nodes)
}

func inUse(ip netip.Addr, h egress.Allocation, g grant) error {
	switch {
	case len(h.Egresses) > 0:
		return fmt.Errorf("%s is in use by egress %s", ip, strings.Join(h.Egresses, ", "))
	case g.egress != "":
		return fmt.Errorf("%s is in use by egress %s", ip, g.egress)
	}
	return fmt.Errorf("%s is in use by another egress", ip) // the record does not say which
}

// number gives an id to every address of the outcomes that has none, the same to all who share the address; order is
// that of the requests. inUse holds the ids that etcd shows, last is the one that was given out last. It returns the
// one that is last now. Where no id is left, the address is taken back.
func number(order []request, out map[string]*outcome, inUse map[egress.ID]netip.Addr, last egress.ID) egress.ID {
	used, byIP := maps.Clone(inUse), map[netip.Addr]egress.ID{}
	for _, r := range order {
		for _, a := range out[r.name].addresses {
			if ip, ok := used[a.ID]; a.ID != 0 && (!ok || ip == a.IP) {
				used[a.ID], byIP[a.IP] = a.IP, a.ID
			}
		}
	}
	for _, r := range order {
		o := out[r.name]
		o.addresses = slices.DeleteFunc(o.addresses, func(a egress.Address) bool {
			if byIP[a.IP] != 0 {
				return false
			}
			id, ok := nextFree(int(last), int(egress.MaxID), func(n int) bool { _, ok := used[egress.ID(n)]; return ok })
			if !ok {
				o.err = errors.Join(o.err, fmt.Errorf("no id is left for %s: all %d are in use", a.IP, egress.MaxID))
				return true
			}
			last = egress.ID(id)
			used[last], byIP[a.IP] = a.IP, last
			return false
		})
		for i, a := range o.addresses {
			o.addresses[i].ID = byIP[a.IP]
		}
	}
	return last
}

// indexNodes gives an index to the nodes that have none, or that of a node before them; nodes is sorted by name. last
// is the one that was given out last, 0 where that is not known; it returns the one that is last now. Where none is
// left, the index stays 0.
func indexNodes(nodes []egress.Node, last int) int {
	used, largest := map[int]bool{}, 0
	for i, n := range nodes {
		if n.Index < 1 || n.Index > egress.MaxNodeIndex || used[n.Index] {
			nodes[i].Index = 0
		} else {
			used[n.Index] = true
			largest = max(largest, n.Index)
		}
	}
	if last == 0 { // there is no counter yet
		last = largest
	}
	for i, n := range nodes {
		if n.Index != 0 {
			continue
		}
		if next, ok := nextFree(last, egress.MaxNodeIndex, func(n int) bool { return used[n] }); ok {
			nodes[i].Index, used[next], last = next, true, next
		}
	}
	return last
}

// nextFree returns the first number after last that is not used, of 1 to limit; after limit comes 1. So a number that
// was given back rests for as long as last goes on: packets on their way may still carry it. ok is false when all are
// used.
func nextFree(last, limit int, used func(int) bool) (n int, ok bool) {
	n = last
	for range limit {
		if n++; n > limit {
			n = 1
		}
		if !used(n) {
			return n, true
		}
	}
	return 0, false
}
